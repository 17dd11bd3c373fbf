"""Curves over the steps of a training as static SVG: small, many on a page, and comparable.

One idea: a chart draws lines that are ready to draw (thinned, smoothed, coloured) within limits that it is given, so that
charts beside each other can have one axis. Values outside the limits are drawn at the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mixmerge.report.charts import Span, svg

Points = Sequence[tuple[float, float]]  # step, value

FINEST = 120  # points of a line: more cannot be told apart at this width
WIDTH = 286  # pixels, without the numbers of the y axis
NUMBERS = 36  # pixels for these, always, so that charts in a column line up
ALIKE = 4  # an axis is shared where it is at most so many times as long as the charts' own, by their median


@dataclass(frozen=True, slots=True)
class Line:
    """Points and how they are drawn: a CSS colour, faint or dashed or neither, with a dot at every point or without."""

    points: Points
    colour: str
    faint: bool = False
    dashed: bool = False
    dots: bool = False


def curve_chart(lines: Sequence[Line], *, limits: Span, steps: float, height: int, zero: bool = False) -> str:
    """Draw lines over 0 to `steps`; `zero` adds a line at zero where the limits hold it."""
    import altair as alt

    x_axis = alt.Axis(tickCount=4, tickMinStep=1, format=",d", grid=False)
    y_axis = alt.Axis(
        tickCount=4, format="~g", minExtent=NUMBERS, maxExtent=NUMBERS, domain=False, ticks=False, labelPadding=7
    )
    x = alt.X("x:Q", title=None, scale=alt.Scale(domain=[0, max(1, steps)], nice=False), axis=x_axis)
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=list(limits), nice=False, zero=False, clamp=True), axis=y_axis)
    layers: list[Any] = []
    if zero and limits[0] <= 0 <= limits[1]:
        layers.append(alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color="var(--muted)").encode(y=y))
    for line in lines:
        data = alt.Chart(alt.Data(values=[{"x": step, "y": value} for step, value in thinned(line.points)]))
        dash = {"strokeDash": [4, 3]} if line.dashed else {}
        look = {"strokeWidth": 1, "opacity": 0.4} if line.faint else {"strokeWidth": 2}
        layers.append(data.mark_line(color=line.colour, strokeJoin="round", **look, **dash).encode(x=x, y=y))
        if line.dots or len(line.points) == 1:
            layers.append(data.mark_point(filled=True, size=22, opacity=1, color=line.colour).encode(x=x, y=y))
    return svg(alt.layer(*layers).properties(width=WIDTH, height=height))


def thinned(points: Points, most: int = FINEST) -> Points:
    """At most so many of the points, evenly spaced, the first and the last among them.

    >>> thinned([(step, 0.0) for step in range(1, 10)], most=3)
    [(1, 0.0), (5, 0.0), (9, 0.0)]
    """
    if len(points) <= most:
        return points
    return [points[round(at * (len(points) - 1) / (most - 1))] for at in range(most)]


def smoothed(points: Points) -> Points:
    """Running means over about a fifteenth of the steps around each, as far as there are any.

    >>> smoothed([(1, 0.0), (2, 3.0)])
    [(1, 0.0), (2, 3.0)]
    """
    reach = len(points) // 30
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for at, (step, _) in enumerate(points):
        first, after = max(0, at - reach), min(len(points), at + reach + 1)
        found.append((step, (sums[after] - sums[first]) / (after - first)))
    return found


def limits(lines: Sequence[Line]) -> Span:
    """From the lowest to the highest value with some air; of many faint points the outermost fiftieths do not count."""
    values: list[float] = []
    for line in lines:
        ranked = sorted(value for _, value in line.points)
        cut = len(ranked) // 50 if line.faint else 0
        values += [ranked[cut], ranked[-1 - cut]] if ranked else []
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(0.05 * abs(high), 1e-6)
    return low - air, high + air


def shared_limits(own: Sequence[Span]) -> Span | None:
    """The limits that hold all of these, or None where most charts would be flat within them.

    >>> shared_limits([(1.0, 2.0), (1.5, 3.0)]), shared_limits([(1.0, 2.0), (1.0, 2.0), (40.0, 90.0)])
    ((1.0, 3.0), None)
    """
    low, high = min(span[0] for span in own), max(span[1] for span in own)
    return (low, high) if high - low <= ALIKE * median(top - bottom for bottom, top in own) else None
