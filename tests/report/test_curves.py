"""Curves as static SVG: true to the steps, small however long a training was, comparable, nothing active."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.report.curves import FINEST, Line, curve_chart, limits, shared_limits, smoothed, thinned

values = st.floats(-50, 50, allow_nan=False)
series = st.lists(values, min_size=1, max_size=400).map(
    lambda found: [(float(step), value) for step, value in enumerate(found, 1)]
)
FALLING = [(float(step), 3.0 - step / 50) for step in range(1, 101)]


def drawn(svg: str, colour: str) -> list[str]:
    """The paths of the lines in a colour."""
    return re.findall(rf'<path d="([^"]*)" stroke="{re.escape(colour)}"', svg)


def test_a_chart_draws_every_line_in_its_own_colour_and_width() -> None:
    lines = [
        Line(FALLING, "var(--accent)", faint=True),
        Line(FALLING, "var(--accent)"),
        Line(FALLING[::20], "var(--caution)", dashed=True, dots=True),
    ]
    svg = curve_chart(lines, limits=(0.5, 3.5), steps=100, height=120)
    assert len(drawn(svg, "var(--accent)")) == 2
    assert len(drawn(svg, "var(--caution)")) == 1
    assert svg.count('fill="var(--caution)"') == 5
    assert svg.count("stroke-dasharray") == 1
    assert 'opacity="0.4"' in svg


def test_a_curve_holds_nothing_active_takes_its_colours_from_the_page_and_has_no_ids() -> None:
    svg = curve_chart([Line(FALLING, "var(--ink)", dots=True)], limits=(1, 2), steps=100, height=90, zero=True)
    tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
    assert tags <= {"svg", "g", "path", "line", "text", "rect"}
    assert not re.search(r"\bon\w+=|style=|href=|http|\bid=", svg), "many stand on one page: ids would clash"
    colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', svg))
    assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none", "transparent"}


def test_a_training_of_many_thousand_steps_draws_as_little_as_a_short_one() -> None:
    long = [(float(step), 2.0 + (step % 7) / 10) for step in range(1, 50_001)]
    svg = curve_chart([Line(long, "var(--ink)"), Line(smoothed(long), "red")], limits=(1, 3), steps=5e4, height=100)
    assert len(svg) < 12_000
    assert "50,000" in svg


def test_one_step_is_a_dot_because_a_line_of_one_point_is_not_seen() -> None:
    svg = curve_chart([Line([(1.0, 2.5)], "var(--accent)")], limits=(2, 3), steps=1, height=90)
    assert 'fill="var(--accent)"' in svg


def test_a_value_outside_the_limits_is_drawn_at_the_edge_and_not_beyond() -> None:
    def heights(spike: float) -> list[str]:
        points = [(1.0, 1.0), (2.0, spike), (3.0, 1.0)]
        return drawn(curve_chart([Line(points, "var(--ink)")], limits=(0, 2), steps=3, height=100), "var(--ink)")

    assert heights(2.0) == heights(99.0) != heights(1.5)


@pytest.mark.parametrize(("limits_", "there"), [((-1.0, 1.0), True), ((0.5, 1.0), False)])
def test_the_line_at_zero_is_there_where_the_limits_hold_it(limits_: tuple[float, float], there: bool) -> None:
    svg = curve_chart([Line(FALLING, "var(--ink)")], limits=limits_, steps=100, height=90, zero=True)
    assert ('stroke="var(--muted)"' in svg) is there


def test_the_same_lines_give_the_same_bytes_again() -> None:
    lines = [Line(FALLING, "var(--ink)")]
    first, again = (curve_chart(lines, limits=(1, 3), steps=100, height=90) for _ in range(2))
    assert first == again


@given(series)
def test_thinning_keeps_both_ends_and_only_points_that_were_there(points: list[tuple[float, float]]) -> None:
    found = thinned(points)
    assert len(found) == min(len(points), FINEST)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert set(found) <= set(points)
    assert sorted({step for step, _ in found}) == [step for step, _ in found]


@given(series)
def test_smoothing_keeps_the_steps_and_stays_within_what_was_measured(points: list[tuple[float, float]]) -> None:
    found = smoothed(points)
    assert [step for step, _ in found] == [step for step, _ in points]
    low, high = min(value for _, value in points), max(value for _, value in points)
    assert all(low - 1e-6 <= value <= high + 1e-6 for _, value in found)


def test_smoothing_is_light_and_leaves_short_trainings_as_they_are() -> None:
    short = [value for _, value in smoothed(FALLING[:29])]
    assert short == pytest.approx([value for _, value in FALLING[:29]])
    noisy = [(step, value + (0.5 if step % 2 else -0.5)) for step, value in FALLING]
    found = dict(smoothed(noisy))
    assert all(abs(found[step] - value) < 0.2 for step, value in FALLING)


@given(st.lists(series, min_size=1, max_size=4))
def test_limits_hold_every_value_that_is_not_faint_with_air_around(many: list[list[tuple[float, float]]]) -> None:
    low, high = limits([Line(points, "x") for points in many])
    everything = [value for points in many for _, value in points]
    assert low < min(everything)
    assert max(everything) < high


def test_a_few_wild_steps_do_not_flatten_the_rest_of_the_curve() -> None:
    wild = [(step, 900.0 if step == 3 else value) for step, value in FALLING]
    assert limits([Line(wild, "x", faint=True)])[1] < 4
    assert limits([Line(wild, "x")])[1] > 900


@given(st.lists(st.tuples(values, st.floats(0.1, 10)).map(lambda s: (s[0], s[0] + s[1])), min_size=1, max_size=8))
def test_a_shared_axis_holds_all_charts_or_there_is_none(spans: list[tuple[float, float]]) -> None:
    shared = shared_limits(spans)
    if shared is not None:
        assert all(shared[0] <= low and high <= shared[1] for low, high in spans)
    if len(spans) == 1:
        assert shared == spans[0]
