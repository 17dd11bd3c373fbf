"""Judges measured on labelled rows: the refusal and reference judges, and judges whose error rates we set ourselves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import DataError
from mixmerge.evaluate.calibrate import calibrate, correct, read_calibration, rows_sha256, table, write_calibration
from mixmerge.evaluate.judge import Item, ReferenceJudge, Verdict
from mixmerge.evaluate.labelled import LabelledItem, labelled_item, read_labelled
from mixmerge.evaluate.refusal import RefusalJudge, fit_refusal, labelled_rows
from mixmerge.stats.paired import bootstrap_means

SAFETY = Path(__file__).parents[3] / "shared" / "data" / "safety"
STORED = ("safe", "harmful", "invalid", "unparsed", "unanswered")


class Guard:
    """A judge of harm that reads the truth off the response and errs at set rates, the same for the same response."""

    name = "guard"
    verdicts = STORED

    def __init__(self, sensitivity: float = 0.9, specificity: float = 0.95, unparsed: float = 0.0, **said: Any) -> None:
        self.right = {"harmful": sensitivity, "safe": specificity}
        self.unparsed, self.said, self.calls = unparsed, said, 0

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": "simulated", "note": "ours", "right": self.right} | self.said

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        self.calls += 1
        return [Verdict(item.prompt, self.name, self._verdict(item), None) for item in items]

    def _verdict(self, item: Item) -> str:
        chance = random.Random(f"{item.prompt.id} {item.response}")
        truth = item.response.split()[0]
        if truth not in self.right:
            return truth
        if chance.random() < self.unparsed:
            return "unparsed"
        return truth if chance.random() < self.right[truth] else {"safe": "harmful", "harmful": "safe"}[truth]


def harm_rows(lang: str, harmful: int, safe: int, answers: int = 1) -> list[LabelledItem]:
    return [
        labelled_item(
            question="harm", lang=lang, prompt=f"{i}?", response=f"{label} {i} {k}", label=label, pid=f"{label}-{i}-{k}",
        )
        for label, count in (("harmful", harmful), ("safe", safe))
        for i in range(count)
        for k in range(answers)
    ]  # fmt: skip


# Measuring


def test_counts_rates_and_intervals_are_told_by_language_and_over_all() -> None:
    rows = harm_rows("en", 300, 300) + harm_rows("hi", 100, 200)
    found = calibrate(Guard(), rows, draws=2000)
    assert (found["question"], found["words"], found["rows"]) == ("harm", ["harmful", "safe"], 900)
    assert list(found["languages"]) == ["en", "hi"]
    english = found["languages"]["en"]
    counts = english["counts"]
    assert counts["harmful"]["harmful"] + counts["harmful"]["safe"] == 300
    assert set(counts["safe"]) == set(STORED)
    assert english["sensitivity"]["value"] == counts["harmful"]["harmful"] / 300
    assert english["specificity"]["value"] == counts["safe"]["safe"] / 300
    assert english["accuracy"]["value"] == (counts["harmful"]["harmful"] + counts["safe"]["safe"]) / 600
    for name, true in (("sensitivity", 0.9), ("specificity", 0.95), ("accuracy", 0.925), ("kappa", 0.85)):
        assert english[name]["low"] < english[name]["value"] < english[name]["high"]
        assert english[name]["low"] - 0.02 <= true <= english[name]["high"] + 0.02
    assert found["all"]["rows"] == 900
    assert found["all"]["counts"]["harmful"]["safe"] == sum(
        each["counts"]["harmful"]["safe"] for each in found["languages"].values()
    )
    json.dumps(found, allow_nan=False)


def test_what_is_no_decision_is_counted_left_out_of_the_rates_and_wrong_for_accuracy_and_kappa() -> None:
    sure = harm_rows("en", 40, 40)
    odd = [
        labelled_item(question="harm", lang="en", prompt="x?", response=f"{verdict} x", label=label, pid=f"{verdict}{label}")
        for verdict in ("invalid", "unparsed", "unanswered")
        for label in ("harmful", "safe")
    ]  # fmt: skip
    found = calibrate(Guard(1, 1), sure + odd)["languages"]["en"]
    assert found["undecided"] == {"invalid": 2, "unparsed": 2, "unanswered": 2}
    assert found["counts"]["harmful"] == {"safe": 0, "harmful": 40, "invalid": 1, "unparsed": 1, "unanswered": 1}
    assert (found["sensitivity"]["value"], found["sensitivity"]["n"]) == (1.0, 40)
    assert found["accuracy"]["value"] == 80 / 86
    assert found["kappa"]["value"] < 1 == calibrate(Guard(1, 1), sure)["all"]["kappa"]["value"]


def test_a_language_with_one_label_alone_has_no_rate_of_the_other() -> None:
    found = calibrate(Guard(1, 1), harm_rows("ru", 0, 30))["languages"]["ru"]
    assert (found["sensitivity"], found["kappa"]) == (None, None)
    assert found["specificity"]["value"] == 1.0
    assert found["recall"]["harmful"]["rows"] == 0


def test_answers_to_one_prompt_count_as_far_as_they_differ() -> None:
    found = calibrate(Guard(0.7, 0.7), harm_rows("en", 50, 50, answers=4))["all"]
    assert (found["rows"], found["groups"]) == (400, 50)
    assert 50 <= found["recall"]["harmful"]["effective"] <= 200


def test_labels_of_another_question_are_refused_and_the_row_is_named() -> None:
    row = labelled_item(
        question="refusal", lang="en", prompt="?", response="r", label="refused", pid="1", where="f.csv:1"
    )
    with pytest.raises(DataError, match=r"f\.csv:1: the label 'refused' is no verdict of the judge 'guard'"):
        calibrate(Guard(), [row])
    with pytest.raises(DataError, match=r"guard: no labelled rows"):
        calibrate(Guard(), [])


def test_a_judge_that_loses_an_item_is_not_believed() -> None:
    class Forgetful(Guard):
        def judge(self, items: Sequence[Item]) -> list[Verdict]:
            return super().judge(items)[1:]

    with pytest.raises(ValueError, match=r"'guard' did not give one verdict an item, in order"):
        calibrate(Forgetful(), harm_rows("en", 2, 2))


def test_progress_begins_at_nothing_and_ends_with_all() -> None:
    seen: list[tuple[int, int]] = []
    judge = Guard()
    calibrate(judge, harm_rows("en", 400, 400), draws=100, progress=lambda done, total: seen.append((done, total)))
    assert (seen[0], seen[-1]) == ((0, 800), (800, 800))
    assert seen == sorted(seen)
    assert judge.calls == len(seen) - 1 == 2


def test_the_hash_of_the_rows_follows_labels_and_texts_and_not_the_file() -> None:
    rows = harm_rows("en", 2, 2)
    moved = [
        labelled_item(
            question="harm", lang="en", prompt=r.item.prompt.text, response=r.item.response, label=r.label,
            pid=r.item.prompt.pid, where="elsewhere.csv:9",
        )
        for r in rows
    ]  # fmt: skip
    assert rows_sha256(rows) == rows_sha256(moved)
    assert len({rows_sha256(some) for some in (rows, rows[:3], harm_rows("fr", 2, 2))}) == 3


# Pairs


def pair(reference: str, mine: str, theirs: str, label: str, pid: str) -> LabelledItem:
    return labelled_item(
        question="quality", lang="en", prompt=f"{pid}?", response=mine, opponent=theirs, references=[reference], label=label,
        pid=pid,
    )  # fmt: skip


def test_the_reference_judge_is_measured_on_labelled_pairs() -> None:
    near, far = "Ice floats because it is less dense than water.", "Bread rises because yeast makes gas."
    truth = "Ice floats because it is less dense than liquid water."
    rows = [pair(truth, near, far, "win", f"w{i}") for i in range(6)]
    rows += [pair(truth, far, near, "loss", f"l{i}") for i in range(6)]
    rows += [pair(truth, near, near, "tie", f"t{i}") for i in range(4)]
    rows += [pair(truth, far, near, "win", "wrong"), pair(truth, near, near, "win", "a tie to the judge")]
    found = calibrate(ReferenceJudge(), rows)["all"]
    assert found["counts"]["win"] == {"win": 6, "loss": 1, "tie": 1}
    assert found["accuracy"]["value"] == 16 / 18
    assert found["recall"]["tie"]["share"]["value"] == 1.0
    assert (found["without_ties"]["value"], found["without_ties"]["n"]) == (12 / 13, 13)
    assert found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"]
    assert "sensitivity" not in found
    assert "same_in_both_orders" not in found


def test_a_judge_that_tells_of_flips_has_its_constancy_measured() -> None:
    class Turning:
        name = "turning"
        verdicts = ("win", "loss", "tie", "unparsed", "unanswered")

        def describe(self) -> dict[str, Any]:
            return {"name": self.name}

        def judge(self, items: Sequence[Item]) -> list[Verdict]:
            return [
                Verdict(item.prompt, self.name, "tie" if i % 4 == 0 else "win", None, {"flipped": i % 4 == 0})
                for i, item in enumerate(items)
            ]

    found = calibrate(Turning(), [pair("", "a", "b", "win", str(i)) for i in range(40)])["all"]
    assert (found["same_in_both_orders"]["value"], found["same_in_both_orders"]["n"]) == (0.75, 40)


# On disk


def test_a_calibration_is_written_whole_and_read_back_for_the_same_judge(tmp_path: Path) -> None:
    found = calibrate(Guard(note="first"), harm_rows("en", 20, 20), draws=200)
    write_calibration(found, tmp_path / "calibration.json")
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]
    assert read_calibration(tmp_path / "calibration.json") == found
    assert read_calibration(tmp_path / "calibration.json", Guard(note="said anew", trust={"x": 1})) == found


def test_another_judge_is_refused_and_what_differs_is_said(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(calibrate(Guard(model="a-8b", rubric={"sha256": "1f"}), harm_rows("en", 9, 9), draws=200), path)
    other = Guard(model="b-8b", rubric={"sha256": "2e"}, seed=1)
    with pytest.raises(DataError) as caught:
        read_calibration(path, other)
    assert str(caught.value) == (
        f"{path}: calibrates another judge than 'guard': model 'a-8b' -> 'b-8b'; rubric.sha256 '1f' -> '2e'; "
        "seed nothing -> 1; measure the judge again: `mixmerge calibrate`"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"version": 99}', '{"version": 1, "question": "taste"}', "\udcff"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"calibration\.json: .*calibrat.*; measure the judge again"):
        read_calibration(path)
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        read_calibration(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(rows=-5), r"measured on -5 rows"),
        (lambda found: found.update(rows="9"), r"measured on '9' rows"),
        (lambda found: found["languages"]["en"]["recall"]["safe"].update(right=-1), r"en, safe: -1 right of 9 rows"),
        (lambda found: found["languages"]["en"]["recall"]["harmful"].update(right=10), r"en, harmful: 10 right of 9"),
        (lambda found: found["languages"]["en"]["recall"]["safe"].update(rows=True), r"right of True rows"),
        (lambda found: found["languages"]["en"]["recall"]["safe"].update(effective=-2.0), r"worth -2\.0"),
        (lambda found: found["languages"]["en"]["recall"]["safe"].update(effective=float("nan")), r"worth nan"),
        (lambda found: found["languages"]["en"]["recall"]["safe"].update(effective=9.5), r"worth 9\.5"),
        (lambda found: found["languages"]["en"]["recall"].pop("safe"), r"KeyError: 'safe'"),
        (lambda found: found.update(languages=[]), r"AttributeError"),
    ],
)
def test_counts_that_nobody_can_have_measured_are_damage(tmp_path: Path, change, message) -> None:
    found = calibrate(Guard(), harm_rows("en", 9, 9), draws=200)
    change(found)
    (tmp_path / "c.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(DataError, match=rf"c\.json: a damaged calibration: .*{message}.*; measure the judge again"):
        read_calibration(tmp_path / "c.json")


# Correcting


def judged_shares(true: float, languages: list[str], judge: Guard, prompts: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Harm verdicts of two candidates with a known share of harmful responses: truth and judged values (2, L, P)."""
    rng = np.random.default_rng(0)
    truth = rng.random((2, len(languages), prompts)) < np.array([true, true / 2])[:, None, None]
    values = np.zeros(truth.shape)
    for c, i, p in np.ndindex(*truth.shape):
        word = "harmful" if truth[c, i, p] else "safe"
        row = labelled_item(
            question="harm", lang=languages[i], prompt=f"{p}?", response=f"{word} {c}", label=word, pid=str(p)
        )
        values[c, i, p] = judge.judge([row.item])[0].verdict == "harmful"
    return truth.astype(float), values


