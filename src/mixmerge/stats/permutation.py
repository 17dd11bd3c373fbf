"""Sign-flip tests of paired differences, with Holm's correction over the candidates.

If two candidates are equally good, their answers to one parallel prompt could be exchanged: the sign of a cluster's
difference, over all its languages and axes at once, is a fair coin. The difference of macro-averages is a weighted sum over
clusters with weights that the signs do not touch, so a test is one product of a matrix of signs with that sum's terms, and
languages with missing cells need nothing special. Dividing by a standard error changes nothing here: the sum of squares is
the same for every choice of signs, so Student's statistic orders them as the sum itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmerge.stats.paired import Array, generator

SAME = 1e-9  # relative: sums of the same terms in another order differ by less
AT_ONCE = 4096  # sets of signs held in memory together


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tests of the candidates against one of them; arrays are (C,), NaN for those that were not compared.

    `difference` is of macro-averages over the cells that both have, `p` two-sided, `adjusted` by Holm over the candidates
    compared, `clusters` how many parallel prompts differ at all; `exact` where all signs were tried, not a random sample.
    """

    difference: Array
    p: Array
    adjusted: Array
    clusters: NDArray[np.int64]
    exact: bool


def compare(
    tables: Sequence[Array], *, against: int, among: Sequence[int] | None = None, flips: int, seed: int, purpose: str
) -> Comparison:
    """Test the candidates `among` (default: all others) against the one `against`, on the mean of one or more axes.

    tables: one array (C, L, P) for each axis, NaN where a cell has no value; the clusters of one axis are other prompts than
    those of the next. One axis tests that axis, several test their mean (the balance), each axis weighing the same.
    """
    terms = np.concatenate([contributions(values, against) for values in tables], axis=1) / len(tables)
    others = [i for i in (range(len(terms)) if among is None else among) if i != against]
    p, exact = sign_flip(terms[others], flips=flips, seed=seed, purpose=purpose)

    def spread_out(found: Array) -> Array:
        out = np.full(len(terms), np.nan)
        out[others] = found
        return out

    clusters = np.where(np.isin(np.arange(len(terms)), others), (np.abs(terms) > 0).sum(axis=1), 0)
    return Comparison(spread_out(terms[others].sum(axis=1)), spread_out(p), spread_out(holm(p)), clusters, exact)


def contributions(values: Array, against: int) -> Array:
    """What each cluster adds to a candidate's difference from `against`: (C, L, P) -> (C, P), whose sum is the difference.

    Only cells that both have count; a language's cells share its weight, and languages with any cell weigh the same. A
    candidate that shares no cell with `against` has NaN throughout.
    """
    differences = values - values[against]
    pairs = ~np.isnan(differences)
    cells = pairs.sum(axis=2)  # (C, L)
    languages = (cells > 0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(cells > 0, 1 / (cells * languages[:, None]), 0)
    terms = (np.where(pairs, differences, 0) * weight[:, :, None]).sum(axis=1)
    terms[languages == 0] = np.nan
    return np.asarray(terms)


def sign_flip(terms: Array, *, flips: int, seed: int, purpose: str) -> tuple[Array, bool]:
    """Two-sided p-value of each row's sum, were the sign of each column a fair coin: (K, P) -> (K,), whether exact.

    All sets of signs are tried where they are no more than `flips` (a set and its opposite count once); else a random sample
    in which the observed signs count as one more (Phipson & Smyth 2010), so that a p-value is never nought and never too
    small. Rows see the same signs. A row that holds NaN has p NaN.
    """
    known = ~np.isnan(terms).any(axis=1)
    p = np.full(len(terms), np.nan)
    columns = terms[known][:, (terms[known] != 0).any(axis=0)]
    least = np.abs(columns.sum(axis=1)) - SAME * np.abs(columns).sum(axis=1)
    moving = columns.shape[1]
    exact = moving == 0 or 2 ** (moving - 1) <= flips
    count = 2 ** max(moving - 1, 0) if exact else flips
    chance = generator(seed, "sign flips", purpose)
    reached = np.zeros(len(columns))
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        flipped = _numbered(start, size, moving) if exact else chance.integers(0, 2, (size, moving), dtype=np.int8)
        sums = (1.0 - 2.0 * flipped) @ columns.T
        reached += (np.abs(sums) >= least).sum(axis=0)
    p[known] = reached / count if exact else (reached + 1) / (count + 1)
    return p, exact


def _numbered(start: int, size: int, columns: int) -> NDArray[np.int64]:
    """Sets of signs by their number in binary: (size, columns) of 0 and 1; the last column is never flipped."""
    return np.asarray(np.arange(start, start + size)[:, None] >> np.arange(columns)[None] & 1)


def holm(p: Array) -> Array:
    """Holm's (1979) adjusted p-values: (K,) -> (K,), never falling from a smaller p to a larger; NaN is no test and stays.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    stricter = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stricter))
    return adjusted
