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
    assert [b.name for b in blocks] == ["refusal", "quality", "language"]
    assert all(b.measures and b.blind and b.title != b.name for b in blocks)


def test_a_judge_that_nobody_has_heard_of_is_shown_by_its_name(study: Study) -> None:
    assert judge_blocks(study.scores, {"panel": {"accuracy": 0.5}})[-1].facts == [("Accuracy", "50.0 %")]
    scores = study.scores | {"counts": {"base": {"guard: safe": 3}}}
    assert [b.name for b in judge_blocks(scores, {})] == ["guard"]


def test_held_out_measurements_stand_by_language_with_all_last(study: Study) -> None:
    found = block(study.scores, study.trust["refusal"])
    grid = found.held_out
    assert grid is not None
    assert grid.heads == ["Language", "Accuracy", "Refusals found", "Answers let pass"]
    assert [row[0] for row in grid.rows] == ["English", "Hindi", "French", "Spanish", "Arabic", "Russian", "All"]
    assert grid.rows[1] == ["Hindi", "90.6 %", "87.5 %", "92.4 %"]
    assert found.measured_by == "5-fold cross-validation over 104 topics, a topic in all languages held out at once."


def test_counts_stand_instead_of_rates_where_there_are_any(study: Study) -> None:
    counted = {"refused": 80, "refused_found": 79, "complied": 144, "complied_found": 144}
    rates = {"rows": 224, "accuracy": 0.9955, "sensitivity": 0.9875, "specificity": 1.0}
    grid = block(study.scores, {"languages": {"en": counted | rates}, "all": counted | rates}).held_out
    assert grid is not None
    assert grid.rows[0] == ["English", "99.6 %", "79 of 80", "144 of 144"]
    assert grid.rows[-1] == ["All", "99.6 %", "79 of 80", "144 of 144"]
    assert grid.rows[1] == ["Hindi", "–", "–", "–"]


def test_the_other_way_round_measure_then_language_gives_the_same_table(study: Study) -> None:
    by_language = {code: {"accuracy": 0.9, "rows": 10} for code in study.scores["languages"]}
    by_measure = {
        "accuracy": dict.fromkeys(study.scores["languages"], 0.9),
        "rows": dict.fromkeys(study.scores["languages"], 10),
    }
    one, two = (block(study.scores, trust).held_out for trust in ({"held_out": by_language}, by_measure))
    assert one is not None
    assert one == two


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
            "model_sha256": "0" * 64,
            "folds": {"one": {"rows": 3}, "two": {"accuracy": 0.25}},
        },
    )
    assert "Reads openings." in found.texts
    assert found.measured_by == f"C{long.strip()[1:]}."
    assert found.facts == [("Model sha256", "0" * 64)]
    assert [list(row) for row in found.grids[0].rows] == [["One", "3", "–"], ["Two", "–", "25.0 %"]]


def test_a_language_that_was_not_measured_has_a_dash(study: Study) -> None:
    grid = block(study.scores, {"languages": {"en": {"accuracy": 0.5}}}).held_out
    assert grid is not None
    assert [row[1] for row in grid.rows] == ["50.0 %", "–", "–", "–", "–", "–"]


def test_every_verdict_and_every_cut_answer_is_counted(study: Study) -> None:
    counts = verdict_counts(study.scores, study.responses, study.prompts)
    assert dict(counts.groups) == {
        "quality": ["win", "tie", "loss"],
        "refusal": ["refused", "complied", "invalid"],
        "language": ["right", "wrong", "unknown"],
        "responses": ["all", "cut at the limit", "prompt too long", "empty", "repeat the prompt"],
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
    assert sum(int(cells[-4]) for _, cells in counts.rows) > 0


def test_answers_that_only_repeat_the_prompt_are_counted_and_said(study: Study) -> None:
    texts = {entry["prompt"].id: entry["prompt"].text for entry in study.prompts}
    echoed = [
        row | {"text": f"{texts[row['prompt_id']].upper()}\nNo."} if row["candidate"] == "base" else row
        for row in study.responses
    ]
    counts = verdict_counts(study.scores, echoed, study.prompts)
    everything = len(study.prompts)
    assert counts.echoes == f"{everything} of {everything} answers of base open with the prompt itself."
    assert dict(counts.rows)["base"][-1] == str(everything)
    assert dict(counts.rows)["ties"][-1] == "0"
    assert verdict_counts(study.scores, study.responses, study.prompts).echoes == ""


def test_no_key_is_shown_twice_and_a_known_judges_note_is_said_in_our_words(study: Study) -> None:
    found = block(study.scores, study.trust["refusal"] | {"note": '"harmful" means something', "kind": "classifier"})
    assert found.texts == []
    assert [name for name, _ in found.facts] == ["Seed", "Kind"]
    assert block(study.scores, {"caveat": "short text is unknown"}).texts == ["Short text is unknown."]