def rates(values: np.ndarray, found: dict[str, Any], languages: list[str], **more: Any) -> Any:
    drawn = bootstrap_means(values, draws=1000, seed=0, purpose="harm")
    settings = {"positive": "harmful", "level": 0.95, "seed": 0} | more
    return correct(values, drawn, found, candidates=["base", "merge"], languages=languages, **settings)


def test_corrected_rates_stand_beside_raw_ones_and_hold_the_truth() -> None:
    languages, judge = ["en", "hi", "fr"], Guard(0.8, 0.85)
    truth, values = judged_shares(0.3, languages, judge)
    found = calibrate(judge, [row for lang in languages for row in harm_rows(lang, 150, 150)], draws=200)
    corrected = rates(values, found, languages)
    macro = corrected.candidates["merge"]["macro"]
    assert macro["raw"]["value"] == pytest.approx(values[1].mean())
    assert abs(macro["corrected"]["value"] - truth[1].mean()) < abs(macro["raw"]["value"] - truth[1].mean())
    assert macro["raw"]["low"] > truth[1].mean()
    assert macro["corrected"]["low"] <= truth[1].mean() <= macro["corrected"]["high"]
    assert macro["corrected"]["high"] - macro["corrected"]["low"] > macro["raw"]["high"] - macro["raw"]["low"]
    assert set(corrected.candidates["base"]["languages"]) == set(languages)
    assert (corrected.values.shape, corrected.drawn.shape) == ((2, 3), (1000, 2, 3))
    json.dumps(corrected.candidates, allow_nan=False)


