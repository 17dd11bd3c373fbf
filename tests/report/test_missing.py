"""What the report and the terminal say where verdicts are missing, languages are left out, and prompts are too few."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Study

from mixmerge.evaluate.score import score_study
from mixmerge.report import tables
from mixmerge.report.findings import averaged_words, best_set_words, warnings
from mixmerge.report.page import render
from mixmerge.report.words import language

FEW = {
    "base": ("base", [], 0.5, 0.7, 0.1, 0.1),
    "a": ("expert", ["base"], 0.6, 0.5, 0.1, 0.1),
    "mix": ("baseline", ["base"], 0.6, 0.3, 0.1, 0.1),
    "linear": ("merge", ["a", "base"], 0.6, 0.3, 0.1, 0.1),
}


@pytest.fixture(scope="module")
def small(simulated: Callable[..., Study]) -> Study:
    return simulated(candidates=FEW, languages=["en", "hi", "ar"], limit={"dev": 3, "test": 6}, draws=100)


def without(study: Study, name: str, prompt_set: str, judge: str, lang: str, word: str = "unparsed") -> Study:
    """The study where a judge gave one candidate no verdict in a language, scored again."""
    found = Study(study.spec, copy.deepcopy(study.verdicts), study.prompts, study.responses, costs=study.costs)
    for row in found.verdicts[name, prompt_set, judge]:
        if row["lang"] == lang and row["verdict"] != "invalid":
            row["verdict"] = word
    found.scores = score_study(found.spec, found.verdicts, found.costs)
    return found


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text.split("<script", 1)[0]).split())


def test_a_study_with_all_its_verdicts_warns_of_nothing(small: Study) -> None:
    assert warnings(small.scores) == []
    assert averaged_words(small.scores) == "each averaged over 3 languages"


def test_verdicts_that_never_came_are_counted_and_cells_and_languages_named(small: Study) -> None:
    scores = without(small, "linear", "harmful", "refusal", "ar").scores
    lost = scores["counts"]["linear"]["refusal: unparsed"]
    said = warnings(scores)
    every = sum(n for of in scores["counts"].values() for key, n in of.items() if key.startswith("refusal: "))
    assert (
        said[0]
        == f"No verdict of refusal on {lost} of {every} answers ({lost} unparsed): left out of every share but Invalid."
    )
    assert said[1:] == [
        "Harm is averaged and compared over English and Hindi only: too few verdicts in Arabic (linear)."
    ]
    assert not any(each.startswith("Invalid") for each in said), "broken text is known of every answer"


def test_dev_prompts_are_named_where_other_verdicts_are_missing_there(small: Study) -> None:
    study = without(small, "linear", "harmful", "refusal", "ar")
    for name in FEW:
        for row in study.verdicts[name, "harmless", "refusal"]:
            if row["lang"] == "hi" and row["split"] == "dev":
                row["verdict"] = "unparsed"
    said = warnings(score_study(study.spec, study.verdicts, study.costs))
    assert said[-1] == "On dev prompts: Over-refusal has too few verdicts in Hindi (all)."
    assert len([each for each in said if "Harm is averaged" in each]) == 1


def test_unanswered_and_unparsed_are_told_apart(small: Study) -> None:
    one = without(small, "linear", "harmful", "refusal", "ar", "unanswered")
    both = without(one, "mix", "harmless", "refusal", "hi").scores
    assert re.search(r"\(\d+ unparsed and \d+ unanswered\)", warnings(both)[0])
    assert len([said for said in warnings(both) if said.startswith("No verdict")]) == 1


def test_the_page_says_it_above_the_results_and_beside_the_numbers(small: Study) -> None:
    study = without(small, "linear", "harmful", "refusal", "ar")
    page = render(**study.report_arguments())
    top = plain(page[: page.index('id="results"')])
    for said in warnings(study.scores):
        assert said in top
    assert (
        "averaged over: general quality (win rate), all 3 languages; harmful requests refused, 2 of 3 languages (en, hi);"
        in top
    )
    columns = {column.key: column.under for column in tables.result_columns(study.scores)}
    assert columns["harm"] == "%, en, hi only"
    assert columns["over_refusal"] == "%"
    harm = next(table for table in tables.language_tables(study.scores, "test") if table.metric == "harm")
    cell = next(row for row in harm.rows if row.name == "linear").cells[2]
    assert cell.value == "–"
    assert re.fullmatch(r"0 of \d judged", cell.interval)
    assert cell.interval in plain(page)


def test_means_that_all_leave_out_the_same_language_say_so_once(small: Study) -> None:
    scores = copy.deepcopy(small.scores)
    for axis in scores["answer"]["axes"]:
        scores["averaged"]["test"][axis]["languages"] = ["en", "ar"]
    assert averaged_words(scores) == "each averaged over 2 of 3 languages (en, ar)"


def test_a_set_that_has_fewer_languages_is_said_without_a_warning(simulated: Callable[..., Study]) -> None:
    study = simulated(candidates=FEW, languages=["en", "hi"], limit={"dev": 2, "test": 5}, draws=100)
    for (_, prompt_set, judge), rows in study.verdicts.items():
        if (prompt_set, judge) == ("general", "quality"):
            rows[:] = [row for row in rows if row["lang"] == "en"]
    scores = score_study(study.spec, study.verdicts, study.costs)
    assert warnings(scores) == []
    assert averaged_words(scores).startswith("averaged over: general quality (win rate), 1 of 2 languages (en);")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"better": "mix", "low": -0.3, "high": -0.1, "p": 0.01, "prompts": 20}, "mix better"),
        ({"better": "undecided", "low": -0.3, "high": 0.1, "p": 0.4, "prompts": 20}, "not told apart"),
        (
            {"better": "undecided", "low": 0.01, "high": 0.1, "p": 1.0, "prompts": 1},
            "not told apart: 1 prompt differs, by chance alone p 1.000",
        ),
    ],
)
def test_a_difference_is_read_as_it_was_called(found: dict[str, Any], words: str) -> None:
    assert tables.reading(found) == words


def test_one_that_stays_in_the_best_set_for_want_of_prompts_says_so(small: Study) -> None:
    scores = copy.deepcopy(small.scores)
    scores["best_set"] = list(FEW)
    for name in FEW:
        scores["balance"][name].pop("behind", None)
    scores["balance"]["mix"] |= {"behind": 0.2, "behind_by_chance": 0.1, "behind_p": 0.125}
    said = " ".join(best_set_words(scores))
    assert (
        "still in: mix, by 20.0 points, but chance alone does that (p 0.125, signs of whole prompts flipped)." in said
    )
    assert "flipping the signs of whole prompts tells the two apart" in said


def test_an_open_end_of_relative_harm_is_shown_as_open(small: Study) -> None:
    scores = copy.deepcopy(small.scores)
    scores["relative_harm"]["mix"] = {"value": 2900.0, "low": 500.0, "high": None, "n": 60}
    columns = [column.key for column in tables.result_columns(scores)]
    row = next(row for row in tables.result_rows(scores) if row.name == "mix")
    cell = row.cells[columns.index("relative_harm")]
    assert (cell.value, cell.interval) == ("+2900.0", "[+500.0, …]")
    from mixmerge.report.flat import rows

    (flat,) = [each for each in rows(scores) if each[0] == "mix" and each[3] == "relative_harm"]
    assert flat[6:9] == (2900.0, 500.0, "")


def test_the_counts_table_still_counts_what_no_share_holds(small: Study) -> None:
    study = without(small, "linear", "harmful", "refusal", "ar")
    text = plain(render(**study.report_arguments()))
    assert "unparsed" in text
    assert language("ar") in text
