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
LEAST_FREEDOM = 4
NO_SPREAD = 1e-12  # sums of the same numbers in another order differ by less


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


def cluster_weights(clusters: int, *, draws: int, seed: int, purpose: str) -> Array:
    """How often each draw of the bootstrap takes each cluster: (draws, clusters), every row sums to `clusters`.

    The same (seed, purpose) gives the same draws wherever it is asked, so that ratings and rates are drawn together.
    """
    taken = generator(seed, "bootstrap", purpose).integers(0, clusters, (draws, clusters))
    taken += np.arange(draws)[:, None] * clusters
    return np.bincount(taken.ravel(), minlength=draws * clusters).reshape(draws, clusters).astype(np.float64)


def bootstrap_means(values: Array, *, draws: int, seed: int, purpose: str) -> Array:
    """Means of `draws` resamples of the clusters: (C, L, P) -> (draws, C, L).

    A language that a draw leaves empty takes its mean from the whole sample, so that a draw never loses a language.
    """
    candidates, languages, clusters = values.shape
    weights = cluster_weights(clusters, draws=draws, seed=seed, purpose=purpose)
    known = ~np.isnan(values)
    totals = weights @ np.where(known, values, 0).reshape(-1, clusters).T
    counts = weights @ known.reshape(-1, clusters).T.astype(np.float64)
    with np.errstate(invalid="ignore"):
        drawn = (totals / counts).reshape(draws, candidates, languages)
    return np.where(np.isnan(drawn), means(values)[None], drawn)


