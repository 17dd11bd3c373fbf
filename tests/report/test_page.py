"""The page as a file: what it says and in which order, that it reaches for nothing, that it can be read by all."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.heatmap import STRONGEST
from mixmerge.report.judge_words import HARMFUL
from mixmerge.report.page import render, write_report

if TYPE_CHECKING:
    from conftest import Study

CSS = Path(__file__).parents[2] / "src" / "mixmerge" / "report" / "templates" / "report.css"


class Page(HTMLParser):
    """The page's elements in order: (tag, attributes, text directly inside)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "input", "br"):
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self.elements[self._open.pop()][0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for place in self._open[-1:]:
            self.elements[place][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def plain(text: str) -> str:
    """What a reader sees, without the embedded data, style and script."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.replace("&#39;", "'").replace("&amp;", "&").split())


def test_it_reports_what_it_wrote(study: Study, tmp_path: Path) -> None:
    found = write_report(tmp_path, **study.report_arguments())
    assert found == {
        "bytes": (tmp_path / "report.html").stat().st_size,
        "candidates": len(study.spec["candidates"]),
        "responses": len(study.responses),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "scores.csv"]


def test_nine_candidates_six_languages_and_36_prompts_stay_under_a_megabyte_and_a_half(report: Path) -> None:
    assert (report / "report.html").stat().st_size < 1_500_000


def test_the_same_study_gives_the_same_page(study: Study, text: str) -> None:
    assert render(**study.report_arguments()) == text


def test_sections_stand_in_the_order_in_which_a_reader_asks(page: Page) -> None:
    order = ["answer", "results", "front", "languages", "evidence", "judges", "browse", "trainings", "made"]
    assert [attributes["id"] for attributes, _ in page.all("section")] == order
    links = [attributes["href"] for attributes, _ in page.all("a")]
    assert set(links) <= {f"#{name}" for name in order}


def test_the_answer_stands_first_as_it_was_given(study: Study, text: str) -> None:
    read = plain(text)
    assert study.scores["answer"]["sentence"].replace("-", "\u2212") in read.replace("-", "\u2212")
    assert re.search(r"trained on \d\.\d times the tokens\.", read)
    assert read.index("Mix the data, or merge the models?") < read.index("Best set") < read.index("Pareto front")


def test_it_says_what_harmful_means_and_names_every_judge(text: str) -> None:
    read = plain(text)
    assert read.count(HARMFUL) == 1
    assert "A base that only repeats the question counts as complied" in read
    for name in ("quality", "refusal", "language"):
        assert f"<code>{name}</code>" in text


def test_every_number_of_the_result_table_is_on_the_page(study: Study, text: str) -> None:
    from mixmerge.report.tables import result_rows

    read = plain(text)
    for row in result_rows(study.scores):
        for cell in row.cells:
            for part in (cell.value, cell.interval, cell.note):
                assert re.sub(r"-(?=\d)", "\u2212", part) in read


def test_prompts_per_set_and_split_and_the_statistics_are_said(text: str) -> None:
    read = plain(text)
    assert "harmless harmless 4 8" in read
    assert "Bootstrap draws 500" in read
    assert "Level of the intervals 95 %" in read


def test_what_a_judge_says_of_itself_is_text(text: str) -> None:
    assert "&lt;b&gt;text&lt;/b&gt;" in text
    assert "<b>text</b>" not in text


def test_the_policy_allows_our_style_and_script_by_hash_and_nothing_else(page: Page, text: str) -> None:
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in (policy or "")
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_nothing_is_loaded_and_nothing_is_styled_or_scripted_inline(page: Page) -> None:
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "form", "base", "video", "audio"), tag
        for name, value in attributes.items():
            assert name != "style", tag
            assert not name.startswith("on"), tag
            assert name not in ("src", "srcset", "action"), tag
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#")
            assert "url(" not in (value or "") or "url(#" in (value or "")
    style = page.all("style")[0][1]
    assert "url(" not in style
    assert "@import" not in style


def test_script_is_one_and_never_makes_markup_of_text(page: Page) -> None:
    scripts = page.all("script")
    assert [attributes.get("type") for attributes, _ in scripts] == ["application/json", None]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|setAttribute", scripts[1][1]
    )


def test_every_table_has_a_caption_and_every_head_says_of_what(page: Page) -> None:
    assert len(page.all("table")) == len(page.all("caption")) > 10
    for attributes, text in page.all("th"):
        assert attributes.get("scope") in ("row", "col", "rowgroup", "colgroup"), text


def test_ids_are_unique_and_labels_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if tag == "select" or attributes.get("role") in ("img", "region", "group"):
            assert tag == "select" or attributes.get("aria-label")
    assert [attributes["lang"] for attributes, _ in page.all("html")] == ["en"]


def test_headings_go_down_one_level_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(a: tuple[float, ...], b: tuple[float, ...], share: float) -> tuple[float, ...]:
    return tuple(share * x + (1 - share) * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", CSS.read_text(encoding="utf-8"), re.DOTALL)[scheme]
    found = dict(re.findall(r"--(\w+): #([0-9a-f]{3,6})\b", block))
    colours = {
        name: tuple(int(c, 16) / 255 for c in (re.findall("..", v) if len(v) == 6 else [d * 2 for d in v]))
        for name, v in found.items()
    }
    for ground in ("paper", "panel"):
        for name in ("ink", "muted", "accent"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("base", "expert", "baseline", "merge", "caution", "good", "bad"):
        assert contrast(colours[name], colours["paper"]) >= 3, name
    for tint in ("good", "bad"):  # the strongest tint of a language table, under its interval at 82 %
        ground = mixed(colours[tint], colours["paper"], 0.41)
        assert contrast(mixed(colours["ink"], ground, 0.82), ground) >= 4.5, tint
        strongest = mixed(colours[tint], colours["paper"], STRONGEST)  # of a heat map, under its number
        assert contrast(colours["ink"], strongest) >= 4.5, tint


@pytest.mark.parametrize("left", [["general"], ["harmful"], ["general", "harmless"]])
def test_a_study_with_fewer_prompt_sets_has_a_page_that_says_what_is_missing(
    simulated: Callable[..., Study], left: list[str]
) -> None:
    study = simulated(sets={name: name for name in left}, languages=["en"], limit={"dev": 0, "test": 5}, draws=100)
    text = render(**study.report_arguments())
    assert "No chart: it takes general and harmful prompts" in text
    assert 'type="radio"' not in text
    assert "each averaged over 1 language." in plain(text)


def test_a_study_without_a_merge_has_a_page_without_a_comparison(simulated: Callable[..., Study]) -> None:
    few = {
        "base": ("base", [], 0.5, 0.7, 0.1, 0.1),
        "mix": ("baseline", ["base"], 0.6, 0.3, 0.1, 0.1),
    }
    study = simulated(candidates=few, languages=["en", "ar"], limit={"dev": 2, "test": 5}, draws=100)
    text = render(**study.report_arguments())
    assert "Nothing to compare" in plain(text)
    assert "Difference by axis" not in text


def test_a_page_with_judges_of_a_recipe_says_who_judged_and_has_its_benchmarks(
    judged: Study, judged_report: Path
) -> None:
    text = (judged_report / "report.html").read_text(encoding="utf-8")
    read = plain(text)
    assert HARMFUL not in read
    assert "Answers to harmful requests that gpt.harm judged harmful." in read
    assert "harmful requests met safely" in read
    for name in judged.spec["judges"]:
        assert f"<code>{name}</code>" in text
    assert read.count("Its accuracy was not measured here.") == 5
    found = Page(text)
    assert [text for _, text in found.all("h3")].count("Benchmarks") == 1
    from mixmerge.report.tables import benchmark_rows

    for row in benchmark_rows(judged.scores):
        for one in row.cells:
            assert one.value in read
            assert one.interval in read
