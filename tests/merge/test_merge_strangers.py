"""What strangers bring: their folders, their pickles, their YAML and their calls."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import config_for, example, read_model, write_model

from mixmerge.errors import CheckpointError, ModelError, RecipeError
from mixmerge.merge import load_config, merge, parse_config, verify
from mixmerge.merge.card import languages_of
from mixmerge.merge.pickles import read_pickle
from mixmerge.merge.record import RECORD

YAML = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"


@pytest.fixture
def models(tmp_path):
    draw = torch.Generator().manual_seed(0)
    return [
        write_model(tmp_path / name, {"model.layers.0.mlp.w": torch.randn(9, 20, generator=draw)})
        for name in ("base", "a", "b")
    ]


def test_paths_may_be_text(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML)
    assert merge("c.yml", "out")["tensors"] == 1
    assert load_config("c.yml") == load_config(Path("c.yml"))
    with pytest.raises(RecipeError, match="a merge configuration is a mapping of keys to values, not a NoneType"):
        parse_config(None)
    with pytest.raises(RecipeError, match="the path of a YAML file was expected, not a dict; see parse_config"):
        load_config({})


def test_relative_models_are_those_of_the_current_folder_as_for_mergekit(models, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.yml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    assert merge("configs/c.yml", "out").get("notes") is None
    monkeypatch.chdir("/")
    assert verify(tmp_path / "out")["tensors"] == 1
    # another `a` beside the YAML: the current folder's is still taken, and that is said
    write_model(tmp_path / "configs" / "a", {"model.layers.0.mlp.w": torch.zeros(9, 20)})
    monkeypatch.chdir(tmp_path)
    told = merge("configs/c.yml", "again")["notes"]
    assert told == ["'a' is that of the current folder, not the one beside the YAML"]
    assert torch.equal(*(read_model(tmp_path / name)["model.layers.0.mlp.w"] for name in ("out", "again")))


def test_models_beside_the_yaml_are_found_from_elsewhere(models, tmp_path, monkeypatch):
    (tmp_path / "c.yml").write_text(YAML)
    monkeypatch.chdir("/")
    assert merge(tmp_path / "c.yml", tmp_path / "out")["tensors"] == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("&r\nmerge_method: linear\nmodels: *r\n", "nested more than 64 levels deep"),
        ("merge_method: linear\nmodels: " + "[" * 300 + "]" * 300, "nested"),
        ("merge_method: linear\nmodels: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
            + "models: *a9\n",
            "more than 200,000 values, with every alias written out",
        ),
    ],
)
def test_yaml_that_blows_up_is_refused_at_once(text, what, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(RecipeError, match=what):
        load_config(tmp_path / "c.yml")


@pytest.mark.parametrize("size", [10**12, 10**22, 0])
def test_padding_has_an_upper_limit(size, models):
    raw = {"tokenizer": {"source": "base", "pad_to_multiple_of": size}}
    with pytest.raises(RecipeError, match="must be a whole number from 1 to 65,536"):
        config_for("linear", models[1:], base=models[0], parameters={"weight": 1}, **raw)


def test_a_broken_template_is_refused_and_transformers_own_tags_are_not(models):
    def given(template):
        return config_for("linear", models[1:], parameters={"weight": 1}, chat_template=template)

    with pytest.raises(RecipeError, match=r"chat_template: the template is no jinja: line 1: "):
        given("{% for m in messages %}{{ m.content ")
    given("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}")


def test_a_filter_that_no_tensor_matches_is_told(models, tmp_path):
    weight = [{"filter": "mpl", "value": 0.9}, {"value": 0.5}]
    told = merge(config_for("linear", models[1:], parameters={"weight": weight}), tmp_path / "out")["notes"]
    assert told == ["filter 'mpl' is part of no tensor's name, so its value is never used; did you mean 'mlp'?"]
    weight[0]["filter"] = "mlp"
    assert "notes" not in merge(config_for("linear", models[1:], parameters={"weight": weight}), tmp_path / "fine")


def test_a_local_folder_is_no_model_of_the_hub_on_the_card(models, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    for folder in models:
        folder.rename(tmp_path / "m" / folder.name)
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML.replace("model: a", "model: m/a").replace("model: b", "model: m/b"))
    merge("c.yml", "out")
    assert "base_model" not in Path("out/README.md").read_text()


def test_the_card_names_the_languages_of_the_models_cards(models, tmp_path):
    (models[1] / "README.md").write_text("---\nlanguage: [fr, hi]\nlicense: mit\n---\n# A\n")
    (models[2] / "README.md").write_text("---\nlanguage: hi\n---\n")
    (models[0] / "README.md").write_text("---\nlanguage: [\n---\n")
    assert languages_of(models) == ["fr", "hi"]
    merge(config_for("linear", models[1:], parameters={"weight": 1}), tmp_path / "out")
    assert 'language:\n- "fr"\n- "hi"\n' in (tmp_path / "out" / "README.md").read_text()
    assert languages_of([tmp_path / "out"]) == ["fr", "hi"]


def test_an_odd_dtype_is_blamed_on_the_model_that_has_it(models, tmp_path):
    write_model(models[2], {"model.layers.0.mlp.w": torch.zeros(9, 20, dtype=torch.float64)})
    with pytest.raises(ModelError, match=r"is stored as F64 in '.*/b', and not so in the others; convert it"):
        merge(example("ties", models), tmp_path / "out")


def test_a_link_to_nowhere_is_refused_before_the_work(models, tmp_path):
    (tmp_path / "out").symlink_to("/nonexistent/place")
    with pytest.raises(ModelError, match="is a link to /nonexistent/place, which is not there"):
        merge(example("ties", models), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_a_whole_number_is_asked_for(models):
    with pytest.raises(RecipeError, match=r"'max_iter' must be a whole number, got 2\.5"):
        config_for("karcher", models[1:], parameters={"max_iter": 2.5})
    with pytest.raises(RecipeError, match=r"'max_iter' must be at least 1, got 0"):
        config_for("karcher", models[1:], parameters={"max_iter": 0})


def test_a_page_never_overwrites_a_yaml(models, tmp_path, mixmerge, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML)
    status, _, error = mixmerge("diagnose", "c.yml", "--page", "c.yml")
    assert status == 2
    assert "a page is an HTML file" in error
    assert Path("c.yml").read_text() == YAML


def pickled(folder: Path, *, shards: bool = False) -> Path:
    """The same model, as torch.save writes it."""
    tensors = read_model(folder)
    (folder / "model.safetensors").unlink()
    tensors |= {"step": torch.tensor([3]), "part": torch.arange(100.0)[10:40]}
    if shards:
        names = sorted(tensors)
        files = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(names)}
        for name, file in files.items():
            torch.save({name: tensors[name]}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_are_read_where_asked_for_and_give_the_same_model(shards, models, tmp_path, mixmerge, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML)
    merge("c.yml", "plain")
    for folder in models[1:]:
        pickled(folder, shards=shards)
    status, _, error = mixmerge("merge", "c.yml", "out")
    assert status == 2
    assert "only pickled weights, which can run code when read" in error
    assert "--pickle" in error
    assert mixmerge("merge", "c.yml", "out", "--pickle")[0] == 0
    made = read_model(tmp_path / "out")
    assert torch.equal(made["model.layers.0.mlp.w"], read_model(tmp_path / "plain")["model.layers.0.mlp.w"])
    assert torch.equal(made["part"], torch.arange(100.0)[10:40])
    assert made["step"].item() == 3
    assert verify(tmp_path / "out")["tensors"] == 3


class Evil:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_a_pickle_that_runs_code_or_is_damaged_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(3), "x": Evil()}, file)
    with pytest.raises(CheckpointError, match="asks for more than tensors, which could run code"):
        read_pickle(file)
    assert not Path("was-run").exists()
    torch.save({"w": torch.ones(30)}, file)
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\x80\x02" + b"x" * 100):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            read_pickle(file)
    torch.save({"w": torch.ones(3, 4).T}, file)
    with pytest.raises(CheckpointError, match=r"tensor 'w' .* does not lie in one piece"):
        read_pickle(file)
    torch.save({"w": torch.ones(3), "step": 7}, file)
    with pytest.raises(CheckpointError, match="'step' is no tensor"):
        read_pickle(file)


def test_what_a_pickle_says_is_where_the_bytes_lie(tmp_path):
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(30).bfloat16()[10:20], "c": torch.tensor(2.5).half()}
    torch.save(tensors, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    for name, place in read_pickle(tmp_path / "x.bin").items():
        raw = np.frombuffer(data[place.offset : place.offset + place.bytes], np.uint8)
        assert np.array_equal(raw, tensors[name].reshape(-1).view(torch.uint8).numpy())


def rewritten(file: Path, changed: dict[str, bytes]) -> None:
    """A zip with other contents under the names that end so."""
    with zipfile.ZipFile(file) as held:
        entries = {name: held.read(name) for name in held.namelist()}
    with zipfile.ZipFile(file, "w") as made:
        for name, data in entries.items():
            made.writestr(name, next((new for end, new in changed.items() if name.endswith(end)), data))


def test_a_big_endian_pickle_is_refused_before_torch_sees_it(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", {"/byteorder": b"big"})
    with pytest.raises(CheckpointError, match="its numbers are big-endian; load it with transformers"):
        read_pickle(tmp_path / "x.bin")


def test_a_zip_that_is_no_pickle_is_refused(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", {"/data.pkl": b"not a pickle at all"})
    with pytest.raises(CheckpointError):
        read_pickle(tmp_path / "x.bin")
    torch.save([torch.ones(3)], tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="'' is no tensor"):
        read_pickle(tmp_path / "x.bin")


def test_a_sparse_tensor_in_a_pickle_is_refused(tmp_path):
    torch.save({"w": torch.eye(4).to_sparse()}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("merge_method: linear\nmodels: !x [{model: a}]\n", "tag"),
        ('merge_method: !!python/object/apply:os.system ["touch was-run"]\nmodels: []\n', "tag"),
        ("merge_method: !foo linear\nmodels: [{model: a}]\n", "the tag !foo is not understood"),
        ("merge_method: linear\nmodels: [{model: !!python/name:os.system x}]\n", "tag"),
    ],
)
def test_a_tag_is_refused(text, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(text)
    with pytest.raises(RecipeError, match=what):
        load_config("c.yml")
    assert not Path("was-run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "c.yml", "o" * 300),
        ("merge", "long.yml", "out"),
        ("diagnose", "c.yml", "--page", "p" * 300 + ".html"),
    ],
)
def test_a_name_that_is_too_long_is_one_line(arguments, models, tmp_path, mixmerge, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML)
    Path("long.yml").write_text(YAML.replace("model: a", "model: ./" + "a" * 300))
    status, _, error = mixmerge(*arguments)
    assert status in (1, 2)
    assert "Traceback" not in error
    assert "too long" in error or "no such model folder" in error


@pytest.mark.parametrize(
    "front", ["[" * 5000, "language: [", "language: 7", "language: {a: b}", "- no", "\x00", "language:"]
)
def test_an_odd_card_of_a_model_does_not_cost_the_merge(front, models, tmp_path):
    (models[1] / "README.md").write_text(f"---\n{front}\n---\n")
    merge(config_for("linear", models[1:], parameters={"weight": 1}), tmp_path / "out")
    assert "language" not in (tmp_path / "out" / "README.md").read_text().split("\n---")[0]


def test_norwegian_stays_a_language_for_every_reader(models, tmp_path):
    (models[1] / "README.md").write_text('---\nlanguage: ["no", en, "x\\ninjected: 1"]\n---\n')
    merge(config_for("linear", models[1:], parameters={"weight": 1}), tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert '- "no"\n- "en"\n' in front
    assert "injected" not in front


def test_a_configuration_nested_without_end_is_named(models, tmp_path):
    (models[1] / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"a/config.json: not valid JSON"):
        merge(example("linear", models), tmp_path / "out")


@pytest.mark.parametrize(
    "changed",
    [
        {"inputs": None},
        {"inputs": []},
        {"relative_to": 7},
        {"config": "linear"},
        {"earlier": "x"},
        {"earlier": None},
    ],
)
def test_a_damaged_record_is_said_to_be(changed, models, tmp_path, mixmerge):
    merge(example("linear", models), tmp_path / "out")
    path = tmp_path / "out" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(CheckpointError, match=r"mixmerge_merge.json: not the record of a merge"):
        verify(tmp_path / "out")
    status, _, error = mixmerge("merge", "--verify", tmp_path / "out")
    assert status == 1
    assert error.count("\n") == 1


def test_one_folder_under_two_names_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a")
    for other in ("./a", "a/", str(tmp_path / "a"), "b/../a", "link"):
        Path("c.yml").write_text(YAML.replace("model: b", f"model: {other}"))
        with pytest.raises(ModelError, match="are the same model; write it in the same way everywhere"):
            merge("c.yml", "out")
        assert not Path("out").exists()


def test_an_output_that_cannot_be_replaced_is_refused_at_once(models, tmp_path, monkeypatch, mixmerge):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML.replace("model: ", "model: ../"))
    Path("here").mkdir()
    monkeypatch.chdir("here")
    for place in (".", str(tmp_path / "here")):
        status, _, error = mixmerge("merge", "../c.yml", place)
        assert (status, error) == (
            2,
            f"error: {place}: the current folder cannot be replaced by the finished model; name a new folder in it\n",
        )
    assert mixmerge("merge", "../c.yml", "/proc")[0] == 2
    assert list(Path().iterdir()) == []


def test_an_output_that_links_to_an_empty_folder_is_filled_there(models, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    merge(config_for("linear", models[1:], parameters={"weight": 1}), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b", "disk", "out"}


def test_a_dry_run_refuses_the_output_that_the_merge_would(models, tmp_path, monkeypatch, mixmerge):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(YAML)
    status, _, error = mixmerge("merge", "c.yml", "a", "--dry-run")
    assert (status, error) == (
        2,
        "error: a: the output folder is there already and not empty; remove it, or name another folder\n",
    )
