"""Charts as inline, static SVG: Altair describes them and vl-convert draws them, here and now.

Nothing of them runs on the page: Vega's script would be half a megabyte that a content security policy has to allow, for
pictures of a dozen points that need no interaction. Colours are CSS variables of the page, so that one SVG serves light
and dark. Labels are placed here, because Vega-Lite places none: each beside its point, where it covers the least.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mixmerge.report.words import KIND_ORDER, number

FONT = "system-ui, sans-serif"
FONT_SIZE = 12
LETTER = 6.6  # width of an average letter at that size, on the wide side: an SVG cannot ask the reader's font
SHAPES = {"base": "diamond", "expert": "square", "baseline": "triangle-up", "merge": "circle"}
NUMBERS = 46  # pixels for a column of numbers beside a chart
LED = 12  # pixels; a name further from its mark has a leader line
Box = tuple[float, float, float, float]
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate on two axes, in percent: x and y with their intervals."""

    name: str
    kind: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    on_front: bool


def pareto_chart(points: Sequence[Point], *, width: int, height: int, x_title: str, y_title: str) -> str:
    """Draw candidates with both intervals and their names; filled marks are on the front, hollow ones are not."""
    import altair as alt

    domains = _domain([v for p in points for v in p.x]), _domain([v for p in points for v in p.y])
    points = [replace(p, name=shortened(p.name, max(16, width // 36))) for p in points]
    places = _label_places(points, domains, width, height)
    scales = [alt.Scale(domain=list(d), nice=False, zero=False) for d in domains]
    ticks = max(4, width // 90)
    x = alt.X("x:Q", title=x_title, scale=scales[0], axis=alt.Axis(tickCount=ticks))
    y = alt.Y("y:Q", title=y_title, scale=scales[1], axis=alt.Axis(tickCount=max(4, height // 70)))
    values = [
        {
            "name": p.name,
            **dict(zip(("x", "x_low", "x_high"), p.x, strict=True)),
            **dict(zip(("y", "y_low", "y_high"), p.y, strict=True)),
            **dict(zip(("lx", "ly", "px", "py", "led"), place, strict=True)),
            "colour": _colour(p.kind),
            "fill": _colour(p.kind) if p.on_front else "var(--paper)",
            "shape": SHAPES.get(p.kind, "cross"),
        }
        for p, place in zip(points, places, strict=True)
    ]
    data, led = (alt.Chart(alt.Data(values=found)) for found in (values, [v for v in values if v["led"]]))
    stroke, fill, shape = (
        alt.Stroke("colour:N", scale=None),
        alt.Fill("fill:N", scale=None),
        alt.Shape("shape:N", scale=None),
    )
    thin = {"strokeWidth": 1, "opacity": 0.55}
    text = {"align": "left", "baseline": "middle", "fontSize": FONT_SIZE, "fontWeight": 500}
    halo = {"color": "var(--paper)", "stroke": "var(--paper)", "strokeWidth": 4, "strokeJoin": "round"}
    at = {"x": alt.X("lx:Q", scale=scales[0]), "y": alt.Y("ly:Q", scale=scales[1]), "text": "name:N"}
    layers = [
        data.mark_rule(**thin).encode(x=alt.X("x_low:Q", scale=scales[0]), x2="x_high:Q", y=y, stroke=stroke),
        data.mark_rule(**thin).encode(x=x, y=alt.Y("y_low:Q", scale=scales[1]), y2="y_high:Q", stroke=stroke),
        led.mark_rule(color="var(--muted)", strokeWidth=0.75).encode(x=x, y=y, x2="px:Q", y2="py:Q"),
        data.mark_text(**text, **halo).encode(**at),
        data.mark_point(size=80, opacity=1, strokeWidth=2).encode(x=x, y=y, stroke=stroke, fill=fill, shape=shape),
        data.mark_text(**text, color="var(--ink)").encode(**at),
    ]
    return svg(alt.layer(*layers).properties(width=width, height=height))


def difference_chart(rows: Sequence[tuple[str, Mapping[str, float]]], *, width: int, x_title: str) -> str:
    """Draw differences (fractions, as points) with their intervals around zero, one row each, the first one strongest."""
    import altair as alt

    heads = [head for head, _ in rows]
    values: list[dict[str, Any]] = [{"head": h, **{k: 100 * v[k] for k in ("value", "low", "high")}} for h, v in rows]
    for value in values:
        value["text"] = number(value["value"], signed=True).replace("-", "\u2212")
    reach = 1.12 * max(2.0, *(abs(v[k]) for v in values for k in ("low", "high")))
    scale = alt.Scale(domain=[-reach, reach], nice=False)
    axis = alt.Axis(tickCount=max(3, width // 80), format="+d", labelExpr="replace(datum.label, '+0', '0')")
    x = alt.X("value:Q", title=x_title, scale=scale, axis=axis)
    y = alt.Y("head:N", title=None, sort=heads, axis=alt.Axis(ticks=False, domain=False, labelLimit=0, grid=False))
    data = alt.Chart(alt.Data(values=values))
    strong = alt.condition(f"datum.head == {heads[0]!r}", alt.value(4), alt.value(2))
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(color="var(--ink)", strokeWidth=1).encode(x="value:Q")
    lines = data.mark_rule(color="var(--accent)").encode(
        y=y, x=alt.X("low:Q", scale=scale), x2="high:Q", strokeWidth=strong
    )
    dots = data.mark_point(filled=True, size=70, color="var(--accent)", opacity=1).encode(x=x, y=y)
    # numbers stand in a column of their own: beside the marks they would cover the zero line
    column = {"align": "right", "baseline": "middle", "fontSize": FONT_SIZE, "fontWeight": 600}
    texts = data.mark_text(**column, color="var(--ink)").encode(x=alt.value(width + NUMBERS), y=y, text="text:N")
    return svg(alt.layer(zero, lines, dots, texts).properties(width=width, height=34 * len(rows) + 10))


def shortened(name: str, most: int) -> str:
    """A name of at most so many letters: its middle left out, because names of a sweep differ at their ends.

    >>> shortened("ties-density-0.5-seed-1", 13)
    'ties-d\u2026seed-1'
    """
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}\u2026{name[-half:]}"


def _colour(kind: str) -> str:
    return f"var(--{kind})" if kind in KIND_ORDER else "var(--ink)"


def _domain(values: Sequence[float]) -> Span:
    """From the lowest to the highest value with some air, never outside 0..100."""
    low, high = min(values), max(values)
    air = max(2.0, 0.06 * (high - low))
    return max(0.0, low - air), min(100.0, high + air)


def svg(chart: Any) -> str:
    """The chart as an SVG element that scales to its box and takes its colours and font from the page."""
    import altair as alt
    import vl_convert

    chart = (
        chart.configure(
            background="transparent", font=FONT, aria=False, padding={"left": 8, "right": 6, "top": 4, "bottom": 4}
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="var(--muted)",
            titleColor="var(--ink)",
            tickColor="var(--rule)",
            domainColor="var(--rule)",
            gridColor="var(--grid)",
            labelFontSize=FONT_SIZE,
            titleFontSize=FONT_SIZE + 1,
            titleFontWeight=600,
            titlePadding=8,
        )
    )
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    drawn = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version)
    drawn = re.sub(r' (?:aria-[a-z]+|role|pointer-events|class|xmlns(?::xlink)?|version)="[^"]*"', "", drawn)
    return re.sub(r"<path d=\"[^\"]*\" display=\"none\"/>", "", drawn).replace("<svg ", '<svg aria-hidden="true" ', 1)


def _label_places(
    points: Sequence[Point], domains: tuple[Span, Span], width: int, height: int
) -> list[tuple[float, float, float, float, bool]]:
    """Where each name stands: (x, y) of its left middle, (x, y) where its leader line ends, whether it needs one.

    All in data units. Every name tries the places around its point and takes the cheapest, over a few rounds; other marks
    and names cost most, interval lines little, distance least.
    """

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = domains
        return (x - x0) / (x1 - x0) * width, height - (y - y0) / (y1 - y0) * height

    def to_data(px: float, py: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = domains
        return x0 + px / width * (x1 - x0), y0 + (height - py) / height * (y1 - y0)

    centres = [to_pixels(p.x[0], p.y[0]) for p in points]
    marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    lines: list[Box] = []
    for point, (cx, cy) in zip(points, centres, strict=True):
        lines.append((to_pixels(point.x[1], 0)[0], cy - 1, to_pixels(point.x[2], 0)[0], cy + 1))
        lines.append((cx - 1, to_pixels(0, point.y[2])[1], cx + 1, to_pixels(0, point.y[1])[1]))
    options = [
        [(box, far) for box, far in _around(centre, LETTER * len(point.name)) if _inside(box, width, height)]
        or [(_clamped(centre, LETTER * len(point.name), width, height), 0.0)]
        for point, centre in zip(points, centres, strict=True)
    ]
    chosen = [found[0] for found in options]
    for _ in range(4):
        for i, found in enumerate(options):
            others = [box for j, (box, _) in enumerate(chosen) if j != i]

            def cost(option: tuple[Box, float], i: int = i, others: list[Box] = others) -> float:
                box, far = option
                hard = sum(_overlap(box, other) for other in (*marks, *others))
                crossed = _crossings(box, centres[i], [*marks[:i], *marks[i + 1 :], *others]) if far > LED else 0
                return 20 * hard + 300 * crossed + 2 * sum(_overlap(box, line) for line in lines) + 3 * far

            chosen[i] = min(found, key=cost)
    places = []
    for (box, far), (cx, cy) in zip(chosen, centres, strict=True):
        places.append((*to_data(box[0], (box[1] + box[3]) / 2), *to_data(*_nearest(box, (cx, cy))), far > LED))
    return places


def _nearest(box: Box, centre: Span) -> Span:
    """The point of a name's box that is nearest to its mark."""
    return min(max(centre[0], box[0]), box[2]), min(max(centre[1], box[1] + 3), box[3] - 3)


def _crossings(box: Box, centre: Span, others: Sequence[Box]) -> int:
    """How many other marks and names the leader line of a name runs through."""
    x, y = _nearest(box, centre)
    steps = [(x + t / 9 * (centre[0] - x), y + t / 9 * (centre[1] - y)) for t in range(10)]
    return sum(any(b[0] <= px <= b[2] and b[1] <= py <= b[3] for px, py in steps) for b in others)


def _around(centre: tuple[float, float], wide: float) -> list[tuple[Box, float]]:
    """Boxes for a name of that width around a point, each with its distance from it; the nearest and rightmost first."""
    found = []
    for far, (dx, dy) in product(
        (9, 16, 26, 38, 52, 70), ((1, 0), (1, -1), (1, 1), (-1, 0), (-1, -1), (-1, 1), (0, -1), (0, 1))
    ):
        middle = centre[1] + dy * far
        left = centre[0] + far if dx > 0 else centre[0] - far - wide if dx < 0 else centre[0] - wide / 2
        found.append(((left, middle - 8, left + wide, middle + 8), float(far)))
    return found


def _inside(box: Box, width: int, height: int) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def _clamped(centre: tuple[float, float], wide: float, width: int, height: int) -> Box:
    left = min(max(0.0, centre[0] + 9), max(0.0, width - wide))
    middle = min(max(8.0, centre[1]), height - 8.0)
    return left, middle - 8, left + wide, middle + 8


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
