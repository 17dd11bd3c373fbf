"""Davidson's (1970) model of paired comparisons with ties, fitted to many weighted samples at once by Newton's method.

A comparison whose first side is ahead by `eta` logits is won, tied or lost with odds exp(eta / 2) : nu : exp(-eta / 2), and
eta = slopes @ ratings is linear. Chosen over Rao & Kupper (1967) because it is an exponential family: the fit depends on
counts alone, gives each candidate exactly the score it had (a tie counts half), and its log-likelihood is concave, so Newton
needs no care. Samples share their cells; only the counts in the cells differ. (Hunter 2004 on existence of the optimum.)
"""

from __future__ import annotations

import numpy as np

from mixmerge.stats.paired import Array

CLOSE = 1e-3  # logits: Newton doubles the digits, so the step after one this small is of the order of its square
LONGEST = 2.0  # logits: a first step from far away may overshoot
MOST_STEPS = 60
AT_ONCE = 512  # samples whose cells fit the processor's cache


def fit(counts: Array, slopes: Array, ridge: Array, start: Array | None = None) -> Array:
    """Ratings and log nu of each sample, of the greatest likelihood less `ridge` / 2 times their squares.

    counts: (S, K, 3) of wins, ties and losses of the first side in each cell, not necessarily whole; slopes: (K, Q);
    ridge: (Q,). Returns (S, Q + 1); log nu is minus infinity where no sample holds a tie. `start`: (Q + 1,), near the answer.

    Raises:
        ArithmeticError: the likelihood has no optimum: cells that are always won or lost, without a ridge or a prior.
    """
    ties = bool((counts[:, :, 1] > 0).any())
    first = np.zeros(slopes.shape[1] + 1) if start is None else np.where(np.isfinite(start), start, 0)
    found = np.concatenate([_newton(counts[i : i + AT_ONCE], slopes, ridge, first, ties) for i in _starts(counts)])
    if not ties:
        found[:, -1] = -np.inf
    return found


def chances(eta: Array, log_nu: Array) -> tuple[Array, Array, Array]:
    """Chances of win, tie and loss of a side that is ahead by `eta` logits; shapes broadcast."""
    half = np.exp(eta / 2)
    under = 1 / half
    even = np.exp(log_nu)
    total = half + under + even
    return half / total, even / total, under / total


def lead(score: float, log_nu: float) -> float:
    """The lead in logits at which the expected score (a tie counts half) is `score`: the inverse of `chances`.

    >>> won, tied, _ = chances(np.array(1.3), np.array(-0.5))
    >>> round(lead(float(won + tied / 2), -0.5), 9)
    1.3
    """
    if not 0 < score < 1:
        return float("-inf" if score <= 0 else "inf")
    middle = float(np.exp(log_nu)) * (0.5 - score)
    return float(2 * np.log((np.sqrt(middle**2 + 4 * score * (1 - score)) - middle) / (2 * (1 - score))))


def _starts(counts: Array) -> range:
    return range(0, len(counts), AT_ONCE)


def _newton(counts: Array, slopes: Array, ridge: Array, start: Array, ties: bool) -> Array:
    size = slopes.shape[1]
    unknowns = size + ties
    products = (slopes[:, :, None] * slopes[:, None, :]).reshape(len(slopes), size * size)
    found = np.tile(start, (len(counts), 1))
    total, ahead = counts.sum(axis=2), counts[:, :, 0] - counts[:, :, 2]
    tied = counts[:, :, 1].sum(axis=1)
    moving = np.arange(len(counts))
    for _ in range(MOST_STEPS):
        now = found[moving]
        n = total[moving]
        won, even, lost = chances(now[:, :size] @ slopes.T, now[:, [size]] if ties else np.array(-np.inf))
        margin = won - lost
        gradient, curve = np.empty((len(now), unknowns)), np.empty((len(now), unknowns, unknowns))
        gradient[:, :size] = (ahead[moving] - n * margin) @ slopes / 2 - ridge * now[:, :size]
        curve[:, :size, :size] = (n * (won + lost - margin**2) / 4 @ products).reshape(len(n), size, size) + np.diag(
            ridge
        )
        if ties:
            gradient[:, size] = tied[moving] - (n * even).sum(axis=1)
            curve[:, size, :size] = curve[:, :size, size] = -(n * margin * even) @ slopes / 2
            curve[:, size, size] = (n * even * (1 - even)).sum(axis=1)
        try:
            step = np.linalg.solve(curve, gradient[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError as error:
            raise ArithmeticError("the ratings are not determined by these verdicts") from error
        furthest = np.abs(step).max(axis=1, initial=0)
        found[moving, :unknowns] += step * np.minimum(1, LONGEST / np.maximum(furthest, LONGEST))[:, None]
        moving = moving[furthest > CLOSE]
        if not len(moving):
            return found
    raise ArithmeticError("the ratings did not settle: some verdicts are always won or lost")
