"""From what earlier steps took to what one to come will take: a line through their work and cost, with the spread around it.

The one idea: cost grows in proportion to work, after a start that costs the same every time. Records that cover a range of work
tell the start apart; else it is what is known of it. For more or less work than theirs the range goes from a cost that is
as much start as may be to one that is all work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

APART = 2.0  # the work of records that a start can be told apart with, largest to smallest
ALONE = 1.5  # range of what one record tells, and of what lies beyond all of them, either way


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


def from_records(
    points: Sequence[tuple[float, float]],
    work: float,
    source: str,
    *,
    start: float | None = 0.0,
    most: float = math.inf,
    wider: float = 1.0,
) -> Amount:
    """What `work` costs by (work, cost) of earlier steps, at least one.

    `start`: the cost of a step however little it does, where the records do not tell it apart; None: between nothing and
    `most`, and the value is the middle of what may be. `wider`: the records are not quite alike.

    >>> found = from_records([(10, 20.0)], 40, "here", start=None, most=15.0)
    >>> found.value, found.low * ALONE**2, found.high / ALONE**2
    (52.91502622129181, 35.0, 80.0)
    """
    begin, slope, told = _line(points, start)
    value = begin + slope * work
    ratios = [cost / said for amount, cost in points if (said := begin + slope * amount) > 0]
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    if len(points) == 1:
        low, high = 1 / ALONE, ALONE
    ends = _beyond(points, work, most)
    if ends is None:
        return Amount(value, value * low / wider, value * high * wider, source)
    if not told:
        value = math.sqrt(ends[0] * ends[1])
    return Amount(value, min(value, *ends) * low / ALONE / wider, max(value, *ends) * high * ALONE * wider, source)


def reaching(found: Amount, other: Amount, by: float) -> Amount:
    """The amount, its range drawn towards that of another word on it, by so much at most.

    >>> reaching(Amount(16.0, 11.0, 24.0, "1 earlier merge"), Amount(1.5, 0.5, 4.5, "rough"), 20.0).low
    0.5
    """
    low, high = max(other.low, found.low - by), min(other.high, found.high + by)
    return Amount(found.value, min(found.low, low), max(found.high, high), found.source)


def _beyond(points: Sequence[tuple[float, float]], work: float, most: float) -> tuple[float, float] | None:
    """Of less or more work than any record's: what it costs if of the nearest one's cost nothing was its start, and `most`."""
    amounts = [amount for amount, _ in points]
    nearest = min(max(work, min(amounts)), max(amounts))
    if nearest == work:
        return None
    cost = median(cost for amount, cost in points if amount == nearest)
    start = min(most, cost)
    ends = start + (cost - start) * work / nearest, cost * work / nearest
    return min(ends), max(ends)


def _line(points: Sequence[tuple[float, float]], told: float | None) -> tuple[float, float, bool]:
    """(start, slope), neither below nought, and whether the start is known.

    Least squares where the work differs enough, else by the start that is told.
    """
    amounts = [amount for amount, _ in points]
    if max(amounts) > APART * min(amounts):
        mean = sum(amounts) / len(points)
        middle = sum(cost for _, cost in points) / len(points)
        spread = sum((amount - mean) ** 2 for amount in amounts)
        slope = sum((amount - mean) * (cost - middle) for amount, cost in points) / spread
        start = middle - slope * mean
        if slope > 0 and start >= 0:
            return start, slope, True
        if slope <= 0:
            return middle, 0.0, True
        told = 0.0
    start = min([told or 0.0, *(cost for _, cost in points)])
    return start, median((cost - start) / amount for amount, cost in points), told is not None
