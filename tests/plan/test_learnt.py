"""From what earlier steps took to what one to come takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.plan.learnt import ALONE, Amount, from_records, from_rough, reaching

POINTS = st.lists(st.tuples(st.floats(1, 1e6), st.floats(0.01, 1e5)), min_size=1, max_size=12)


WIDE = ALONE**2  # of one record, and of work beyond it


def test_one_record_is_scaled_by_the_work_and_its_range_goes_from_all_start_to_no_start():
    found = from_records([(10, 4.0)], 20, "1 earlier merge here")
    assert found == Amount(8.0, 4.0 / ALONE / ALONE, 8.0 * ALONE * ALONE, "1 earlier merge here")
    less = from_records([(10, 4.0)], 5, "here")
    assert (less.low, less.value, less.high) == (pytest.approx(2 / WIDE), 2.0, pytest.approx(4 * WIDE))
    assert from_records([(10, 4.0)], 10, "here") == Amount(4.0, 4.0 / ALONE, 4.0 * ALONE, "here")


def test_a_start_that_is_told_does_not_grow_with_the_work():
    found = from_records([(10, 4.0)], 100, "here", start=3.0, most=3.5)
    assert found.value == pytest.approx(3 + 10)
    assert (found.low, found.high) == (pytest.approx((3.5 + 10 * 0.5) / WIDE), pytest.approx(40 * WIDE))


def test_a_start_is_no_longer_than_the_shortest_record():
    found = from_records([(10, 4.0), (10, 5.0)], 100, "here", start=9.0, most=9.0)
    assert found.value == pytest.approx(4 + 10 * 0.5)
    assert found.low <= 4.5, "all start"
    assert found.high >= 45, "none"


def test_a_start_that_nobody_knows_gives_the_middle_of_what_may_be():
    short, long = (from_records([(10, cost)], 1000, "here", start=None, most=20.0) for cost in (5.0, 3620.0))
    assert short.value == pytest.approx((5 * 500) ** 0.5)
    assert long.value == pytest.approx(362_000, rel=0.01), "an hour is not all start"
    assert long.low > 150_000
    assert from_records([(10, 5.0)], 10, "here", start=None).value == 5.0


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
    assert from_records([(10, 1.0), (100, 100.0)], 90, "here").value == pytest.approx(90 * (0.1 + 1.0) / 2)


def test_beyond_the_records_the_range_holds_what_start_and_work_may_be():
    points = [(10, 10.0), (12, 12.0)]
    near, far = from_records(points, 11, "here"), from_records(points, 500, "here")
    assert (near.low, near.high) == (pytest.approx(11), pytest.approx(11))
    assert (far.low, far.value, far.high) == (pytest.approx(12 / ALONE), pytest.approx(500), pytest.approx(500 * ALONE))
    little = from_records(points, 1, "here")
    assert (little.low, little.high) == (pytest.approx(1 / ALONE), pytest.approx(10 * ALONE))


def test_within_records_of_much_and_of_little_work_the_range_is_their_spread():
    points = [(10, 6.0), (50, 10.0), (100, 15.0)]
    found = from_records(points, 70, "here", start=4.0)
    assert (found.low, found.value, found.high) == (pytest.approx(12), pytest.approx(12), pytest.approx(12))


@given(st.floats(0, 50), st.floats(0.001, 50), st.floats(1, 1000), st.floats(0.01, 100))
def test_whatever_the_start_is_the_range_of_one_record_holds_what_more_work_takes(start, slope, work, times):
    took = start + slope * work * times
    found = from_records([(work, start + slope * work)], work * times, "here")
    assert found.low <= took * (1 + 1e-9)
    assert found.high >= took * (1 - 1e-9)


def test_a_range_reaches_towards_rough_rates_but_not_beyond_them():
    learnt = Amount(16.0, 11.0, 24.0, "1 earlier merge here")
    rough = Amount(1.0, 0.5, 3.0, "rough")
    assert reaching(learnt, rough, 20.0) == Amount(16.0, 0.5, 24.0, "1 earlier merge here")
    assert reaching(learnt, rough, 5.0).low == 6.0, "by so much at most"
    assert reaching(learnt, Amount(60.0, 20.0, 180.0, "rough"), 10.0) == Amount(16.0, 11.0, 34.0, learnt.source)
    assert reaching(learnt, Amount(15.0, 12.0, 20.0, "rough"), 20.0) == learnt


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