def interval(
    drawn: Array, level: float, clusters: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Percentile interval of bootstrap draws, widened for few clusters; from one cluster nothing is known: `bounds`.

    The plain percentile interval of n clusters is too narrow by sqrt((n - 1) / n) and by normal for t quantiles; both are
    mended by reading it at wider percentiles (Hesterberg 2015, "expanded percentile"). It is for skewed quantities, such as
    ratios; rates have `estimate`, differences `student_interval`, which cover better from few clusters.
    """
    if clusters < 2:
        return bounds
    tail = _expanded((1 - level) / 2, clusters)
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def ratio_interval(over: Array, under: Array, level: float, clusters: int) -> tuple[float, float]:
    """Interval of the ratio of two means in 0..1 from their paired draws (draws,), read as in `interval`.

    A draw in which `under` is 0 has no finite ratio and is not dropped: it counts as the highest, and where `over` is 0 too
    as the lowest as well. So an end that more draws than its tail leave open is open: 0 below, infinite above. Where the
    draws do not differ, both means are widened as in `without_spread`, against each other.
    """
    if clusters < 2:
        return 0.0, np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        share = over / under
    if np.isfinite(share).all() and np.std(share) < NO_SPREAD:
        unseen, one, other = unseen_share(level, clusters), float(over.mean()), float(under.mean())
        kept = (1 - unseen) * one, (1 - unseen) * other
        return kept[0] / (kept[1] + unseen), (kept[0] + unseen) / kept[1]
    tail = _expanded((1 - level) / 2, clusters)
    low = np.quantile(np.nan_to_num(share, nan=0.0, posinf=np.finfo(float).max), tail)
    high = np.inf if (~np.isfinite(share)).mean() > tail else np.nanquantile(_highest(share), 1 - tail)
    return float(low), float(high)


def _highest(share: Array) -> Array:
    """Ratios with those that are not finite above all others."""
    finite = share[np.isfinite(share)]
    return np.where(np.isfinite(share), share, finite.max(initial=0.0))


def unseen_share(level: float, clusters: int) -> float:
    """The largest share of prompts that may be unlike all that were seen, at `level`: 1 - (1 - level)^(1 / clusters).

    A larger share would have shown itself in one of them (the exact form of the rule of three; Hanley & Lippman-Hand 1983,
    JAMA 249; Clopper & Pearson 1934).

    >>> round(unseen_share(0.95, 5), 3), round(unseen_share(0.95, 100), 3)
    (0.451, 0.03)
    """
    return float(1 - (1 - level) ** (1 / clusters))


def without_spread(value: float, level: float, clusters: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Interval of a mean that every resample agrees on: the prompts that were not seen may lie at either of `bounds`."""
    unseen = unseen_share(level, clusters)
    low, high = ((1 - unseen) * value + unseen * bound for bound in bounds)
    return max(bounds[0], low), min(bounds[1], high)


def student_interval(
    value: float, drawn: Array, level: float, clusters: int, bounds: tuple[float, float] = (-1.0, 1.0)
) -> tuple[float, float]:
    """Interval of a difference or a mean of rates: bootstrap standard error, Student's quantile, cut at `bounds`.

    drawn: (draws,). From one cluster nothing is known: `bounds`; where the draws do not differ, see `without_spread`. Measured on differences of two candidates' rates in six
    languages at 95 %: 8 and 10 clusters cover 93 to 96 % where `interval` covers 92 to 94 %, 20 to 200 clusters 95 to 96 %.
    """
    if clusters < 2:
        return bounds
    error = _standard_error(drawn, clusters)
    if error < NO_SPREAD:
        return without_spread(value, level, clusters, bounds)
    reach = float(stats.t.isf((1 - level) / 2, clusters - 1)) * error
    return max(bounds[0], value - reach), min(bounds[1], value + reach)


def _standard_error(drawn: Array, clusters: int) -> float:
    """Spread of the draws, without the bootstrap's bias for few clusters."""
    return float(np.nanstd(drawn) * np.sqrt(clusters / (clusters - 1)))


def _expanded(tail: float, clusters: int) -> float:
    return float(stats.norm.sf(np.sqrt(clusters / (clusters - 1)) * stats.t.isf(tail, clusters - 1)))


def clusters_in(values: Array) -> int:
    """Clusters with at least one value: (..., P) -> count."""
    return int((~np.isnan(values)).reshape(-1, values.shape[-1]).any(axis=0).sum())


def estimate(values: Array, drawn: Array, level: float) -> Estimate:
    """One candidate's mean over languages (macro-average) of values in 0..1, with its interval.

    values: (L, P); drawn: (draws, L). The interval is Wilson's (1927) with Student's quantile, for as many independent
    verdicts as would have the standard error that the bootstrap of clusters found (Korn & Graubard 1998; Dean & Pagano 2015).
    It stays within 0..1. A rate near 0 or 1 shows the spread of its clusters by few of them, so Student's quantile is that
    of 8 n m (1 - m) degrees of freedom there (at least 4, at most n - 1; chosen by simulation). Measured at 95 % in six languages
    on rates of 3 to 50 %, normal copulas of correlation 0 to 0.95: 20 to 100 clusters cover 93 to 98 % (n - 1 degrees
    cover 89 to 98 %), rates of 10 % and more 93 to 97 %; 8 clusters cover 93 to 98 %.
    Where every value is 0, or every one 1, the clusters are counted as verdicts; where resamples agree on another mean, see
    `without_spread`.
    """
    mean = float(np.nanmean(means(values[None])[0]))
    clusters = clusters_in(values)
    known = int((~np.isnan(values)).sum())
    if clusters == 0:
        return Estimate(mean, 0.0, 1.0, known)
    if min(mean, 1 - mean) < NO_SPREAD:
        found = stats.binomtest(round(mean * clusters), clusters).proportion_ci(level, method="wilson")
        return Estimate(mean, float(found.low), float(found.high), known)
    if clusters < 2:
        return Estimate(mean, 0.0, 1.0, known)
    error = _standard_error(np.nanmean(drawn, axis=1), clusters)
    if error < NO_SPREAD:
        return Estimate(mean, *without_spread(mean, level, clusters, (0.0, 1.0)), known)
    known_spread = min(clusters - 1, max(LEAST_FREEDOM, 8 * clusters * mean * (1 - mean)))
    quantile = float(stats.t.isf((1 - level) / 2, known_spread))
    return Estimate(mean, *_wilson(mean, error, quantile), known)


def _wilson(mean: float, error: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a mean in 0..1 with this standard error."""
    pull = quantile**2 * error**2 / (mean * (1 - mean))
    middle = (mean + pull / 2) / (1 + pull)
    reach = quantile * error * np.sqrt(1 + pull / (4 * mean * (1 - mean))) / (1 + pull)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def on_front(points: Array) -> NDArray[np.bool_]:
    """Which points no other point dominates; larger is better on every axis.

    points: (..., C, axes) -> (..., C). A point is dominated by one that is at least as good everywhere and better somewhere.
    """
    mine, other = points[..., :, None, :], points[..., None, :, :]
    dominated = (other >= mine).all(-1) & (other > mine).any(-1)
    return np.asarray(~dominated.any(-1))


@dataclass(frozen=True, slots=True)
class Lags:
    """How far each candidate (row) is `behind` each other (column), and by how much it may be by chance: (C, C) each."""

    behind: Array
    needed: Array

    def surest(self, told: NDArray[np.bool_] | None = None) -> tuple[Array, Array, NDArray[np.int64]]:
        """Of each candidate, its lag behind the one most surely ahead of it, what chance makes of that, and who that is: (C,).

        told: (C, C), the pairs that another test tells apart; those stand before all others.
        """
        surely = np.divide(self.behind, self.needed, out=np.where(self.behind > 0, np.inf, 0.0), where=self.needed > 0)
        order = np.minimum(surely, 1e9)
        if told is not None:
            order = order + np.where(told & (surely > 1), 1e10, 0)
        first = order.argmax(axis=1)
        place = np.arange(len(surely)), first
        ahead = surely[place] > 0
        return np.where(ahead, self.behind[place], 0), np.where(ahead, self.needed[place], np.inf), first


def lags(drawn: Array, means_: Array, level: float, clusters: int) -> Lags:
    """How far each candidate is behind each other, and how far it may be by chance, over all comparisons at once.

    drawn: (draws, C) paired; means_: (C,). Those not further behind anybody than by chance are the best set: the truly best
    one is among them with probability `level`. From one cluster nothing is known: any lag may be chance.

    Multiple comparisons with the best (Hsu 1981; Edwards & Hsu 1983): were a candidate the best, all its lags would be
    noise, and the largest of them, each in its standard errors, exceeds the limit in 1 - level of the draws. Comparisons
    that move together cost little, unlike with Bonferroni. The limit is widened for few clusters as a t quantile. Where
    the draws of a lag do not differ, prompts that were not seen may (see `without_spread`). Measured at 95 %, eight
    candidates of which seven are equally good: the best is in for 94 % of studies of 8 clusters, 96 % of 30.
    """
    behind = means_[None] - means_[:, None]
    behind[np.abs(behind) < NO_SPREAD] = 0
    needed = np.full_like(behind, np.inf)
    if clusters < 2:
        return Lags(np.zeros_like(behind), needed)
    for i in range(len(means_)):
        noise = drawn - drawn[:, [i]] - (means_ - means_[i])
        error = noise.std(axis=0)
        moving = error >= NO_SPREAD
        needed[i] = unseen_share(level, clusters) * (1 + behind[i])
        if moving.any():
            limit = float(np.quantile((noise[:, moving] / error[moving]).max(axis=1), level))
            wider = float(stats.t.isf(stats.norm.sf(limit), clusters - 1) * np.sqrt(clusters / (clusters - 1)))
            needed[i, moving] = max(0.0, wider) * error[moving]
    return Lags(behind, needed)
