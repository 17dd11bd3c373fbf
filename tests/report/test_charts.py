"""Charts as static SVG: every candidate in its place with its name, colours from the page, nothing active."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.report.charts import LETTER, Point, _domain, _label_places, difference_chart, pareto_chart

POINTS = [
    Point("base", "base", (74, 68, 80), (50, 50, 50), False),
    Point("mix", "baseline", (30, 22, 41), (64, 55, 72), True),
    Point("a<b>&'merge'", "merge", (31, 25, 40), (66, 57, 75), True),
    Point("adopted", "adopted", (12, 6, 20), (58, 49, 66), True),
]
SIZE = {"width": 600, "height": 400, "x_title": "Harm rate, %", "y_title": "Win rate, %"}


def texts(svg: str) -> list[str]:
    return [found.text or "" for found in ElementTree.fromstring(svg).iter("text")]


def test_every_candidate_is_named_over_its_halo_and_axes_are_titled() -> None:
    found = texts(pareto_chart(POINTS, **SIZE))
    for point in POINTS:
        assert found.count(point.name) == 2
    assert {"Harm rate, %", "Win rate, %"} <= set(found)


def test_colours_come_from_the_page_so_that_one_picture_serves_light_and_dark() -> None:
    svg = pareto_chart(POINTS, **SIZE) + difference_chart(
        [("Balance", {"value": 0.1, "low": 0, "high": 0.2})], width=300, x_title="x"
    )
    colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', svg))
    assert {c for c in colours if not c.startswith("var(--")} <= {"none", "transparent"}
    assert {"var(--base)", "var(--baseline)", "var(--merge)", "var(--ink)"} <= colours


def test_a_picture_holds_nothing_active_and_refers_to_nothing() -> None:
    svg = pareto_chart(POINTS, **SIZE)
    assert {e.tag for e in ElementTree.fromstring(svg).iter()} <= {
        "svg",
        "g",
        "path",
        "line",
        "text",
        "rect",
        "defs",
        "clipPath",
    }
    assert not re.search(r"\bon\w+=|style=|href=|http", svg)


def test_marks_on_the_front_are_filled_and_the_others_hollow() -> None:
    marks = re.findall(
        r'fill="(var\(--(?:paper|\w+)\))" stroke="(var\(--\w+\))" stroke-width="2"', pareto_chart(POINTS, **SIZE)
    )
    assert marks == [
        ("var(--paper)", "var(--base)"),
        ("var(--baseline)", "var(--baseline)"),
        ("var(--merge)", "var(--merge)"),
        ("var(--ink)", "var(--ink)"),
    ]


def test_differences_are_written_in_points_with_a_real_minus_sign() -> None:
    rows = [("Balance", {"value": -0.034, "low": -0.1, "high": 0.03}), ("Win", {"value": 0.2, "low": 0.1, "high": 0.3})]
    found = texts(difference_chart(rows, width=300, x_title="mix or merge"))
    assert {"Balance", "Win", "\u22123.4", "+20.0", "mix or merge"} <= set(found)


def test_a_head_with_quotes_does_not_break_the_chart() -> None:
    rows = [('it\'s "so" \\ <b>', {"value": 0.0, "low": 0.0, "high": 0.0})]
    assert 'it\'s "so" \\ <b>' in texts(difference_chart(rows, width=300, x_title="x"))


def test_the_same_points_give_the_same_bytes() -> None:
    assert pareto_chart(POINTS, **SIZE) == pareto_chart(POINTS, **SIZE)


@pytest.mark.parametrize(("values", "expected"), [([0, 10], (0, 12)), ([95, 100], (93, 100)), ([40, 40], (38, 42))])
def test_the_axis_has_air_and_stays_within_what_can_be(values: list[float], expected: tuple[float, float]) -> None:
    assert _domain(values) == pytest.approx(expected)


def test_a_long_name_loses_its_middle_and_keeps_its_ends() -> None:
    long = "merge-of-six-monolingual-models-ties-density-0.5"
    svg = pareto_chart([*POINTS, Point(long, "merge", (50, 45, 55), (60, 55, 65), True)], **SIZE)
    assert long not in svg
    assert any(t.startswith("merge-") and t.endswith("-0.5") and "\u2026" in t for t in texts(svg))


def boxes(points: list[Point], width: int, height: int) -> list[tuple[float, float, float, float]]:
    """Where the names stand, in pixels."""
    xs, ys = _domain([v for p in points for v in p.x]), _domain([v for p in points for v in p.y])
    found = []
    for point, (x, y, *_) in zip(points, _label_places(points, (xs, ys), width, height), strict=True):
        left = (x - xs[0]) / (xs[1] - xs[0]) * width
        middle = height - (y - ys[0]) / (ys[1] - ys[0]) * height
        found.append((left, middle - 8, left + LETTER * len(point.name), middle + 8))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(5, 95), st.floats(5, 95)), min_size=2, max_size=12, unique=True))
def test_names_stay_inside_the_chart(places: list[tuple[float, float]]) -> None:
    points = [
        Point(f"candidate-{i}", "merge", (x, x - 4, x + 4), (y, y - 4, y + 4), False) for i, (x, y) in enumerate(places)
    ]
    for left, top, right, bottom in boxes(points, 600, 400):
        assert left >= -0.01
        assert right <= 600.01
        assert top >= -0.01
        assert bottom <= 400.01


def test_twelve_near_candidates_have_names_that_do_not_cover_each_other() -> None:
    names = [
        "base",
        "general",
        "safety",
        "mix-15",
        "mix-50",
        "linear-0.3",
        "linear-0.5",
        "slerp",
        "ties",
        "dare-ties",
        "task-arith",
        "soup",
    ]
    points = [
        Point(
            name, "merge", (30 + 3 * (i % 4), 22 + 3 * (i % 4), 40 + 3 * (i % 4)), (60 + 2.5 * (i // 4), 52, 72), False
        )
        for i, name in enumerate(names)
    ]
    for width, height in ((1020, 480), (290, 380)):
        found = boxes(points, width, height)
        for i, a in enumerate(found):
            for b in found[:i]:
                covered = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
                assert covered < 40, (width, a, b)  # square pixels: less than half a letter
