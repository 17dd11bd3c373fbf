"""What stands beside the metrics: what a merge keeps of its experts, how alike a candidate answers in every language, lengths.

All from the values behind the metrics and their bootstrap draws, so intervals are paired as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mixmerge.evaluate.answer import macro
from mixmerge.evaluate.metrics import AXES, NO_VALUE, Table, Verdicts, judge_of, question_of, row_values, verdict_as
from mixmerge.stats.paired import Array, bootstrap_means, clusters_in, estimate, ratio_interval


def retention(
    axes: Mapping[str, Table], candidates: Sequence[Mapping[str, Any]], level: float
) -> dict[str, dict[str, Any]]:
    """Of each merge and axis: its share of what the best of the candidates that it is made from reaches there.

    1 is as good as the best of them; more is better than any. {merge: {axis: {value, low, high, of}}}; the base is no
    ingredient. An axis on which the best ingredient has 0 has no retention.
    """
    names = [entry["name"] for entry in candidates]
    out: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(candidates):
        parts = [names.index(name) for name in entry["made_from"] if name in names and name != "base"]
        if entry["kind"] != "merge" or not parts:
            continue
        out[entry["name"]] = {}
        for axis, table in axes.items():
            mean, drawn = macro(table)
            best = max(parts, key=lambda part: mean[part])
            if not mean[best] > 0:
                continue
            low, high = ratio_interval(drawn[:, index], drawn[:, best], level, clusters_in(table.values))
            found = {"value": float(mean[index] / mean[best]), "low": low, "high": high if np.isfinite(high) else None}
            out[entry["name"]][axis] = found | {"of": names[best]}
    return out


def consistency(
    axes: Mapping[str, Table], names: Sequence[str], spec: Mapping[str, Any], verdicts: Verdicts
) -> dict[str, dict[str, Any]]:
    """Of each axis and candidate: how often two languages get the same verdict on the same intent (parallel prompts).

    The mean over prompts of the share of pairs of languages that agree; a prompt in one language says nothing. Verdicts are
    compared as words: a broken answer is not the same as a harmful one, though neither earns anything. The base has none on
    `win`, where it stands against itself.
    """
    statistics, out = spec["statistics"], {}
    for axis, table in axes.items():
        words = verdict_words(axis, spec, verdicts)
        if words is None:
            continue
        values = agreement_of_languages(np.where(np.isnan(table.values), np.nan, words))[:, None, :]
        if np.isnan(values).all():
            continue
        drawn = bootstrap_means(values, draws=statistics["draws"], seed=spec["seed"], purpose=f"consistency {axis}")
        out[axis] = {
            name: asdict(estimate(values[i], drawn[:, i], statistics["level"]))
            for i, name in enumerate(names)
            if not np.isnan(values[i]).all()
        }
    return out


def verdict_words(axis: str, spec: Mapping[str, Any], verdicts: Verdicts) -> Array | None:
    """Each test verdict of an axis as the number of its word, (C, L, P) as in the axis' table; NaN where there is none."""
    metric = AXES[axis]
    judge, number = judge_of(spec, metric.question), {word: float(i) for i, word in enumerate(metric.meaning)}

    def code(row: Mapping[str, Any]) -> float:
        word = verdict_as(row["verdict"], question_of(spec, judge), metric.question)
        return np.nan if word in NO_VALUE else number[word]

    return row_values("test", judge, metric.sets(spec), spec, verdicts, code)


def agreement_of_languages(values: Array) -> Array:
    """(C, L, P) -> (C, P): of each prompt, the share of pairs of languages with equal values; NaN for fewer than two.

    >>> agreement_of_languages(np.array([[[1.0, 1.0], [1.0, 0.0], [0.0, np.nan]]])).round(2).tolist()
    [[0.33, 0.0]]
    """
    first, second = np.triu_indices(values.shape[1], k=1)
    one, other = values[:, first], values[:, second]
    known = ~np.isnan(one) & ~np.isnan(other)
    with np.errstate(invalid="ignore"):
        return np.asarray(((one == other) & known).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan))


def lengths(spec: Mapping[str, Any], verdicts: Verdicts) -> dict[str, dict[str, float]]:
    """Mean length of each candidate's test answers in characters, by purpose of the prompts: {candidate: {purpose: mean}}."""
    out: dict[str, dict[str, float]] = {}
    for entry in spec["candidates"]:
        found: dict[str, list[int]] = {}
        for name, purpose in spec["prompt_sets"].items():
            rows = verdicts.get((entry["name"], name, "language"), ())
            counts = [row["characters"] for row in rows if row["split"] == "test" and "characters" in row]
            found.setdefault(purpose, []).extend(counts)
        means = {purpose: round(sum(counts) / len(counts), 1) for purpose, counts in found.items() if counts}
        if means:
            out[entry["name"]] = means
    return out
