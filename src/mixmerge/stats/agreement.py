"""Do several judges say the same? Krippendorff's alpha for nominal verdicts, with a bootstrap interval over units.

Codes stand in an integer array (judges, units), a negative code where a judge gave no verdict on a unit. Alpha is 1 where
all verdicts of every unit agree, 0 where they agree as often as verdicts dealt out by chance would. (Krippendorff 2011,
"Computing Krippendorff's Alpha-Reliability", section C; Hayes & Krippendorff 2007.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mixmerge.stats.paired import Array, Estimate, generator, interval

Codes = NDArray[np.int64]
MISSING = -1
BOUNDS = (-1.0, 1.0)


def encode(words: Sequence[Sequence[str | None]]) -> Codes:
    """Verdict words (judges, units) as codes, by the words' alphabet; None is missing.

    >>> encode([["safe", "harmful", None], ["safe", "safe", "harmful"]]).tolist()
    [[1, 0, -1], [1, 1, 0]]
    """
    number = {word: i for i, word in enumerate(sorted({w for row in words for w in row if w is not None}))}
    return np.array([[MISSING if w is None else number[w] for w in row] for row in words], dtype=np.int64)


def krippendorff_alpha(codes: ArrayLike) -> float:
    """Alpha of nominal codes (judges, units); NaN where it is not defined: no unit with two verdicts, or one word alone.

    Units with fewer than two verdicts pair with nothing and do not count.

    >>> round(krippendorff_alpha([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]), 3)
    0.095
    """
    return float(_alpha(_unit_sums(_checked(codes)).sum(axis=0, keepdims=True))[0])


def alpha_estimate(
    codes: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate | None:
    """Alpha with its interval; `n` counts the units that two judges or more gave a verdict on. None where not defined.

    clusters: one key a unit; units with the same key (translations of a prompt, answers to it) are drawn together. Each
    unit is its own where None. A draw without two different verdicts has no alpha and is left out. Where judges agree on
    every unit the bootstrap sees no spread: then the lower end takes the disagreement that Wilson's interval for that many
    clusters still allows. Measured at 95 %, three judges who agree in part (alpha about 0.5): 20 to 300
    units cover 95 to 96 %; nearly at one (alpha 0.8 and 0.94), 200 units cover 93 %.

    Raises:
        ValueError: codes that are no (judges, units) array, or another number of cluster keys than of units.
    """
    found = _checked(codes)
    sums = _unit_sums(found)
    keys = range(found.shape[1]) if clusters is None else clusters
    if len(keys) != found.shape[1]:
        raise ValueError(f"{len(keys)} cluster keys for {found.shape[1]} units")
    value = krippendorff_alpha(found)
    if np.isnan(value):
        return None
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    by_cluster = np.zeros((len(number), sums.shape[1]))
    np.add.at(by_cluster, [number[key] for key in keys], sums)
    by_cluster = by_cluster[by_cluster[:, 1] > 0]
    count = len(by_cluster)
    weights = generator(seed, "bootstrap", "alpha").multinomial(count, np.full(count, 1 / count), size=draws)
    low, high = interval(_alpha(weights @ by_cluster), level, count, BOUNDS)
    if value == 1.0 and count > 1:
        least = stats.binomtest(count, count).proportion_ci(level, method="wilson").low
        low, high = 1 - (1 - float(least)) / float(_expected(sums.sum(axis=0))), 1.0
    return Estimate(value, max(low, BOUNDS[0]), min(high, BOUNDS[1]), int((sums[:, 1] > 0).sum()))


def _checked(codes: ArrayLike) -> Codes:
    found = np.asarray(codes)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"codes are {found.dtype} {found.shape}, expected integers (judges, units)")
    return found.astype(np.int64)


def _unit_sums(codes: Codes) -> Array:
    """(judges, units) -> (units, 2 + words): agreeing pairs over (m - 1), verdicts m, verdicts by word; 0 where m < 2."""
    words = max(int(codes.max(initial=0)) + 1, 1)
    by_word = np.stack([(codes == word).sum(axis=0) for word in range(words)], axis=1).astype(np.float64)
    by_word[by_word.sum(axis=1) < 2] = 0
    verdicts = by_word.sum(axis=1)
    agreeing = (by_word * (by_word - 1)).sum(axis=1) / np.maximum(verdicts - 1, 1)
    return np.column_stack([agreeing, verdicts, by_word])


def _expected(sums: Array) -> Array:
    """Disagreement expected by chance, from sums (..., 2 + words): (...)."""
    n, by_word = sums[..., 1], sums[..., 2:]
    return np.asarray(1 - (by_word * (by_word - 1)).sum(axis=-1) / (n * (n - 1)))


def _alpha(sums: Array) -> Array:
    """1 - observed / expected disagreement, from sums (draws, 2 + words); NaN where nothing can disagree."""
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = 1 - sums[:, 0] / sums[:, 1]
        expected = _expected(sums)
        return np.asarray(np.where(expected > 0, 1 - observed / expected, np.nan))
