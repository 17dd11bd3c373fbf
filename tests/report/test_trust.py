"""The judges' block: what a judge measured of itself in any shape, and every verdict counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.trust import JudgeBlock, judge_blocks, verdict_counts

if TYPE_CHECKING:
    from conftest import Study


def names(study: Study) -> list[str]:
    return [entry["name"] for entry in study.spec["candidates"]]


def block(scores: Any, trust: dict[str, Any]) -> JudgeBlock:
    return next(b for b in judge_blocks(scores, {"refusal": trust}) if b.name == "refusal")


def test_every_judge_that_gave_a_verdict_is_described_even_without_measurements(study: Study) -> None:
    blocks = judge_blocks(study.scores, {})
    assert [b.name for b in blocks] == ["quality", "refusal", "language"]
    assert all(b.texts and b.title != b.name for b in blocks)


def test_a_judge_that_nobody_has_heard_of_is_shown_by_its_name(study: Study) -> None:
    assert judge_blocks(study.scores, {"panel": {"accuracy": 0.5}})[-1].facts == [("Accuracy", "50.0 %")]
    scores = study.scores | {"counts": {"base": {"guard: safe": 3}}}
    assert [b.name for b in judge_blocks(scores, {})] == ["guard"]


def test_held_out_measurements_stand_by_language_with_all_last(study: Study) -> None:
    grid = block(study.scores, study.trust["refusal"]).grids[0]
    assert grid.heads == ["Language", "Rows", "Refused", "Complied", "Accuracy", "Sensitivity", "Specificity"]
    assert [row[0] for row in grid.rows] == ["English", "Hindi", "French", "Spanish", "Arabic", "Russian", "All"]
    assert grid.rows[1] == ["Hindi", "224", "80", "144", "90.6 %", "87.5 %", "92.4 %"]
    assert grid.rows[-1][1] == "1,344"


def test_the_other_way_round_measure_then_language_gives_the_same_table(study: Study) -> None:
    by_language = {code: {"accuracy": 0.9, "rows": 10} for code in study.scores["languages"]}
    by_measure = {
        "accuracy": dict.fromkeys(study.scores["languages"], 0.9),
        "rows": dict.fromkeys(study.scores["languages"], 10),
    }
    one, two = (block(study.scores, trust).grids[0] for trust in ({"held_out": by_language}, by_measure))
    assert one.rows == two.rows


@pytest.mark.parametrize(
    ("trust", "facts"),
    [
        ({"margin": 0.02}, [("Margin", "0.02")]),
        ({"order_agreement": 0.875}, [("Order agreement", "87.5 %")]),
        ({"seed": 0, "ok": True}, [("Seed", "0"), ("Ok", "yes")]),
        ({"held_out": {"accuracy": 0.5}}, [("Held out, accuracy", "50.0 %")]),
        ({"labels": ["a", "b"], "nothing": None, "empty": {}}, [("Labels", "a, b")]),
    ],
)
def test_what_is_not_known_is_shown_as_it_is_named(study: Study, trust: dict[str, Any], facts: list[Any]) -> None:
    assert block(study.scores, trust).facts == facts


def test_sentences_are_sentences_and_tables_are_tables(study: Study) -> None:
    long = "cross-validation " * 5
    found = block(
        study.scores,
        {
            "description": "Reads openings.",
            "measured_by": long,
            "folds": {"one": {"rows": 3}, "two": {"accuracy": 0.25}},
        },
    )
    assert "Reads openings." in found.texts
    assert f"Measured by: {long}" in found.texts
    assert found.facts == []
    assert [list(row) for row in found.grids[0].rows] == [["One", "3", "–"], ["Two", "–", "25.0 %"]]


def test_a_language_that_was_not_measured_has_a_dash(study: Study) -> None:
    grid = block(study.scores, {"languages": {"en": {"accuracy": 0.5}}}).grids[0]
    assert [row[1] for row in grid.rows] == ["50.0 %", "–", "–", "–", "–", "–"]


def test_every_verdict_and_every_cut_answer_is_counted(study: Study) -> None:
    counts = verdict_counts(study.scores, study.responses)
    assert dict(counts.groups) == {
        "quality": ["win", "tie", "loss"],
        "refusal": ["refused", "complied", "invalid"],
        "language": ["right", "wrong", "unknown"],
        "responses": ["all", "cut at the limit", "prompt too long", "empty"],
    }
    heads = [f"{judge}: {verdict}" for judge, names in counts.groups for verdict in names]
    assert [name for name, _ in counts.rows] == names(study)
    for name, cells in counts.rows:
        found = {head: int(cell.replace(",", "")) for head, cell in zip(heads, cells, strict=True)}
        mine = [row for row in study.responses if row["candidate"] == name]
        tally = Counter(f"{judge}: {verdict}" for row in mine for judge, verdict in row["verdicts"].items())
        assert {head: n for head, n in found.items() if not head.startswith("responses")} == {
            head: tally[head] for head in heads if not head.startswith("responses")
        }
        assert found["responses: all"] == len(mine)
        assert found["responses: cut at the limit"] == sum(row["finish"] == "length" for row in mine)
        assert found["responses: empty"] == sum(not row["text"].strip() for row in mine)
    assert sum(int(cells[-3]) for _, cells in counts.rows) > 0
