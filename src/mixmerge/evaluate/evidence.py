"""What the scores rest on: tests against the base, ratings, the judges' agreement, and rates corrected for a judge's errors.

Everything here takes verdicts and tables and gives plain JSON; the statistics are those of `mixmerge.stats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite, log
from typing import Any

import numpy as np

from mixmerge.evaluate.answer import FLIPS, balance_of, in_common, paired
from mixmerge.evaluate.calibrate import correct
from mixmerge.evaluate.judge import NO_VERDICT
from mixmerge.evaluate.metrics import METRICS, Table, Verdicts, judge_of, question_of, row_values, verdict_as
from mixmerge.stats.agreement import alpha_estimate, encode
from mixmerge.stats.paired import Estimate, bootstrap_means, student_interval
from mixmerge.stats.permutation import compare
from mixmerge.stats.ratings import against_base, rate

ELO = 400 / log(10)  # Elo points in a logit
# The verdict whose share each metric is, and the question it is a share of.
POSITIVE = {"harm": "harmful", "over_refusal": "refused"}


def tests(axes: Mapping[str, Table], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Each candidate's difference from the base, by axis and on their mean, with p-values by Holm over the candidates.

    Both have verdicts on the prompts that count; the interval (low, high) is that of the one difference, from draws of the
    same prompts.
    """
    names, level = [entry["name"] for entry in spec["candidates"]], spec["statistics"]["level"]
    base, found = names.index("base"), {}
    drawn_on = {axis: paired(table, range(len(names)), base)[1] for axis, table in axes.items() if len(names) > 1}
    groups = {"balance": list(axes)} | {axis: [axis] for axis in axes}
    for key, group in groups.items() if axes and len(names) > 1 else ():
        measured = [axes[axis].values for axis in group]
        done = compare(measured, against=base, flips=FLIPS, seed=spec["seed"], purpose=f"tests {key}")
        drawn = balance_of([drawn_on[axis] for axis in group])
        fewest = np.min([in_common(axes[axis], base) for axis in group], axis=0)
        candidates = {}
        for i, name in enumerate(names):
            if isfinite(done.p[i]):
                value = float(done.difference[i])
                low, high = student_interval(value, drawn[:, i], level, int(fewest[i]))
                told = {"p": float(done.p[i]), "adjusted": float(done.adjusted[i]), "clusters": int(done.clusters[i])}
                candidates[name] = {"difference": value, "low": low, "high": high} | told
        found[key] = {"exact": done.exact, "candidates": candidates}
    return {"against": "base", "axes": found} if found else {}


