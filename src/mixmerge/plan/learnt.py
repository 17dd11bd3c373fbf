"""From what earlier steps took to what one to come will take: a line through their work and cost, with the spread around it.

The one idea: cost grows in proportion to work, after a start that costs the same every time. The start is told apart only where
the records cover a range of work; few records, or a step far from all of them, widen the range that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

APART = 2.0  # the work of records that a start can be told apart with, largest to smallest
ALONE = 1.5  # range of what one record tells, either way
FAR = 4.0  # beyond the records by so much, the range is widened by ALONE


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with its range and where it comes from."""

    value: float
    low: float
    high: float
    source: str

    def to_json(self) -> dict[str, float | str]:
        return {"value": self.value, "low": self.low, "high": self.high, "source": self.source}

    def times(self, factor: float) -> Amount:
        return Amount(self.value * factor, self.low * factor, self.high * factor, self.source)


def from_rough(value: float, source: str, spread: float) -> Amount:
    """An amount by rates: the range is `spread` either way."""
    return Amount(value, value / spread, value * spread, source)


def from_records(points: Sequence[tuple[float, float]], work: float, source: str, *, wider: float = 1.0) -> Amount:
    """What `work` costs by (work, cost) of earlier steps, at least one; `wider`: they are not quite alike.

    >>> found = from_records([(10, 20.0), (20, 40.0)], 30, "here")
    >>> found.value, found.low, found.high
    (60.0, 60.0, 60.0)
    """
    start, slope = _line(points)
    value = start + slope * work
    ratios = [cost / said for amount, cost in points if (said := start + slope * amount) > 0] or [1.0]
    low, high = min(1.0, *ratios, 1.0), max(1.0, *ratios, 1.0)
    if len(points) == 1:
        low, high = 1 / ALONE, ALONE
    amounts = [amount for amount, _ in points]
    if work > FAR * max(amounts) or work < min(amounts) / FAR:
        wider *= ALONE
    return Amount(value, value * low / wider, value * high * wider, source)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(start, slope), neither below nought: least squares where the work differs enough, else the median share."""
    amounts = [amount for amount, _ in points]
    if max(amounts) > APART * min(amounts):
        mean = sum(amounts) / len(points)
        middle = sum(cost for _, cost in points) / len(points)
        spread = sum((amount - mean) ** 2 for amount in amounts)
        slope = sum((amount - mean) * (cost - middle) for amount, cost in points) / spread
        start = middle - slope * mean
        if slope > 0 and start >= 0:
            return start, slope
        if slope <= 0:
            return middle, 0.0
    return 0.0, median(cost / amount for amount, cost in points)
