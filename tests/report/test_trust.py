"""The judges' block: what a judge measured of itself in any shape, what it decides, and every verdict counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.counts import verdict_counts
from mixmerge.report.judge_words import HARMFUL
from mixmerge.report.trust import JudgeBlock, in_order, judge_blocks

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


def blocks(study: Study, **changed: Any) -> dict[str, JudgeBlock]:
    return {b.name: b for b in judge_blocks(study.scores | changed, study.trust)}


def test_judges_of_a_recipe_have_words_by_their_kind_and_question(judged: Study) -> None:
    found = blocks(judged)
    assert {name: b.title for name, b in found.items()} == {
        "gpt.harm": "Is the answer harmful?",
        "refusal": "Refused or complied?",
        "gpt.quality": "Which answer is better?",
        "check": "Right by the prompt's own check?",
        "language": "In the language of the prompt?",
        "guard.harm": "Is the answer harmful?",
        "words.refusal": "Refused or complied?",
        "quality": "Nearer to the reference answer?",
    }
    assert "A model behind a server (big-model-2026)" in found["gpt.harm"].measures
    assert "once in each order" in found["gpt.quality"].measures
    assert "A guard model (small-guard) reads the request and the answer" in found["guard.harm"].measures
    assert "character n-grams" in found["words.refusal"].measures
    assert all(b.blind for b in found.values())
    assert any(text.startswith("The request:") for text in found["words.refusal"].blind)
    assert any("long answers" in text for text in found["gpt.quality"].blind)
    assert any("first 12,000 characters" in text for text in found["gpt.harm"].blind)


def test_judges_that_decide_a_metric_come_first_and_say_which(judged: Study) -> None:
    found = blocks(judged)
    assert list(found) == in_order(found, judged.scores)
    deciding = ["gpt.harm", "refusal", "gpt.quality", "check", "language"]
    assert list(found)[:5] == deciding
    assert found["gpt.harm"].decides == "It decides: Harm rate."
    assert found["refusal"].decides == "It decides: Over-refusal; Invalid."
    assert found["gpt.quality"].decides == "It decides: General quality: win rate against the base."
    assert found["check"].decides == "It decides: Benchmark: sums; Benchmark: letters."
    assert found["guard.harm"].decides.startswith("It decides no metric here: gpt.harm does, on the same question.")
    assert "Behind the numbers" in found["quality"].decides


def test_answers_without_a_verdict_are_counted_and_their_share_is_said(judged: Study) -> None:
    counts = judged.scores["counts"]

    def tally(verdict: str) -> int:
        return sum(each.get(f"gpt.harm: {verdict}", 0) for each in counts.values())

    everything = sum(n for each in counts.values() for key, n in each.items() if key.startswith("gpt.harm: "))
    (said,) = [text for text in blocks(judged)["gpt.harm"].counted if text.startswith("Of ")]
    assert said.startswith(f"Of {everything:,} answers, {tally('unparsed')} (")
    assert f"{tally('unanswered')} (" in said
    assert said.endswith("never came: left out of every share but Invalid.")
    assert blocks(judged)["guard.harm"].counted == []
    assert blocks(judged)["check"].counted == []  # its unparsed answers count as wrong


def test_how_often_both_orders_agree_is_counted_from_the_verdicts(judged: Study) -> None:
    rows = [row for (_, _, judge), found in judged.verdicts.items() if judge == "gpt.quality" for row in found]
    same = sum(not row["flipped"] for row in rows)
    assert judged.scores["orders"] == {"gpt.quality": {"pairs": len(rows), "same": same}}
    (said,) = blocks(judged)["gpt.quality"].counted
    assert said == f"Both orders gave the same verdict on {same} of {len(rows)} pairs ({100 * same / len(rows):.0f} %)."


def test_a_calibration_is_shown_by_language_and_says_what_it_corrects(judged: Study) -> None:
    found = blocks(judged)["gpt.harm"]
    assert found.held_out is not None
    assert list(found.held_out.heads) == ["Language", "Harm found", "Safe answers let pass"]
    right = judged.scores["calibrations"]["gpt.harm"]["languages"]["hi"]["harmful"]
    assert found.held_out.rows[1][0] == "Hindi"
    assert found.held_out.rows[1][1].startswith(f"{right['right']} of {right['rows']}\n[")
    assert found.measured_by == "360 rows in all, by mixmerge calibrate."
    assert (
        "Harm rate: corrected for its errors on 360 rows (labelled rows) under “Behind the numbers”." in found.counted
    )


def test_a_judge_that_nobody_calibrated_has_no_table_and_one_that_decides_nothing_may_have_one(judged: Study) -> None:
    assert blocks(judged)["guard.harm"].held_out is None
    calibrations = {"guard.harm": judged.scores["calibrations"]["gpt.harm"]}
    found = blocks(judged, calibrations=calibrations, corrected={})
    assert found["guard.harm"].held_out is not None
    assert found["guard.harm"].counted == []
    assert found["gpt.harm"].held_out is None


def test_harmful_means_complied_only_where_a_judge_of_refusals_decides_harm(
    study: Study, judged: Study, simulated: Any, panel: Any
) -> None:
    assert HARMFUL in blocks(study)["refusal"].blind
    assert not [name for name, b in blocks(judged).items() if HARMFUL in b.blind]
    other = panel(simulated(languages=["en"], limit={"dev": 1, "test": 3}, draws=50), decide={"harm": "words.refusal"})
    assert [name for name, b in blocks(other).items() if HARMFUL in b.blind] == ["words.refusal"]
    assert blocks(other)["words.refusal"].decides == "It decides: Harm rate."


def test_rows_of_others_stand_in_a_table_of_their_own_with_what_is_to_be_known_of_them(judged: Study) -> None:
    found = blocks(judged)["refusal"]
    assert found.elsewhere is not None
    assert found.elsewhere.rows[0][0] == "English"
    assert found.elsewhere.rows[0][1].startswith("143 of 150\n[90.7, 97.7]")
    assert {row[0]: row[1] for row in found.elsewhere.rows}["Hindi"] == "–"
    assert "There are no Hindi refusals" in found.caveat
    assert [grid.caption for grid in found.grids] == ["Unheard of"]


def test_a_fitted_classifier_shows_its_cross_validation(judged: Study) -> None:
    found = blocks(judged)["words.refusal"].held_out
    assert found is not None
    assert list(found.heads) == ["Language", "Accuracy", "Refusals found", "Answers let pass"]
    assert list(found.rows[0]) == ["English", "91.0 %", "180 of 200", "184 of 200"]
    assert list(found.rows[-1]) == ["All", "91.0 %", "180 of 200", "184 of 200"]


@pytest.mark.parametrize(
    ("told", "measures"),
    [
        ({"kind": "endpoint", "model": "m", "guard": {"name": "llama-guard"}, "longest": 9}, "A guard behind a server (m)"),
        ({"kind": "classifier", "model": "toxic", "model_type": "bert", "reads": "pair", "max_tokens": 512}, "reads the request and the answer"),
        ({"kind": "classifier", "model": "toxic", "model_type": "bert", "reads": "A: {response}"}, "reads the answer alone"),
        ({"kind": "classifier", "model": "p.joblib", "model_type": "scikit-learn pipeline", "reads": "response"}, "A scikit-learn pipeline (p.joblib)"),
    ],
)  # fmt: skip
def test_each_kind_of_judge_says_what_it_reads(judged: Study, told: dict[str, Any], measures: str) -> None:
    (found,) = [b for b in judge_blocks(judged.scores, {"gpt.harm": told}) if b.name == "gpt.harm"]
    assert measures in found.measures
    assert found.title == "Is the answer harmful?"


def test_a_check_of_pairs_is_not_called_nearness_to_a_reference(study: Study) -> None:
    told = {"name": "quality", "kind": "reference", "check": "number", "compares": "with the opponent's answer"}
    (found,) = [b for b in judge_blocks(study.scores, {"quality": told}) if b.name == "quality"]
    assert found.title == "Right where the base is wrong?"
