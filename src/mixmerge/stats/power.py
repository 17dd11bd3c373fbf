"""What a study can detect, before it is run: the least difference that n parallel prompts show with given power.

A parallel prompt is one cluster: its answers in several languages are correlated, so six languages are worth fewer than six
prompts (Kish 1965, the design effect 1 + (L - 1) r). The mean of independent clusters is tested as in a paired t-test, whose
power is the noncentral t's; the sign-flip test that is used has the same power, except that few clusters cannot reach a
small p at all, which is counted. Differences, spreads and rates are fractions 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
    from mixmerge.stats.paired import Array  # scipy.stats takes half a second to import, and planning needs none of it

POWER = 0.8  # Cohen 1988
# Assumed before anything is measured; see `rate_spread` and `win_spread`.
RATE = 0.3  # of harmful prompts complied with, of look-alikes refused
TIES = 0.2  # of pairwise verdicts
ALIKE = 0.3  # correlation of two candidates' answers to one prompt: both are made from one base
LANGUAGES_ALIKE = 0.3  # correlation of differences across the languages of one parallel prompt
MOST_PROMPTS = 1_000_000
QUADRATURE = 2000
NEAR = 1e-9  # of a shift, relative


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a comparison: `prompts` in parallel over `languages`.

    `spread` is the standard deviation of one prompt's paired difference in one language, `correlation` that of two
    languages' differences on one parallel prompt.
    """

    prompts: int
    languages: int
    spread: float
    correlation: float = LANGUAGES_ALIKE

    def variance(self) -> float:
        """Variance of the mean difference over all its prompts and languages."""
        effect = 1 + (self.languages - 1) * self.correlation
        return self.spread**2 * effect / (self.languages * self.prompts)

    def freedom(self) -> float:
        """Degrees of freedom of that variance."""
        return self.prompts - 1


@dataclass(frozen=True, slots=True)
class MixedAxis:
    """One axis whose prompts do not all stand in the same languages: languages -> how many parallel prompts have just these.

    The mean is that of the languages' means, as in every score: a prompt weighs the more, the fewer its languages have.
    """

    groups: Mapping[tuple[str, ...], int]
    spread: float
    correlation: float = LANGUAGES_ALIKE

    @property
    def prompts(self) -> int:
        return sum(self.groups.values())

    def variance(self) -> float:
        """Variance of the mean over languages of the mean difference."""
        return sum(self._shares())

    def freedom(self) -> float:
        """Degrees of freedom of that variance: of as many equal prompts as would know it as well (Satterthwaite 1946)."""
        shares = self._shares()
        squares = sum(share**2 / n for share, n in zip(shares, self.groups.values(), strict=True))
        return sum(shares) ** 2 / squares - 1 if squares else self.prompts - 1

    def _shares(self) -> list[float]:
        """What the prompts of each group add to the variance."""
        cells: dict[str, int] = {}
        for languages, prompts in self.groups.items():
            for language in languages:
                cells[language] = cells.get(language, 0) + prompts
        shares = []
        for languages, prompts in self.groups.items():
            weights = np.array([1 / (cells[language] * len(cells)) for language in languages])
            alone, together = float((weights**2).sum()), float(weights.sum()) ** 2
            shares.append(prompts * self.spread**2 * ((1 - self.correlation) * alone + self.correlation * together))
        return shares


def rate_spread(rate: float = RATE, alike: float = ALIKE) -> float:
    """Standard deviation of the difference of two candidates' 0/1 answers to one prompt, both having this rate.

    >>> round(rate_spread(0.5, alike=0), 3), round(rate_spread(0.3, alike=0.3), 3)
    (0.707, 0.542)
    """
    return float(np.sqrt(2 * rate * (1 - rate) * (1 - alike)))


def win_spread(ties: float = TIES) -> float:
    """Standard deviation of a win-or-loss against the base (1, 0.5, 0 less a half) where neither is better.

    >>> win_spread(0), round(win_spread(0.2), 3)
    (0.5, 0.447)
    """
    return float(np.sqrt((1 - ties) / 4))


