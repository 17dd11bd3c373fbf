"""Times and bytes as a person says them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.amounts import clock, duration, in_bytes

UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (3400, "3.4 kB"),
        (9_960, "10 kB"),
        (999_700, "1.0 MB"),
        (16_060_522_240, "16 GB"),
        (4e15, "4000 TB"),
    ],
)
def test_bytes_have_the_largest_unit_that_leaves_one_or_more(size, said):
    assert in_bytes(size) == said


@given(st.floats(1, 1e14))
def test_bytes_are_said_to_within_a_twentieth_and_never_a_thousand_of_a_unit(size):
    number, unit = in_bytes(size).split(" ")
    assert abs(float(number) * UNITS[unit] - size) <= max(0.5, 0.05 * size)
    assert float(number) < 1000 or unit == "TB" or (unit == "bytes" and float(number) == 1000)


@given(st.integers(0, 10**7))
def test_a_clock_loses_no_second(seconds):
    parts = [int(part) for part in clock(seconds).split(":")]
    assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == seconds
    assert re.fullmatch(r"(\d+:)?\d\d?:\d\d", clock(seconds))


def test_a_clock_that_was_set_back_shows_nothing_less_than_nothing():
    assert clock(-5.0) == "0:00"


def test_times_have_the_unit_that_a_person_would_choose():
    assert [duration(s) for s in (59, 61, 90 * 60, 30 * 3600, 40 * 3600)] == [
        "59 s",
        "1 min",
        "1.5 h",
        "30 h",
        "1.7 days",
    ]
