"""The diagnosis for people: its tables, its heat maps, and its page on disk and in a real browser cut off from all networks."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixmerge.errors import UserError
from mixmerge.merge import parse_config
from mixmerge.merge.diagnose import diagnose
from mixmerge.report.diagnosis import MAPS, MEANINGS, MEASURES, diagnosis_table, write_diagnosis
from mixmerge.report.heatmap import STRONGEST, HeatCell, heat_map

LAYERS = 5
SHAPES = {"embed_tokens.weight": (40, 16), "norm.weight": (16,), "lm_head.weight": (40, 16)}
for layer in range(LAYERS):
    for name, shape in {
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.up_proj.weight": (32, 16),
        "input_layernorm.weight": (16,),
    }.items():
        SHAPES[f"layers.{layer}.{name}"] = shape
HOSTILE = "<img src=x onerror=hit()><script>hit()</script>"


def write_model(folder: Path, seed: int, drift: float) -> Path:
    base, random = np.random.default_rng(0), np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {
        name: (base.normal(size=shape) + drift * random.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return folder


def configuration(method: str, folders: list[Path]) -> dict[str, Any]:
    base, *models = map(str, folders)
    raw: dict[str, Any] = {"merge_method": method, "parameters": {"weight": 1.0}}
    if method == "linear":
        return raw | {"models": [{"model": name} for name in (base, *models)]}
    return raw | {"base_model": base, "models": [{"model": name} for name in models]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [
        write_model(root / name, i, 0.05 * i)
        for i, name in enumerate(("base", "general-7", f"safe{HOSTILE.replace('/', '|')}"))
    ]


@pytest.fixture(scope="module")
def found(folders: list[Path]) -> dict[str, Any]:
    return diagnose(parse_config(configuration("ties", folders)))


@pytest.fixture(scope="module")
def without_base(folders: list[Path]) -> dict[str, Any]:
    return diagnose(parse_config(configuration("linear", folders)))


@pytest.fixture(scope="module")
def file(found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "diagnosis.html"
    write_diagnosis(file, found)
    return file


# Tables


@pytest.mark.parametrize("by", ["kinds", "layers", "tensors"])
def test_a_table_has_a_row_for_each_place_and_a_cell_for_each_head(by: str, found: dict[str, Any]) -> None:
    heads, rows = diagnosis_table(found, by)
    assert len(rows) == len(found[by])
    assert all(len(row) == len(heads) for row in rows)
    assert {measure.head for measure in MEASURES} <= set(heads)


def test_rows_carry_the_numbers_that_were_found(found: dict[str, Any]) -> None:
    heads, rows = diagnosis_table(found, "kinds")
    for told, row in zip(found["kinds"], rows, strict=True):
        cells = dict(zip(heads, row, strict=True))
        assert cells["kind"] == told["kind"]
        assert cells["parameters"] == f"{told['elements']:,}"
        assert float(cells["lowest cosine"]) == pytest.approx(min(e["cosine"] for e in told["models"]), abs=1e-6)
        longest = max(e["relative_length"] for e in told["lengths"])
        assert float(cells["task vector % of base"]) == pytest.approx(100 * longest, rel=0.01)
        assert (cells["rank %"] == "") == (told["kind"] == "norm")


def test_what_was_not_measured_has_no_column(without_base: dict[str, Any]) -> None:
    heads, _ = diagnosis_table(without_base, "layers")
    assert heads == ["layer", "tensors", "parameters", "lowest cosine", "parallel %"]


def test_layers_of_several_stacks_carry_the_name_of_theirs(found: dict[str, Any]) -> None:
    several = json.loads(json.dumps(found))
    for told in (*several["layers"], *several["cells"]):
        if told["layer"] is not None and told["layer"] > 2:
            told["stack"] = "decoder"
    names = [row[0] for row in diagnosis_table(several, "layers")[1]]
    assert names == ["no layer", "layers.0", "layers.1", "layers.2", "decoder.3", "decoder.4"]


def test_every_head_of_a_table_is_explained() -> None:
    assert [head for head, _ in MEANINGS] == [measure.head for measure in MEASURES]


# Heat maps


def test_a_map_has_every_number_in_its_place_and_no_colour_of_its_own() -> None:
    cells = [HeatCell("0", "mlp", "0.5", 1.0), HeatCell("1", "mlp", "-0.2", -0.4), HeatCell("1", "norm", "<0.01", 0.0)]
    drawn = heat_map(cells, rows=["0", "1"], columns=["mlp", "norm"], width=300)
    texts = [found.text for found in ElementTree.fromstring(drawn).iter("text")]
    assert {"0.5", "\u22120.2", "<0.01", "mlp", "norm", "0", "1"} == set(texts)
    fills = re.findall(r'fill="(var\(--(?:good|bad)\))"', drawn)
    assert sorted(fills) == ["var(--bad)", "var(--good)", "var(--good)"]
    assert set(re.findall(r'fill-opacity="([\d.]+)"', drawn)) >= {str(STRONGEST), str(0.4 * STRONGEST)}
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|\bon\w+=|style=|href=|http", drawn)


def test_a_value_beyond_the_scale_is_no_stronger_than_the_strongest() -> None:
    drawn = heat_map([HeatCell("0", "mlp", "9", 9.0)], rows=["0"], columns=["mlp"], width=100)
    assert max(float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', drawn)) <= 1.0
    assert f'fill-opacity="{STRONGEST}"' in drawn


# The page


def test_the_page_says_the_conclusions_first_and_every_map_and_table(file: Path, found: dict[str, Any]) -> None:
    text = file.read_text(encoding="utf-8")
    from markupsafe import escape

    places = [text.index(str(escape(sentence))) for sentence in found["conclusions"]]
    assert places == sorted(places)
    assert all(f"<h3>{shown.title}</h3>" in text for shown in MAPS)
    assert all(name in text for name in SHAPES)
    assert text.index(found["conclusions"][0].split(" (")[0]) < text.index('id="maps"') < text.index('id="tables"')


def test_the_policy_allows_our_style_by_hash_and_no_script(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (written,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    policy = html.unescape(written)
    assert "default-src 'none'" in policy
    assert "script-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert "<script" not in text
    assert not re.search(r"""<[^>]*\s(?:style|on\w+)\s*=\s*["']|(?:src|href)="(?!#)|url\(""", text)


def test_without_a_base_the_page_says_so_and_shows_angles_alone(without_base: dict[str, Any], tmp_path: Path) -> None:
    write_diagnosis(tmp_path / "page.html", without_base)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "there are no task vectors" in text
    assert text.count("<figure>") == 1
    assert MAPS[0].title in text


def test_one_model_alone_has_a_page_without_maps(folders: list[Path], tmp_path: Path) -> None:
    raw = {"merge_method": "passthrough", "models": [{"model": str(folders[0])}]}
    write_diagnosis(tmp_path / "page.html", diagnose(parse_config(raw)))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nothing to compare" in text
    assert "<figure>" not in text


def test_the_same_diagnosis_gives_the_same_page(file: Path, found: dict[str, Any], tmp_path: Path) -> None:
    write_diagnosis(tmp_path / "again.html", found)
    assert (tmp_path / "again.html").read_bytes() == file.read_bytes()


def test_a_page_that_cannot_be_written_is_one_clear_error(found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "gone" / "page.html")
    with pytest.raises(UserError, match=r"link\.html: the page cannot be written: no such file or directory"):
        write_diagnosis(tmp_path / "link.html", found)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser `chromium` on the PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_it_asks_for_nothing_stays_quiet_and_never_scrolls_sideways(
    file: Path, found: dict[str, Any], width: int, scheme: Any
) -> None:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        requests: list[str] = []
        noise: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.locator(".chart:visible")
        assert shown.count() == len(MAPS)
        cell = shown.first.locator('path[fill="var(--good)"]').first
        assert (
            cell.evaluate("e => getComputedStyle(e).fill")
            == {"light": "rgb(23, 105, 194)", "dark": "rgb(79, 155, 236)"}[scheme]
        )
        models = page.locator("#models li").all_inner_texts()
        assert [name.split(" /")[-1].rpartition("/")[2] for name in models] == [
            Path(name).name for name in (*found["bases"], *found["models"])
        ]
        assert page.locator("img, script").count() == 0
        assert requests == [file.as_uri()]
        assert noise == []
        browser.close()


# The command


@pytest.fixture
def config(folders: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(configuration("ties", folders)))  # JSON is YAML
    return path


def test_the_command_prints_conclusions_and_tables(mixmerge: Any, config: Path, found: dict[str, Any]) -> None:
    status, out, err = mixmerge("diagnose", config)
    assert status == 0
    assert "error" not in err
    assert out.startswith("\n".join(found["conclusions"]))
    assert re.search(r"^kind +tensors +parameters +lowest cosine", out, re.M)
    assert re.search(r"^no layer ", out, re.M)
    assert all(re.search(rf"^{told['kind']} ", out, re.M) for told in found["kinds"])


def test_the_command_writes_json_and_a_page_at_once(mixmerge: Any, config: Path, found: dict[str, Any]) -> None:
    page = config.with_name("diagnosis.html")
    status, out, _ = mixmerge("diagnose", config, "--json", "--page", page)
    assert status == 0
    told = json.loads(out)
    assert told["tensors"] == found["tensors"]
    assert told["conclusions"] == found["conclusions"]
    assert page.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")


@pytest.mark.parametrize("page", ["missing/page.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(
    page: str, mixmerge: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    config.write_text("merge_method: never read\n")
    status, out, err = mixmerge("diagnose", config, "--page", page)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {page}: not a file in a folder that is there; ")


def test_a_mistake_in_the_configuration_is_named_with_its_line(mixmerge: Any, config: Path) -> None:
    config.write_text("merge_method: ties\nbase_model: a\nmodels:\n  - modl: b\n")
    status, out, err = mixmerge("diagnose", config)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {config}:4: models.0: ")
