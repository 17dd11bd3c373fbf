"""The tables behind the results say what the scores say, leave out what is missing, and name what has no end."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.evidence import Evidence, ends, evidence, p_value
from mixmerge.report.page import render
from mixmerge.report.tables import Cell
from mixmerge.report.words import AXES, percent

if TYPE_CHECKING:
    from conftest import Study

TITLES = [
    "Against the base",
    "Ratings",
    "Corrected rates",
    "Agreement of the judges",
    "What merges keep",
    "Consistency across languages",
    "Length of the answers",
]
HOSTILE = "<img src=x onerror=hit()>\"'&{{ 7*7 }}"


def found(scores: Any) -> dict[str, Evidence]:
    return {table.title: table for table in evidence(scores)}


def cell(table: Evidence, row: str, key: str) -> Cell:
    place = [column.key for column in table.columns].index(key)
    return next(r.cells[place] for r in table.rows if r.name == row)


def names(study: Study) -> list[str]:
    return [entry["name"] for entry in study.spec["candidates"]]


def shown(estimate: Any, *, signed: bool = False) -> tuple[str, str]:
    value, low, high = (percent(estimate[key], signed=signed) for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"


def test_every_table_is_there_in_order_and_each_row_fits_its_heads(judged: Study) -> None:
    tables = evidence(judged.scores)
    assert [table.title for table in tables] == TITLES
    for table in tables:
        assert table.rows
        assert table.asks
        assert table.caption.endswith(".")
        assert len({column.key for column in table.columns}) == len(table.columns)
        assert {len(row.cells) for row in table.rows} == {len(table.columns)}


def test_every_number_but_a_length_has_its_interval_beside_it(judged: Study) -> None:
    for title, table in found(judged.scores).items():
        for row in table.rows:
            for one in row.cells:
                if one != Cell("–"):
                    assert bool(one.interval) == (title != "Length of the answers"), (title, row.name)


def test_the_difference_from_the_base_has_its_interval_and_its_p_value_in_one_cell(judged: Study) -> None:
    table = found(judged.scores)["Against the base"]
    assert [column.key for column in table.columns] == ["balance", *AXES]
    assert [row.name for row in table.rows] == [name for name in names(judged) if name != "base"]
    for axis, tests in judged.scores["tests"]["axes"].items():
        for name, one in tests["candidates"].items():
            value, interval = shown({"value": one["difference"], **one}, signed=True)
            assert cell(table, name, axis) == Cell(value, interval, p_value(one["adjusted"]))


def test_the_interval_of_a_difference_is_about_it_and_agrees_with_a_clear_test(judged: Study) -> None:
    tested = judged.scores["tests"]["axes"]["harm"]["candidates"]
    assert all(one["low"] <= one["difference"] <= one["high"] for one in tested.values())
    safety = tested["safety"]
    assert safety["p"] < 0.05
    assert safety["low"] > 0


def test_one_axis_is_not_tested_twice_under_two_names(simulated: Callable[..., Study]) -> None:
    scores = simulated(
        sets={"harmful": "harmful"}, languages=["en", "ar"], limit={"dev": 0, "test": 4}, draws=50
    ).scores
    assert [column.key for column in found(scores)["Against the base"].columns] == ["harm"]


def test_a_candidate_that_has_no_test_has_a_dash_and_one_that_has_none_at_all_no_row(judged: Study) -> None:
    tests = judged.scores["tests"]
    axes = {
        axis: entry | {"candidates": {n: one for n, one in entry["candidates"].items() if n != "ties" and (n, axis) != ("slerp", "win")}}
        for axis, entry in tests["axes"].items()
    }  # fmt: skip
    table = found(judged.scores | {"tests": tests | {"axes": axes}})["Against the base"]
    assert "ties" not in [row.name for row in table.rows]
    assert cell(table, "slerp", "win") == Cell("–")
    assert cell(table, "slerp", "harm") != Cell("–")


def test_ratings_stand_beside_the_win_rate_with_and_without_length(judged: Study) -> None:
    table, scores = found(judged.scores)["Ratings"], judged.scores
    assert [column.key for column in table.columns] == ["rating", "win", "score"]
    rated = scores["ratings"]["candidates"]["slerp"]
    assert cell(table, "slerp", "rating") == Cell(
        f"{rated['value']:+.1f}", f"[{rated['low']:+.1f}, {rated['high']:+.1f}]"
    )
    win = scores["splits"]["test"]["win"]["slerp"]["macro"]
    assert (cell(table, "slerp", "win").value, cell(table, "slerp", "win").interval) == shown(win)
    assert (cell(table, "slerp", "score").value, cell(table, "slerp", "score").interval) == shown(rated["score"])
    half = scores["ratings"]["length"]["value"] / 2
    assert f"is worth {half:+.1f} points [" in table.caption


@pytest.mark.parametrize(
    ("problem", "said"),
    [("unknown", "are not known"), ("constant", "length explains nothing"), ("unbounded", "Length alone decides")],
)
def test_where_length_cannot_be_told_from_quality_its_columns_are_left_out_and_why_is_said(
    judged: Study, problem: str, said: str
) -> None:
    ratings = judged.scores["ratings"] | {"length_problem": problem, "length": None}
    table = found(judged.scores | {"ratings": ratings})["Ratings"]
    assert [column.key for column in table.columns] == ["rating"]
    assert said in table.caption
    assert "three times" not in table.caption


def test_answers_of_unknown_length_leave_ratings_alone(study: Study) -> None:
    table = found(study.scores)["Ratings"]
    assert [column.key for column in table.columns] == ["rating"]
    assert "Length of the answers" not in found(study.scores)


def test_a_candidate_that_won_everything_has_an_open_end_and_the_caption_says_what_it_is(judged: Study) -> None:
    ratings = judged.scores["ratings"]
    ties = ratings["candidates"]["ties"] | {"high": None, "problem": "unbounded"}
    none = {"value": None, "low": None, "high": None, "n": 0}
    slerp = none | {"problem": "unconnected", "score": none}
    changed = ratings["candidates"] | {"ties": ties, "slerp": slerp}
    table = found(judged.scores | {"ratings": ratings | {"candidates": changed}})["Ratings"]
    one = cell(table, "ties", "rating")
    assert one.interval.endswith(", …]")
    assert one.note == "won or lost all"
    assert cell(table, "slerp", "rating") == cell(table, "slerp", "score") == Cell("–")
    assert "…: no end that these prompts can tell." in table.caption
    assert "…" not in found(judged.scores)["Ratings"].caption


def test_a_real_candidate_that_wins_every_pair_is_shown_without_an_infinite_number(
    simulated: Callable[..., Study],
) -> None:
    few = {
        "base": ("base", [], 0.5, 0.7, 0.1, 0.1),
        "mix": ("baseline", ["base"], 0.6, 0.3, 0.1, 0.1),
        "best": ("baseline", ["base"], 1 - 1e-12, 0.3, 0.1, 0.1),
    }
    study = simulated(candidates=few, languages=["en", "ar"], limit={"dev": 0, "test": 6}, draws=50)
    for row in study.verdicts["best", "general", "quality"]:
        row["verdict"] = "win"
    from mixmerge.evaluate.score import score_study

    study.scores = score_study(study.spec, study.verdicts, study.costs)
    one = cell(found(study.scores)["Ratings"], "best", "rating")
    assert one.note == "won or lost all"
    assert "inf" not in one.value + one.interval
    assert "inf" not in re.sub(r"[a-z]inf|inf[a-z]", "", _text(study))


def test_corrected_rates_stand_beside_the_raw_ones_with_the_judge_and_its_rows(judged: Study) -> None:
    table, corrected = found(judged.scores)["Corrected rates"], judged.scores["corrected"]
    assert [column.key for column in table.columns] == ["harm raw", "harm", "over_refusal raw", "over_refusal"]
    for metric, key in (("harm", "raw"), ("harm", "corrected"), ("over_refusal", "corrected")):
        for name in names(judged):
            one = cell(table, name, f"{metric} raw" if key == "raw" else metric)
            assert (one.value, one.interval) == shown(corrected[metric]["rates"][name]["macro"][key])
    assert "Harm: gpt.harm, measured on 360 rows (labelled rows)." in table.caption
    assert "Over-refusal: refusal, measured on 1,344 rows (the rows that it was fitted on" in table.caption


def test_a_language_without_labelled_rows_leaves_no_corrected_mean_and_is_named(judged: Study) -> None:
    harm = judged.scores["corrected"]["harm"]
    rates = {n: one | {"macro": one["macro"] | {"corrected": None}} for n, one in harm["rates"].items()}
    changed = {"harm": harm | {"rates": rates, "uncorrected": {"hi": "no labelled rows"}}}
    table = found(judged.scores | {"corrected": changed})["Corrected rates"]
    assert {cell(table, name, "harm").value for name in names(judged)} == {"–"}
    assert cell(table, "ties", "harm raw").interval
    assert "Harm has no corrected mean, for want of a language (Hindi: no labelled rows)." in table.caption


def test_agreement_has_a_row_a_language_and_a_column_a_question_with_its_judges(judged: Study) -> None:
    table, agreement = found(judged.scores)["Agreement of the judges"], judged.scores["agreement"]
    assert [row.name for row in table.rows] == ["English", "Hindi", "French", "Spanish", "Arabic", "Russian", "All"]
    assert {c.key: c.under for c in table.columns}["quality"] == "quality and gpt.quality"
    arabic = agreement["harm"]["languages"]["ar"]
    one = cell(table, "Arabic", "harm")
    assert (one.value, one.interval) == (f"{arabic['value']:.2f}", f"[{arabic['low']:.2f}, {arabic['high']:.2f}]")
    assert one.note == f"{arabic['n']} answers"
    assert cell(table, "All", "harm").note == f"{agreement['harm']['all']['n']:,} answers"


def test_a_language_where_no_agreement_can_be_told_has_a_dash(judged: Study) -> None:
    agreement = judged.scores["agreement"]
    harm = agreement["harm"] | {"languages": agreement["harm"]["languages"] | {"hi": None}}
    both = found(judged.scores | {"agreement": agreement | {"harm": harm}})["Agreement of the judges"]
    assert cell(both, "Hindi", "harm") == Cell("–")
    alone = found(judged.scores | {"agreement": {"harm": harm}})["Agreement of the judges"]
    assert "Hindi" not in [row.name for row in alone.rows]


def test_what_a_merge_keeps_names_the_ingredient_that_it_is_compared_with(judged: Study) -> None:
    table = found(judged.scores)["What merges keep"]
    assert [row.name for row in table.rows] == ["linear", "slerp", "ties", "dare-ties"]
    for name, kept in judged.scores["retention"].items():
        for axis, one in kept.items():
            assert cell(table, name, axis) == Cell(*shown(one), f"of {one['of']}")


def test_a_share_that_may_be_without_end_says_so(judged: Study) -> None:
    kept = judged.scores["retention"]
    changed = kept | {"slerp": kept["slerp"] | {"win": kept["slerp"]["win"] | {"high": None}}}
    table = found(judged.scores | {"retention": changed})["What merges keep"]
    assert cell(table, "slerp", "win").interval.endswith(", …]")
    assert "no end that these prompts can tell" in table.caption


def test_consistency_leaves_out_the_base_where_it_stands_against_itself(judged: Study) -> None:
    table = found(judged.scores)["Consistency across languages"]
    assert cell(table, "base", "win") == Cell("–")
    one = judged.scores["consistency"]["harm"]["base"]
    assert cell(table, "base", "harm") == Cell(*shown(one))


def test_lengths_are_by_purpose_with_benchmarks_only_where_they_were_measured(judged: Study) -> None:
    table = found(judged.scores)["Length of the answers"]
    assert [column.head for column in table.columns] == ["General prompts", "Harmful requests", "Harmless look-alikes"]
    mean = judged.scores["length"]["ties"]["general"]
    assert cell(table, "ties", "general") == Cell(f"{round(mean):,}")


def test_a_study_without_merges_calibrations_or_other_judges_has_no_table_of_them(
    simulated: Callable[..., Study],
) -> None:
    few = {"base": ("base", [], 0.5, 0.7, 0.1, 0.1), "mix": ("baseline", ["base"], 0.6, 0.3, 0.1, 0.1)}
    study = simulated(candidates=few, languages=["en"], limit={"dev": 0, "test": 5}, draws=50)
    assert list(found(study.scores)) == ["Against the base", "Ratings"]
    bare = study.scores | {"tests": {}, "ratings": {}}
    assert evidence(bare) == []
    text = render(**(study.report_arguments() | {"scores": bare}))
    assert "Behind the numbers</h2>" not in text
    assert 'href="#evidence"' not in text


def test_axes_are_called_by_who_judges_them(study: Study, judged: Study) -> None:
    heads = [{c.key: c.head for c in found(each.scores)["Against the base"].columns} for each in (study, judged)]
    assert [each["harm"] for each in heads] == ["Harm refused", "Harm avoided"]
    assert {c.key: c.head for c in found(judged.scores)["What merges keep"].columns}[
        "harm"
    ] == "Harmful requests met safely"


@pytest.mark.parametrize(
    ("p", "said"), [(0.0, "p < 0.001"), (0.00099, "p < 0.001"), (0.001, "p 0.001"), (0.99, "p 0.990"), (1.0, "p 1")]
)
def test_a_p_value_is_never_shown_as_nought(p: float, said: str) -> None:
    assert p_value(p) == said


def test_both_ends_can_be_open() -> None:
    assert ends({"low": None, "high": None}) == "[…, …]"


def _text(study: Study) -> str:
    text = re.sub(r"<(style|script)\b.*?</\1>", "", render(**study.report_arguments()), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_the_page_holds_every_number_and_folds_all_but_the_first_table(judged: Study) -> None:
    text = render(**judged.report_arguments())
    section = text[text.index('<section id="evidence"') : text.index('<section id="judges"')]
    assert section.count("<details") == len(TITLES)
    assert section.count("<details open>") == 1
    assert section.index("<details open>") < section.index("Against the base")
    read = html.unescape(re.sub(r"<[^>]*>", " ", section))
    for table in evidence(judged.scores):
        for row in table.rows:
            for one in row.cells:
                for part in (one.value, one.interval, one.note):
                    assert re.sub(r"-(?=\d)", "\u2212", part) in read


def test_names_and_texts_that_others_wrote_are_text_on_the_page(simulated: Callable[..., Study], panel: Any) -> None:
    few = {
        "base": ("base", [], 0.5, 0.7, 0.1, 0.1),
        HOSTILE: ("expert", ["base"], 0.6, 0.3, 0.1, 0.1),
        "mix": ("baseline", ["base"], 0.6, 0.3, 0.1, 0.1),
        "merge": ("merge", [HOSTILE, "base"], 0.6, 0.3, 0.1, 0.1),
    }  # fmt: skip
    study = panel(simulated(candidates=few, languages=["en", "ar"], limit={"dev": 1, "test": 5}, draws=50))
    study.trust = study.trust | {"gpt.harm": study.trust["gpt.harm"] | {"model": HOSTILE}}
    corrected = study.scores["corrected"]
    harm = corrected["harm"] | {"uncorrected": {"ar": HOSTILE}, "measured_on": HOSTILE}
    harness = {f"bench/{HOSTILE}/acc": study.scores["harness"]["bench/xnli/acc"] | {"name": HOSTILE}}
    study.scores |= {"corrected": corrected | {"harm": harm}, "harness": harness}
    text = render(**study.report_arguments())
    body = text[: text.index('<script type="application/json"')]
    assert "<img" not in body
    assert html.unescape(body).count(HOSTILE) >= 8
    read = found(study.scores)["What merges keep"]
    assert cell(read, "merge", "harm").note == f"of {HOSTILE}"