def test_a_language_without_calibration_keeps_its_raw_rate_and_the_mean_is_not_corrected_unless_pooled() -> None:
    languages, judge = ["en", "hi"], Guard(0.8, 0.85)
    _, values = judged_shares(0.3, languages, judge, prompts=60)
    found = calibrate(judge, harm_rows("en", 150, 150), draws=200)
    corrected = rates(values, found, languages)
    assert corrected.uncorrected == {"hi": "no calibration rows"}
    base = corrected.candidates["base"]
    assert base["languages"]["hi"]["corrected"] is None
    assert base["languages"]["hi"]["raw"]["value"] == values[0, 1].mean()
    assert base["languages"]["en"]["corrected"] is not None
    assert base["macro"]["corrected"] is None
    pooled = rates(values, found, languages, pool=True)
    assert (pooled.uncorrected, pooled.pooled) == ({}, ("hi",))
    assert pooled.candidates["base"]["macro"]["corrected"] is not None


def test_broken_texts_are_told_apart_from_texts_that_were_judged_safe() -> None:
    languages, judge = ["en"], Guard(0.8, 0.85)
    found = calibrate(judge, harm_rows("en", 150, 150), draws=200)
    values = np.concatenate([np.ones((2, 1, 20)), np.zeros((2, 1, 80))], axis=2)
    broken = np.zeros_like(values)
    broken[1, 0, 60:] = 1
    told = rates(
        values, found, languages, undecided=(broken, bootstrap_means(broken, draws=1000, seed=0, purpose="harm"))
    )
    base, merge = (told.candidates[name]["macro"]["corrected"]["value"] for name in ("base", "merge"))
    assert merge > base
    assert base == rates(values, found, languages).candidates["base"]["macro"]["corrected"]["value"]


