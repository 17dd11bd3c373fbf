"""Ratings from pairwise verdicts: Bradley-Terry with ties (Davidson 1970), the base at 0, length held equal.

A rating is a lead over the base in logits (natural), at answers of equal length: a judge's taste for long answers is fitted
as one slope on `length_lead` and taken out (as in length-controlled AlpacaEval, Dubois et al. 2024, with one slope for all).
Intervals are of the same bootstrap of clusters as the rates'. Every candidate starts with half a win and half a loss (and half
a tie, where ties occur) against the base at equal length, so that all fits exist; what only this prior decides is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mixmerge.stats.davidson import chances, fit, lead
from mixmerge.stats.paired import NO_SPREAD, Array, Estimate, cluster_weights, student_interval, without_spread

Numbers = NDArray[np.int64]
PRIOR = 0.5  # of each outcome, per candidate
SLOPE_RIDGE = 0.01  # a prior of standard deviation 10 logits on the slope, where the length lead is in -1..1
STEEPEST = 10.0  # a slope beyond it: a lead of 0.2, half as long again, would win seven of eight
ENDLESS = (float("-inf"), float("inf"))
BINS = 16  # of length leads per pair, for the draws; the point estimates use each verdict's own


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Pairwise verdicts, one a row: candidates `first` and `second`, the first's `score` (1 win, 0.5 tie, 0 loss).

    `cluster` numbers the parallel prompts from 0 to `clusters` - 1; `length` is the first's `length_lead`, 0 where lengths
    are not known; `weight` is how many verdicts a row stands for. All arrays are (rows,).
    """

    first: Numbers
    second: Numbers
    score: Array
    cluster: Numbers
    length: Array
    weight: Array
    clusters: int