def ratings(win: Table | None, spec: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    """Bradley-Terry ratings in Elo points above the base, and the win rate that is left at equal length."""
    names, metric = [entry["name"] for entry in spec["candidates"]], METRICS["win"]
    sets, base = metric.sets(spec), names.index("base")
    if win is None or len(names) < 2:
        return {}

    def length(row: Mapping[str, Any]) -> float:
        return float(row.get("characters", "nan"))

    lengths = row_values("test", "language", sets, spec, verdicts, length)
    if lengths is not None and lengths.shape != win.values.shape:
        lengths = None
    done = rate(
        against_base(win.values, base, lengths),
        candidates=len(names),
        base=base,
        draws=spec["statistics"]["draws"],
        level=spec["statistics"]["level"],
        seed=spec["seed"],
        purpose=f"test {sets}",
    )
    rated = {
        name: _scaled(found.lead, ELO) | {"problem": found.problem, "score": _scaled(found.score)}
        for name, found in zip(names, done.candidates, strict=True)
        if name != "base"
    }
    length_taste = None if done.length is None else _scaled(done.length, ELO)
    return {
        "candidates": rated,
        "ties": _scaled(done.ties),
        "length": length_taste,
        "length_problem": done.length_problem,
    }


def _scaled(found: Estimate, by: float = 1.0) -> dict[str, Any]:
    """An estimate as JSON; an end that is infinite or unknown is None."""
    ends = {key: value * by if isfinite(value) else None for key, value in asdict(found).items() if key != "n"}
    return ends | {"n": found.n}


def agreement(spec: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    """Krippendorff's alpha of the judges that answer one question, by language: {question: {judges, languages, all}}.

    A unit is one candidate's answer to one prompt; answers to a prompt and its translations are one cluster.
    """
    judges: dict[str, list[str]] = {}
    for judge in dict.fromkeys(judge for _, _, judge in verdicts):
        question = "correct" if judge == "check" else question_of(spec, judge)
        for asked in (question, "harm") if question == "refusal" else (question,):
            judges.setdefault(asked, []).append(judge)
    out = {}
    for question, names in judges.items():
        asked_alone = question == "harm" and not any(question_of(spec, judge) == "harm" for judge in names)
        if len(names) > 1 and not asked_alone:
            out[question] = _alphas(question, names, spec, verdicts)
    return out


def _alphas(question: str, judges: Sequence[str], spec: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    said: dict[tuple[str, str], dict[str, str]] = {}
    language: dict[tuple[str, str], tuple[str, str]] = {}
    for (candidate, name, judge), rows in verdicts.items():
        if judge not in judges or (question == "harm" and spec["prompt_sets"][name] != "harmful"):
            continue
        for row in rows:
            unit = candidate, row["prompt_id"]
            language[unit] = row["lang"], f"{row['set']}/{row['pid']}"
            if row["verdict"] not in NO_VERDICT:
                said.setdefault(unit, {})[judge] = verdict_as(row["verdict"], question_of(spec, judge), question)

    def alpha(units: Iterable[tuple[str, str]]) -> dict[str, Any] | None:
        there = [unit for unit in units if unit in said]
        if not there:
            return None
        codes = encode([[said[unit].get(judge) for unit in there] for judge in judges])
        statistics = spec["statistics"]
        found = alpha_estimate(
            codes,
            [language[unit][1] for unit in there],
            draws=statistics["draws"],
            level=statistics["level"],
            seed=spec["seed"],
        )
        return None if found is None else asdict(found)

    by_language = {code: alpha(u for u in said if language[u][0] == code) for code in spec["languages"]}
    return {"judges": list(judges), "languages": by_language, "all": alpha(said)}


def _broken(row: Mapping[str, Any]) -> float:
    """1 for broken text, 0 for what the judge decided; where it gave no verdict the answer is in no share."""
    return float("nan") if row["verdict"] in NO_VERDICT else float(row["verdict"] == "invalid")


def corrected(
    measured: Mapping[str, Table], spec: Mapping[str, Any], verdicts: Verdicts, calibrations: Mapping[str, Any]
) -> dict[str, Any]:
    """Harm and over-refusal on test prompts, raw beside corrected, where the deciding judge's errors were measured.

    calibrations: judge -> what `calibrate` wrote, of verdicts on the judge's own question.
    """
    names, out = [entry["name"] for entry in spec["candidates"]], {}
    for key, positive in POSITIVE.items():
        metric = METRICS[key]
        judge = judge_of(spec, metric.question)
        if key not in measured or judge not in calibrations:
            continue
        calibration = calibrations[judge]
        if calibration["question"] == "refusal" and positive == "harmful":
            positive = "complied"
        sets = metric.sets(spec)
        broken = row_values("test", judge, sets, spec, verdicts, _broken)
        undecided = None
        if broken is not None:
            statistics = spec["statistics"]
            drawn = bootstrap_means(broken, draws=statistics["draws"], seed=spec["seed"], purpose=f"test {sets}")
            undecided = broken, drawn
        found = correct(
            measured[key].values,
            measured[key].drawn,
            calibration,
            candidates=names,
            languages=spec["languages"],
            positive=positive,
            level=spec["statistics"]["level"],
            seed=spec["seed"],
            undecided=undecided,
            common=measured[key].common,
        )
        told = {
            "judge": judge,
            "measured_on": calibration.get("measured_on", "labelled rows"),
            "rows": calibration["rows"],
        }
        out[key] = told | {"rates": found.candidates, "uncorrected": dict(found.uncorrected)}
    return out


def measured_errors(calibrations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many labelled rows of each word every measured judge got right, by language, for a report.

    {judge: {question, measured_on, rows, languages: {code: {word: {right, rows[, low, high]}}}}}; the intervals are those
    that the judge was measured with.
    """

    def told(found: Mapping[str, Any]) -> dict[str, Any]:
        share = found.get("share") or {}
        ends = {key: share[key] for key in ("low", "high") if key in share}
        return {"right": found["right"], "rows": found["rows"]} | ends

    return {
        judge: {
            "question": each["question"],
            "measured_on": each.get("measured_on", "labelled rows"),
            "rows": each["rows"],
            "languages": {
                code: {word: told(found) for word, found in by_word["recall"].items()}
                for code, by_word in each["languages"].items()
            },
        }
        for judge, each in calibrations.items()
    }


def from_cross_validation(trust: Mapping[str, Any]) -> dict[str, Any]:
    """What the local refusal judge measured of itself while it was fitted, as a calibration."""

    def recall(found: Mapping[str, int]) -> dict[str, Any]:
        return {
            word: {"right": found[f"{word}_found"], "rows": found[word], "effective": found[word]}
            for word in ("refused", "complied")
        }

    return {
        "question": "refusal",
        "judge": {"name": "refusal"},
        "measured_on": "the rows that it was fitted on, by cross-validation over topics",
        "rows": trust["all"]["rows"],
        "languages": {code: {"recall": recall(found)} for code, found in trust["languages"].items()},
    }
