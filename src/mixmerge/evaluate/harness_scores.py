"""What lm-evaluation-harness measured of every candidate, as scores beside the metrics: paired where documents have scores.

A document in all candidates is one cluster, so intervals come from the same kind of draws as everywhere else; where the
harness has only a number and its standard error (a pooled or corpus-wide metric), the interval is normal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np
from scipy import stats

from mixmerge.evaluate.harness_results import Score, scores
from mixmerge.stats.paired import Array, bootstrap_means, estimate, student_interval

Result = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]  # of `read_harness`


def harness_scores(spec: Mapping[str, Any], found: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Any]]:
    """Every score of the harness by its key, `bench/<task>/<metric>`: {name, better, share, candidates: {candidate: estimate}}.

    found: candidate -> the results of its harness steps. `share`: all values are in 0..1; `better`: higher, lower or None.
    """
    names = [entry["name"] for entry in spec["candidates"]]
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        for result, _ in found.get(name, ()):
            for key, (shown, score) in scores(result).items():
                entry = out.setdefault(key, {"name": shown, "better": score.better, "scores": {}})
                entry["scores"][name] = score
    for key, entry in out.items():
        given: dict[str, Score] = entry.pop("scores")
        entry["share"] = all(0 <= score.value <= 1 for score in given.values())
        values = _values(key, names, found) if all(score.paired for score in given.values()) else None
        entry["candidates"] = _paired(key, names, given, values, spec) if values is not None else _single(given, spec)
    return out


def _values(key: str, names: Sequence[str], found: Mapping[str, Sequence[Result]]) -> Array | None:
    """(C, 1, P): a document's score in every candidate; None where no document has one."""
    _, task, metric = key.split("/", 2)
    rows = [
        (i, (row["task"], row["doc_hash"], row["doc_id"]), row["scores"][metric])
        for i, name in enumerate(names)
        for _, documents in found.get(name, ())
        for row in documents
        if row["task"] == task and metric in row["scores"]
    ]
    clusters = {document: p for p, document in enumerate(sorted({document for _, document, _ in rows}))}
    if not clusters:
        return None
    values = np.full((len(names), 1, len(clusters)), np.nan)
    for i, document, value in rows:
        values[i, 0, clusters[document]] = value
    return values


def _paired(
    key: str, names: Sequence[str], given: Mapping[str, Score], values: Array, spec: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    statistics = spec["statistics"]
    drawn = bootstrap_means(values, draws=statistics["draws"], seed=spec["seed"], purpose=key)
    out = {}
    for name, score in given.items():
        i = names.index(name)
        known = values[i][~np.isnan(values[i])]
        if known.size and known.min() >= 0 and known.max() <= 1:
            out[name] = asdict(estimate(values[i], drawn[:, i], statistics["level"]))
        else:
            bounds = (float("-inf"), float("inf"))
            ends = student_interval(score.value, drawn[:, i, 0], statistics["level"], known.size, bounds)
            low, high = (end if isfinite(end) else None for end in ends)
            out[name] = {"value": score.value, "low": low, "high": high, "n": score.n}
    return out


def _single(given: Mapping[str, Score], spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness' own value and standard error; without one the interval is empty (None)."""
    reach = float(stats.norm.isf((1 - spec["statistics"]["level"]) / 2))
    out: dict[str, dict[str, Any]] = {}
    for name, score in given.items():
        ends = (
            (None, None)
            if score.stderr is None
            else (score.value - reach * score.stderr, score.value + reach * score.stderr)
        )
        out[name] = {"value": score.value, "low": ends[0], "high": ends[1], "n": score.n}
    return out