def detectable(
    axes: Sequence[Axis | MixedAxis], *, level: float = 0.95, power: float = POWER, comparisons: int = 1
) -> float:
    """The least difference that a two-sided test at 1 - level finds with this power; infinite where none can be found.

    One axis asks about that axis; several about their mean (the balance), over prompts of their own. `comparisons`: how many
    candidates share the level by Holm's correction, whose first step is Bonferroni's. Above 1 means: not even the greatest.

    Measured on simulated yes-or-no verdicts in four languages: studies with the prompts asked for at power 0.8 find the
    difference in 80 % of cases from 60 prompts on, in 76 to 78 % with 14 to 31.
    """
    alpha = (1 - level) / comparisons
    if min(axis.prompts for axis in axes) < 2 or 2.0 ** (1 - sum(axis.prompts for axis in axes)) > alpha:
        return float("inf")
    variances = np.array([axis.variance() for axis in axes])
    total = float(variances.sum())
    if total == 0:
        return 0.0
    # Satterthwaite 1946: axes of unequal weight have fewer degrees of freedom than clusters
    each = np.array([axis.freedom() for axis in axes])
    freedom = total**2 / float((variances**2 / each).sum()) if each.min() > 0 else 0.0
    if freedom < 1:  # a language or two of one prompt alone: its spread is not known
        return float("inf")
    return _shift(alpha, power, freedom) * float(np.sqrt(total)) / len(axes)


def _shift(alpha: float, power: float, freedom: float) -> float:
    """How many standard errors from nought a mean must be, that a t-test finds it with this power."""
    limit = -float(special.stdtrit(freedom, alpha / 2))
    # The noncentral t as a mean over its chi, at midpoints of equal probability: scipy's own gives NaN in the far tail.
    middles = (np.arange(QUADRATURE) + 0.5) / QUADRATURE
    limits = limit * np.sqrt(2 * special.gammaincinv(freedom / 2, middles) / freedom)

    def short(shift: float) -> float:
        return float((special.ndtr(shift - limits) + special.ndtr(-shift - limits)).mean()) - power

    low, high = 0.0, 2.0 * (limit + 1)
    while short(high) < 0:
        high *= 2
    while high - low > NEAR * high:
        middle = (low + high) / 2
        low, high = (middle, high) if short(middle) < 0 else (low, middle)
    return (low + high) / 2


def prompts_needed(
    difference: float, axis: Axis, *, level: float = 0.95, power: float = POWER, comparisons: int = 1
) -> int:
    """Parallel prompts that show `difference` on one axis with this power; `axis.prompts` is not read.

    Raises:
        ValueError: more than a million, or a difference that is not above nought.
    """

    def enough(prompts: int) -> bool:
        tried = Axis(prompts, axis.languages, axis.spread, axis.correlation)
        return detectable([tried], level=level, power=power, comparisons=comparisons) <= difference

    if difference <= 0 or not enough(MOST_PROMPTS):
        raise ValueError(f"a difference of {difference:g} takes more than {MOST_PROMPTS:,} prompts")
    low, high = 1, 2  # `low` is never enough
    while not enough(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def measured(values: Array, first: int, second: int) -> Axis:
    """The axis that verdicts have shown: spread and correlation of two candidates' paired differences.

    values: (C, L, P), NaN where there is no value. The spread is within languages (a candidate that is better in one language
    than in another is no noise); the correlation is the mean over pairs of languages, weighted by the prompts that both have.
    One language, or no shared prompts, gives correlation 0.

    Raises:
        ValueError: fewer than two prompts in every language.
    """
    differences = values[first] - values[second]
    known = ~np.isnan(differences)
    here = known.sum(axis=1) > 1
    differences, known = differences[here], known[here]
    if not here.any():
        raise ValueError("a spread takes two prompts in some language")
    counts = known.sum(axis=1)
    apart = np.where(known, differences - np.nanmean(differences, axis=1, keepdims=True), 0)
    spread2 = float(((apart**2).sum(axis=1) / (counts - 1)).mean())
    both = known.astype(np.float64) @ known.T
    shared = (both - 1) * ((both > 1) & ~np.eye(len(both), dtype=bool))
    products = (apart @ apart.T)[shared > 0].sum()
    correlation = products / shared.sum() / spread2 if shared.any() and spread2 > 0 else 0.0
    languages, prompts = len(values[first]), int(known.any(axis=0).sum())
    least = -1 / (languages - 1) if languages > 1 else 0.0  # below it, a mean would have negative variance
    return Axis(prompts, languages, float(np.sqrt(spread2)), float(np.clip(correlation, least, 1)))
