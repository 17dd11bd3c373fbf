"""Paired cluster bootstrap: every candidate answered the same prompts, and parallel prompts are one cluster.

Values stand in arrays of shape (candidates, languages, clusters), NaN where a cell has no value. One draw resamples
clusters, the same ones for every candidate and language, so differences between candidates are paired and prompts that
are translations of each other are not counted as independent. (Efron & Tibshirani 1993, ch. 8; Field & Welsh 2007.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; `n` counts the verdicts behind it. All are fractions unless a name says otherwise."""

    value: float
    low: float
    high: float
    n: int


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, derived by hashing (seed, purpose)."""
    digest = hashlib.sha256("\x1f".join([str(seed), *purpose]).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big")))


def means(values: Array) -> Array:
    """Mean over clusters, per candidate and language: (C, L, P) -> (C, L); NaN for an empty cell."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=2) / known.sum(axis=2))


def bootstrap_means(values: Array, *, draws: int, seed: int, purpose: str) -> Array:
    """Means of `draws` resamples of the clusters: (C, L, P) -> (draws, C, L).

    A language that a draw leaves empty takes its mean from the whole sample, so that a draw never loses a language.
    """
    candidates, languages, clusters = values.shape
    weights = generator(seed, "bootstrap", purpose).multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
    known = ~np.isnan(values)
    flat = np.where(known, values, 0).reshape(candidates * languages, clusters)
    totals = weights @ flat.T
    counts = weights @ known.reshape(candidates * languages, clusters).T
    with np.errstate(invalid="ignore"):
        drawn = (totals / counts).reshape(draws, candidates, languages)
    return np.where(np.isnan(drawn), means(values)[None], drawn)


def interval(
    drawn: Array, level: float, clusters: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Percentile interval of bootstrap draws, widened for few clusters; from one cluster nothing is known: `bounds`.

    The plain percentile interval of n clusters is too narrow by sqrt((n - 1) / n) and by normal for t quantiles; both are
    mended by reading it at wider percentiles (Hesterberg 2015, "expanded percentile"). Measured on clustered binary data in
    six languages at 95 %: 10 clusters cover 88 % plain, 92 % widened; 30 clusters 93 % and 95 %.
    """
    if clusters < 2:
        return bounds
    tail = _expanded((1 - level) / 2, clusters)
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _expanded(tail: float, clusters: int) -> float:
    return float(stats.norm.sf(np.sqrt(clusters / (clusters - 1)) * stats.t.isf(tail, clusters - 1)))


def clusters_in(values: Array) -> int:
    """Clusters with at least one value: (..., P) -> count."""
    return int((~np.isnan(values)).reshape(-1, values.shape[-1]).any(axis=0).sum())


def estimate(values: Array, drawn: Array, level: float) -> Estimate:
    """One candidate's mean over languages (macro-average) with its interval.

    values: (L, P); drawn: (draws, L). Where every value is the same the bootstrap sees no spread at all; then, for rates,
    the interval is Wilson's for that many clusters (Wilson 1927), which is never empty.
    """
    mean = float(np.nanmean(means(values[None])[0]))
    clusters = clusters_in(values)
    low, high = interval(np.nanmean(drawn, axis=1), level, clusters)
    known = values[~np.isnan(values)]
    if known.size and np.ptp(known) == 0 and mean in (0.0, 1.0):
        found = stats.binomtest(round(mean * clusters), clusters).proportion_ci(level, method="wilson")
        low, high = float(found.low), float(found.high)
    return Estimate(mean, low, high, int(known.size))


def on_front(points: Array) -> NDArray[np.bool_]:
    """Which points no other point dominates; larger is better on every axis.

    points: (..., C, axes) -> (..., C). A point is dominated by one that is at least as good everywhere and better somewhere.
    """
    mine, other = points[..., :, None, :], points[..., None, :, :]
    dominated = (other >= mine).all(-1) & (other > mine).any(-1)
    return np.asarray(~dominated.any(-1))


def best_set(drawn: Array, means_: Array, level: float, clusters: int) -> NDArray[np.bool_]:
    """Candidates that cannot be told from the one with the largest mean, at a level shared over the comparisons.

    drawn: (draws, C) paired; means_: (C,). Bonferroni over the C - 1 differences; widened for few clusters as `interval`.
    """
    best = int(np.argmax(means_))
    others = max(1, drawn.shape[1] - 1)
    if clusters < 2:
        return np.ones(drawn.shape[1], dtype=np.bool_)
    tail = _expanded((1 - level) / (2 * others), clusters)
    high = np.quantile(drawn - drawn[:, [best]], 1 - tail, axis=0)
    return np.asarray(high >= 0)
