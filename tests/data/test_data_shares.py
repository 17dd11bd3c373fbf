"""Shares by temperature: the rows that there are, smoothed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.shares import by_temperature

SIZES = st.dictionaries(st.sampled_from(["en", "hi", "ar", "ru", "sw"]), st.integers(1, 10**7), min_size=1)
EQUAL = dict.fromkeys(["en", "hi", "ar", "ru", "sw"], 1.0)


@given(SIZES, st.floats(1, 100))
def test_shares_add_up_and_keep_the_order_of_the_sizes(sizes, temperature):
    found = by_temperature(sizes, temperature, EQUAL)
    assert sum(found.values()) == pytest.approx(1, abs=1e-8)
    by_size = sorted(sizes, key=lambda code: sizes[code])
    shares = [found[code] for code in by_size]
    assert shares == sorted(shares)
    assert all(share == 0 for code, share in found.items() if code not in sizes)


@given(SIZES, st.floats(1, 20), st.floats(1.1, 5))
def test_a_higher_temperature_lifts_the_smallest_language(sizes, temperature, factor):
    smallest = min(sizes, key=lambda code: sizes[code])
    low, high = (by_temperature(sizes, t, EQUAL)[smallest] for t in (temperature, temperature * factor))
    assert high >= low - 1e-9


@given(SIZES)
def test_temperature_one_takes_the_data_as_they_are(sizes):
    found = by_temperature(sizes, 1, EQUAL)
    for code, size in sizes.items():
        assert found[code] == pytest.approx(size / sum(sizes.values()), abs=1e-8)


def test_the_formula_is_that_of_the_paper():
    sizes = {"en": 55_608, "hi": 1_715, "sw": 275}  # Conneau et al. 2020, table 6: million tokens of CC-100
    smoothed = {code: (size / sum(sizes.values())) ** 0.3 for code, size in sizes.items()}
    found = by_temperature(sizes, 1 / 0.3, EQUAL | {"ar": 0, "ru": 0})
    for code, value in smoothed.items():
        assert found[code] == pytest.approx(value / sum(smoothed.values()), abs=1e-8)


@given(SIZES, st.randoms(use_true_random=False))
def test_neither_order_of_languages_nor_of_counts_changes_a_share(sizes, chance):
    codes = chance.sample(list(sizes), len(sizes))
    one = by_temperature(sizes, 3, EQUAL)
    other = by_temperature({code: sizes[code] for code in codes}, 3, dict.fromkeys(chance.sample(list(EQUAL), 5), 1.0))
    assert one == other


def test_weights_multiply_and_a_weight_of_nothing_leaves_nothing():
    found = by_temperature({"en": 400, "hi": 100, "ar": 100}, 2, {"en": 1, "hi": 2, "ar": 0})
    assert found == {"en": 0.5, "hi": 0.5, "ar": 0.0}


def test_without_any_rows_there_are_no_shares():
    assert by_temperature({}, 3, {"en": 1.0}) == {"en": 0.0}
    assert by_temperature({"fr": 3}, 3, {"en": 1.0}) == {"en": 0.0}
