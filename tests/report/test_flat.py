"""scores.csv: every number of the scores once, under one header, and nothing that is not in them."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report import flat

if TYPE_CHECKING:
    from conftest import Study


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def names(study: Study) -> list[str]:
    return [entry["name"] for entry in study.spec["candidates"]]


def one(rows: list[dict[str, str]], candidate: str, metric: str, language: str = "macro") -> dict[str, str]:
    found = [r for r in rows if (r["candidate"], r["metric"], r["language"]) == (candidate, metric, language)]
    assert len(found) == 1, (candidate, metric, language)
    return found[0]


@pytest.fixture(scope="module")
def rows(judged_report: Path) -> list[dict[str, str]]:
    return read(judged_report)


def test_a_plain_study_has_a_row_for_each_candidate_split_metric_and_language(report: Path, study: Study) -> None:
    found = read(report)
    assert tuple(found[0]) == flat.HEADER
    keys = {(r["candidate"], r["split"], r["metric"], r["language"]) for r in found}
    assert len(keys) == len(found)
    expected = {
        (name, split, metric, code)
        for split, metrics in study.scores["splits"].items()
        for metric, by_name in metrics.items()
        for name, score in by_name.items()
        if score
        for code in ["macro", *score["languages"]]
    }
    assert expected <= keys
    said = Counter(
        r["metric"] for r in found if (r["candidate"], r["split"], r["metric"], r["language"]) not in expected
    )
    others = len(names(study)) - 1
    assert said["relative_harm"] == others
    assert said["balance"] == 2 * len(names(study))
    assert said["p_holm/balance"] == said["p/win"] == said["difference/harm"] == said["rating"] == others
    row = one([r for r in found if r["split"] == "test"], "ties", "harm", "hi")
    measured = study.scores["splits"]["test"]["harm"]["ties"]["languages"]["hi"]
    assert [float(row[k]) for k in ("value", "low", "high")] == [measured[k] for k in ("value", "low", "high")]
    assert (int(row["n"]), row["unit"], row["kind"]) == (measured["n"], "fraction", "merge")


def test_no_key_stands_twice_with_judges_benchmarks_and_harness(rows: list[dict[str, str]]) -> None:
    keys = Counter((r["candidate"], r["split"], r["metric"], r["language"]) for r in rows)
    assert max(keys.values()) == 1


def test_every_value_is_a_finite_number_and_lies_in_its_interval(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert math.isfinite(float(row["value"])), row
        for end in ("low", "high"):
            assert row[end] == "" or math.isfinite(float(row[end])), row
        if row["low"] and row["high"]:
            assert float(row["low"]) <= float(row["high"]), row


def test_a_test_has_its_difference_interval_and_both_p_values(rows: list[dict[str, str]], judged: Study) -> None:
    for axis, found in judged.scores["tests"]["axes"].items():
        for name, tested in found["candidates"].items():
            difference = one(rows, name, f"difference/{axis}")
            assert [float(difference[k]) for k in ("value", "low", "high")] == [
                tested[k] for k in ("difference", "low", "high")
            ]
            assert int(difference["n"]) == tested["clusters"]
            assert float(one(rows, name, f"p/{axis}")["value"]) == tested["p"]
            assert float(one(rows, name, f"p_holm/{axis}")["value"]) == tested["adjusted"] >= tested["p"]


def test_corrected_rates_stand_beside_the_raw_ones_by_language_too(rows: list[dict[str, str]], judged: Study) -> None:
    test = [r for r in rows if r["split"] == "test"]
    for metric in ("harm", "over_refusal"):
        for name in names(judged):
            rates = judged.scores["corrected"][metric]["rates"][name]
            assert float(one(test, name, f"corrected/{metric}")["value"]) == rates["macro"]["corrected"]["value"]
            assert float(one(test, name, metric)["value"]) == pytest.approx(rates["macro"]["raw"]["value"])
            hindi = rates["languages"]["hi"]["corrected"]
            assert float(one(test, name, f"corrected/{metric}", "hi")["low"]) == hindi["low"]


def test_ratings_retention_consistency_length_and_agreement_are_there(
    rows: list[dict[str, str]], judged: Study
) -> None:
    scores = judged.scores
    assert float(one(rows, "slerp", "rating")["value"]) == scores["ratings"]["candidates"]["slerp"]["value"]
    assert one(rows, "slerp", "rating")["unit"] == "elo"
    equal = scores["ratings"]["candidates"]["slerp"]["score"]["value"]
    assert float(one(rows, "slerp", "win_at_equal_length")["value"]) == equal
    kept = scores["retention"]["slerp"]["harm"]
    assert float(one(rows, "slerp", "retention/harm")["value"]) == kept["value"]
    alike = scores["consistency"]["harm"]["base"]["value"]
    assert float(one(rows, "base", "consistency/harm", "")["value"]) == alike
    assert float(one(rows, "base", "length/general", "")["value"]) == scores["length"]["base"]["general"]
    alpha = one(rows, "", "alpha/harm", "ar")
    assert float(alpha["value"]) == scores["agreement"]["harm"]["languages"]["ar"]["value"]
    assert (alpha["kind"], alpha["unit"]) == ("", "alpha")
    assert float(one(rows, "", "alpha/harm", "")["value"]) == scores["agreement"]["harm"]["all"]["value"]


def test_harness_scores_say_whether_they_are_shares(rows: list[dict[str, str]]) -> None:
    assert one(rows, "base", "bench/xnli/acc", "")["unit"] == "fraction"
    perplexity = one(rows, "base", "bench/wiki/word_perplexity", "")
    assert (perplexity["unit"], float(perplexity["value"])) == ("number", 12.5)
    chrf = one(rows, "base", "bench/flores/chrf", "")
    assert (chrf["value"], chrf["low"], chrf["high"], chrf["n"]) == ("31.25", "", "", "40")


def test_an_end_that_is_open_is_empty_and_what_is_missing_has_no_row(judged: Study) -> None:
    ratings: dict[str, Any] = judged.scores["ratings"]
    unknown = {"value": None, "low": None, "high": None, "n": 0}
    changed = {
        "ties": ratings["candidates"]["ties"] | {"high": None},
        "slerp": ratings["candidates"]["slerp"] | unknown | {"score": unknown},
    }
    rows = flat.rows(judged.scores | {"ratings": ratings | {"candidates": changed}})
    found = {(row[0], row[3]): row for row in rows if row[3] in ("rating", "win_at_equal_length")}
    assert set(found) == {("ties", "rating"), ("ties", "win_at_equal_length")}
    assert found["ties", "rating"][8] == ""
    assert found["ties", "rating"][7] == ratings["candidates"]["ties"]["low"]


@pytest.mark.parametrize("left", ["general", "harmful", "harmless"])
def test_a_study_of_one_prompt_set_has_rows_of_what_is_there(simulated: Any, left: str) -> None:
    study = simulated(sets={left: left}, languages=["en", "ar"], limit={"dev": 0, "test": 4}, draws=50)
    metrics = {row[3] for row in flat.rows(study.scores)}
    axis = {"general": "win", "harmful": "harm", "harmless": "over_refusal"}[left]
    assert {axis, f"p_holm/{axis}", f"consistency/{axis}", "balance"} <= metrics
    assert not {metric for metric in metrics if metric.startswith(("corrected", "alpha", "bench"))}