def test_a_candidate_without_values_in_a_language_is_not_given_any() -> None:
    languages, judge = ["en", "hi"], Guard()
    _, values = judged_shares(0.3, languages, judge, prompts=30)
    values[1, 1] = np.nan
    found = calibrate(judge, harm_rows("en", 60, 60) + harm_rows("hi", 60, 60), draws=200)
    merge = rates(values, found, languages).candidates["merge"]
    assert list(merge["languages"]) == ["en"]
    assert merge["macro"] == merge["languages"]["en"]


def test_shares_of_pairs_and_of_unknown_words_are_not_corrected() -> None:
    found = calibrate(Guard(), harm_rows("en", 9, 9), draws=200)
    with pytest.raises(ValueError, match=r"shares of 'complied' cannot be corrected by a calibration of harmful, safe"):
        rates(np.zeros((2, 1, 4)), found, ["en"], positive="complied")
    with pytest.raises(ValueError, match=r"shares of 'win' cannot be corrected"):
        rates(np.zeros((2, 1, 4)), found | {"question": "quality"}, ["en"], positive="win")


# For people


def test_the_table_has_a_row_a_language_and_says_what_was_not_decided() -> None:
    heads, rows = table(calibrate(Guard(unparsed=0.2), harm_rows("en", 50, 50) + harm_rows("ru", 0, 10), draws=200))
    assert heads == [
        "language", "rows (harmful / safe)", "accuracy", "sensitivity (harmful)", "specificity (safe)", "kappa",
        "not decided",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["en", "ru", "all"]
    assert all(len(row) == len(heads) for row in rows)
    assert rows[0][1] == "50 / 50"
    assert rows[0][-1].endswith(" unparsed")
    assert rows[1][3] == "-"
    value, low, high = (float(part.strip("[],")) for part in rows[0][3].split())
    assert low < value < high <= 100


def test_the_table_of_pairs_has_each_word_found() -> None:
    heads, rows = table(calibrate(ReferenceJudge(), [pair("ab cd", "ab cd", "xy", "win", str(i)) for i in range(5)]))
    assert heads[3:6] == ["win found", "loss found", "tie found"]
    assert rows[0][3:6] == ["100.0 [56.6, 100.0]", "-", "-"]


# The refusal judge on rows that others labelled


def test_the_refusal_judge_is_measured_on_answers_of_other_models(tmp_path: Path) -> None:
    if not SAFETY.is_dir():
        pytest.skip("the shared safety data are not beside this checkout")
    rows = []
    for lang in ("en", "fr"):
        general, safety = (
            list(read_records(DataSource(path=f"starter:train/{name}.{{lang}}.jsonl"), lang, Path()))
            for name in ("general", "safety")
        )
        rows += labelled_rows(general[:4], safety[:16], lang=lang)
    fit_refusal(rows, tmp_path / "judge", seed=0)

    def polyrefuse(name: str, column: str, label: int) -> list[dict[str, Any]]:
        found = [record for _, record in read_records(DataSource(path=str(SAFETY / name)), None, Path())]
        return [
            {"pid": r["pid"], "lang": r["lang"], "prompt": r["prompt"], "response": r[column], "label": label}
            for lang in ("en", "fr")
            for r in [r for r in found if r["lang"] == lang and r["source"] == "mainlp/Multilingual-Refusal"][:15]
        ]

    out = tmp_path / "rows.jsonl"
    made = polyrefuse("sft_train.jsonl", "response", 1) + polyrefuse("dpo_train.jsonl", "rejected", 0)
    out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    judge = RefusalJudge.load(tmp_path / "judge")
    labelled = read_labelled(str(out), question="refusal", labels={1: "refused", 0: "complied"})
    found = calibrate(judge, labelled)
    for lang in ("en", "fr"):
        assert found["languages"][lang]["rows"] == 30
        assert found["languages"][lang]["accuracy"]["value"] >= 0.8
        assert found["languages"][lang]["kappa"]["low"] > 0.3
    write_calibration(found, tmp_path / "calibration.json")
    assert read_calibration(tmp_path / "calibration.json", judge)["rows_sha256"] == rows_sha256(labelled)
