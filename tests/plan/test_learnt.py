"""From what earlier steps took to what one to come takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.plan.learnt import ALONE, Amount, from_records, from_rough

POINTS = st.lists(st.tuples(st.floats(1, 1e6), st.floats(0.01, 1e5)), min_size=1, max_size=12)


def test_one_record_is_scaled_by_the_work_and_has_a_range():
    found = from_records([(10, 4.0)], 20, "1 earlier merge here")
    assert found == Amount(8.0, 8.0 / ALONE, 8.0 * ALONE, "1 earlier merge here")


def test_records_of_the_same_work_give_their_median_and_their_spread():
    found = from_records([(10, 9.0), (10, 10.0), (10, 14.0)], 10, "here")
    assert (found.value, found.low, found.high) == (10.0, pytest.approx(9.0), pytest.approx(14.0))


def test_a_start_that_costs_the_same_every_time_is_told_apart():
    points = [(10, 5 + 1.0), (50, 5 + 5.0), (100, 5 + 10.0)]
    assert from_records(points, 200, "here").value == pytest.approx(25)
    assert from_records(points, 20, "here").value == pytest.approx(7)


def test_cost_that_does_not_grow_with_the_work_stays_as_it_is():
    assert from_records([(10, 3.0), (100, 3.0)], 50, "here").value == pytest.approx(3)
    assert from_records([(10, 5.0), (100, 3.0)], 50, "here").value == pytest.approx(4)


def test_a_start_below_nought_is_none():
    assert from_records([(10, 1.0), (100, 100.0)], 200, "here").value == pytest.approx(200 * (0.1 + 1.0) / 2)


def test_far_from_the_records_the_range_is_wider():
    points = [(10, 10.0), (12, 12.0)]
    near, far = from_records(points, 11, "here"), from_records(points, 500, "here")
    assert near.high / near.value == pytest.approx(1)
    assert far.high / far.value == pytest.approx(ALONE)
    assert from_records(points, 1, "here").low == pytest.approx(1 / ALONE)


def test_records_that_are_not_quite_alike_widen_the_range():
    found = from_records([(10, 10.0), (12, 12.0)], 11, "here", wider=2.0)
    assert (found.low, found.value, found.high) == (pytest.approx(5.5), pytest.approx(11), pytest.approx(22))


@given(POINTS, st.floats(1, 1e6))
def test_the_range_holds_the_value_and_nothing_is_below_nought(points, work):
    found = from_records(points, work, "here")
    assert 0 <= found.low <= found.value <= found.high


@given(POINTS, st.floats(1, 1e6), st.floats(0.01, 100))
def test_twice_the_cost_of_every_record_is_twice_the_estimate(points, work, factor):
    once = from_records(points, work, "here")
    more = from_records([(amount, cost * factor) for amount, cost in points], work, "here")
    assert more.value == pytest.approx(once.value * factor, rel=1e-6, abs=1e-9)


def test_a_rough_amount_has_its_spread_either_way():
    assert from_rough(30.0, "rough", 3.0) == Amount(30.0, 10.0, 90.0, "rough")
    assert from_rough(30.0, "rough", 3.0).times(2) == Amount(60.0, 20.0, 180.0, "rough")