@dataclass(frozen=True, slots=True)
class Rating:
    """One candidate's rating: `lead` over the base in logits, `score` the expected share of wins (a tie counts half).

    Both are at equal length and against the base. `problem` names what the verdicts leave open: "unconnected" (no chain of
    comparisons leads to the base; NaN), "unbounded" (it is always ahead of, or always behind, the base's group: the lead is
    only the prior's and one end of its interval infinite, the other Wilson's for that many parallel prompts), else "".
    """

    lead: Estimate
    score: Estimate
    problem: str


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings in the candidates' order, the base's 0 by definition.

        ties: chance of a tie between equals. length: logits that a judge gives for a length lead of 1, None where it was not
        fitted. `length_problem`: "unknown" (no lengths), "constant" (no pair's lengths vary, so length cannot be told from
    quality), "unbounded" (length alone decides the verdicts: the slope is only the prior's), else "". drawn: leads
    (draws, C).
    """

    candidates: tuple[Rating, ...]
    ties: Estimate
    length: Estimate | None
    length_problem: str
    drawn: Array


def length_lead(first: Array, second: Array) -> Array:
    """How much longer one answer is than the other, in -1..1: (a - b) / (a + b), the tanh of half the log length ratio.

    Like AlpacaEval's tanh it is bounded, so that one endless answer does not rule the slope, and it needs no scale from the
    data. Lengths in characters, tokens or words, at least 0; two empty answers are equally long.

    >>> length_lead(np.array([300.0, 0.0]), np.array([100.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    total = first + second
    return np.asarray(np.divide(first - second, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0))


def against_base(values: Array, base: int, lengths: Array | None = None) -> Verdicts:
    """Verdicts against the base from a table of scores: (C, L, P) of 1, 0.5, 0, NaN where there is none.

    lengths: (C, L, P), the base's among them; a verdict without both lengths counts as equally long. Rows are weighted so
    that a candidate's languages weigh the same, as in macro-averages.
    """
    known = ~np.isnan(values)
    known[base] = False
    first, language, cluster = np.nonzero(known)
    cells = known.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = cells.sum(axis=1, keepdims=True) / ((cells > 0).sum(axis=1, keepdims=True) * cells)
    longer = np.zeros(len(first))
    if lengths is not None:
        longer = np.nan_to_num(length_lead(lengths[first, language, cluster], lengths[base, language, cluster]))
    score, second = values[first, language, cluster], np.full(len(first), base)
    return Verdicts(first, second, score, cluster, longer, share[first, language], values.shape[2])


def rate(
    verdicts: Verdicts, *, candidates: int, base: int, draws: int, level: float, seed: int, purpose: str
) -> Ratings:
    """Rate the candidates, with intervals at `level` from `draws` resamples of the clusters.

    (seed, purpose) as given to `bootstrap_means` for a table over the same clusters: then both are drawn together.
    """
    problems = _problems(verdicts, candidates, base)
    rows = _only(verdicts, np.array([problem != "unconnected" for problem in problems]))
    length_problem = _length_problem(rows)
    columns = [i for i in range(candidates) if i != base]
    ridge = np.zeros(candidates - 1 + (not length_problem))
    ridge[candidates - 1 :] = SLOPE_RIDGE
    prior = _prior(candidates, base, bool((rows.score == 0.5).any()))

    def fitted(length: Array, weights: Array | None, start: Array | None) -> Array:
        cells, counts = _cells(rows, length, weights is not None)
        slopes = _slopes(np.concatenate([cells, prior[0]]), candidates, columns, not length_problem)
        counts = counts.sum(axis=0)[None] if weights is None else _weighted(weights, counts)
        extra = np.broadcast_to(prior[1], (len(counts), *prior[1].shape))
        return fit(np.concatenate([counts, extra], axis=1), slopes, ridge, start)

    exact = fitted(rows.length, None, None)[0]
    weights = cluster_weights(verdicts.clusters, draws=draws, seed=seed, purpose=purpose)
    binned = _binned(rows)
    # Bins stand in for the lengths within them; what they shift, they shift in the whole sample as in each draw.
    drawn = fitted(binned, weights, exact)
    if not length_problem:
        drawn[:, :-1] += exact[:-1] - fitted(binned, np.ones((1, verdicts.clusters)), exact)[0, :-1]
    leads, drawn_leads = np.zeros(candidates), np.zeros((draws, candidates))
    leads[columns], drawn_leads[:, columns] = exact[: candidates - 1], drawn[:, : candidates - 1]
    missing = np.array([problem == "unconnected" for problem in problems])
    leads[missing], drawn_leads[:, missing] = np.nan, np.nan
    rated = [
        _rating(i, base, rows, float(leads[i]), drawn_leads[:, i], float(exact[-1]), problems[i], level)
        for i in range(candidates)
    ]
    slope = None
    if not length_problem:
        slope, length_problem = _taste(rows, float(exact[-2]), drawn[:, -2], level)
    return Ratings(tuple(rated), _ties(rows, exact[-1], drawn[:, -1], level), slope, length_problem, drawn_leads)


def _ties(rows: Verdicts, log_nu: Array, drawn: Array, level: float) -> Estimate:
    """Chance of a tie between equals; where there was none, what so many clusters without any leave possible."""
    clusters, n = len(np.unique(rows.cluster)), len(rows.score)
    chance = float(chances(np.array(0.0), log_nu)[1])
    if chance == 0:
        return Estimate(0.0, 0.0, _alike(0, clusters, level)[1], n)
    even = chances(np.zeros_like(drawn), drawn)[1]
    return Estimate(chance, *student_interval(chance, even, level, clusters, (0.0, 1.0)), n)


def _taste(rows: Verdicts, slope: float, drawn: Array, level: float) -> tuple[Estimate, str]:
    """The slope on the length lead, and "unbounded" where length decides so much that only the prior holds it."""
    clusters, n = len(np.unique(rows.cluster)), len(rows.score)
    low, high = student_interval(slope, drawn, level, clusters, ENDLESS)
    if abs(slope) < STEEPEST:
        return Estimate(slope, low, high, n), ""
    return Estimate(slope, low if slope > 0 else -np.inf, np.inf if slope > 0 else high, n), "unbounded"


def _alike(won: int, clusters: int, level: float) -> tuple[float, float]:
    """Wilson's interval where all clusters went the same way and the bootstrap sees no spread; of none, 0 to 1."""
    if not clusters:
        return 0.0, 1.0
    found = stats.binomtest(won, clusters).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _score(leads: Array, log_nu: Array) -> Array:
    won, tied, _ = chances(leads, log_nu)
    return np.asarray(won + tied / 2)


def _rating(
    index: int, base: int, rows: Verdicts, ahead: float, drawn: Array, log_nu: float, problem: str, level: float
) -> Rating:
    """One rating with intervals on the scale of leads, carried to that of scores, which they cannot leave."""
    mine = (rows.first == index) | (rows.second == index)
    n = int(mine.sum())
    if problem == "unconnected":
        nothing = float("nan")
        return Rating(Estimate(nothing, *ENDLESS, n), Estimate(nothing, 0.0, 1.0, n), problem)
    if index == base:
        return Rating(Estimate(0.0, 0.0, 0.0, n), Estimate(0.5, 0.5, 0.5, n), problem)
    met = len(np.unique(rows.cluster[mine & ((rows.first == base) | (rows.second == base))]))
    if problem == "unbounded":
        shares = _alike(met if ahead > 0 else 0, met, level)
        low, high = lead(shares[0], log_nu), lead(shares[1], log_nu)
    elif (rows.score[mine] == 0.5).all():
        decided = _alike(0, met, level)[1]
        shares = 0.5 - decided / 2, 0.5 + decided / 2
        low, high = lead(shares[0], log_nu), lead(shares[1], log_nu)
    else:
        clusters = len(np.unique(rows.cluster[mine]))
        if clusters > 1 and np.std(drawn) < NO_SPREAD:
            shares = without_spread(_share(ahead, log_nu), level, clusters, (0.0, 1.0))
            low, high = lead(shares[0], log_nu), lead(shares[1], log_nu)
        else:
            low, high = student_interval(ahead, drawn, level, clusters, ENDLESS)
            shares = _share(low, log_nu), _share(high, log_nu)
    return Rating(Estimate(ahead, low, high, n), Estimate(_share(ahead, log_nu), *shares, n), problem)


def _share(ahead: float, log_nu: float) -> float:
    return float(_score(np.array(ahead), np.array(log_nu))) if np.isfinite(ahead) else float(ahead > 0)


def _problems(verdicts: Verdicts, candidates: int, base: int) -> list[str]:
    """What each candidate's verdicts leave open. A fit exists where wins and ties lead round from each to each (Ford 1957)."""
    won, lost = verdicts.score >= 0.5, verdicts.score <= 0.5
    winner = np.concatenate([verdicts.first[won], verdicts.second[lost]])
    loser = np.concatenate([verdicts.second[won], verdicts.first[lost]])
    beaten = coo_array((np.ones(len(winner)), (winner, loser)), shape=(candidates, candidates))
    together = connected_components(beaten, connection="weak")[1]
    round_ = connected_components(beaten, connection="strong")[1]
    return [
        "unconnected" if together[i] != together[base] else "unbounded" if round_[i] != round_[base] else ""
        for i in range(candidates)
    ]


def _only(verdicts: Verdicts, there: NDArray[np.bool_]) -> Verdicts:
    keep = there[verdicts.first] & there[verdicts.second]
    return Verdicts(
        verdicts.first[keep],
        verdicts.second[keep],
        verdicts.score[keep],
        verdicts.cluster[keep],
        verdicts.length[keep],
        verdicts.weight[keep],
        verdicts.clusters,
    )


def _length_problem(rows: Verdicts) -> str:
    if not (rows.length != 0).any():
        return "unknown"
    turned = np.where(rows.first < rows.second, rows.length, -rows.length)
    spread = [np.ptp(turned[same]) for same in _pairs(rows)]
    return "" if max(spread) > 0 else "constant"


def _pairs(rows: Verdicts) -> list[NDArray[np.bool_]]:
    """The rows of each unordered pair of candidates."""
    pairs = np.stack([np.minimum(rows.first, rows.second), np.maximum(rows.first, rows.second)], axis=1)
    number = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return [number == i for i in range(number.max(initial=-1) + 1)]


def _binned(rows: Verdicts) -> Array:
    """Each row's length lead replaced by the mean of its bin, one of BINS quantiles of its pair's."""
    binned = np.array(rows.length, dtype=np.float64)
    turn = np.where(rows.first < rows.second, 1.0, -1.0)
    for same in _pairs(rows):
        lengths = (turn * rows.length)[same]
        if len(np.unique(lengths)) > BINS:
            edges = np.quantile(lengths, np.linspace(0, 1, BINS + 1)[1:-1])
            place = np.searchsorted(edges, lengths)
            sums = np.bincount(place, rows.weight[same] * lengths, BINS)
            amount = np.bincount(place, rows.weight[same], BINS)
            lengths = (sums / np.maximum(amount, 1e-300))[place]
        binned[same] = lengths * turn[same]
    return binned


def _cells(rows: Verdicts, length: Array, by_cluster: bool) -> tuple[Array, Array]:
    """Distinct comparisons (K, 3: first, second, length lead) and their outcomes (P, K, 3); P is 1 unless `by_cluster`."""
    keys = np.stack([rows.first, rows.second, length], axis=1)
    cells, number = np.unique(keys, axis=0, return_inverse=True)
    clusters = rows.clusters if by_cluster else 1
    counts = np.zeros((clusters, len(cells), 3))
    outcome = np.select([rows.score == 1, rows.score == 0.5], [0, 1], 2)
    place = rows.cluster if by_cluster else np.zeros(len(outcome), dtype=np.int64)
    np.add.at(counts, (place, number.reshape(-1), outcome), rows.weight)
    return cells, counts


def _weighted(weights: Array, counts: Array) -> Array:
    clusters, cells, outcomes = counts.shape
    return np.asarray((weights @ counts.reshape(clusters, cells * outcomes)).reshape(len(weights), cells, outcomes))


def _prior(candidates: int, base: int, ties: bool) -> tuple[Array, Array]:
    cells = np.array([[i, base, 0.0] for i in range(candidates) if i != base]).reshape(-1, 3)
    return cells, np.tile([PRIOR, PRIOR if ties else 0.0, PRIOR], (len(cells), 1))


def _slopes(cells: Array, candidates: int, columns: list[int], with_length: bool) -> Array:
    first, second = cells[:, 0].astype(np.int64), cells[:, 1].astype(np.int64)
    one = np.eye(candidates)
    slopes = (one[first] - one[second])[:, columns]
    return np.concatenate([slopes, cells[:, [2]]], axis=1) if with_length else slopes
