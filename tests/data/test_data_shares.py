"""Shares by temperature: the rows that there are, smoothed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.shares import by_temperature, capped, part_of
from mixmerge.errors import DataError

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


# Caps


@st.composite
def mixtures(draw):
    """Shares of cells that add up to 1, and caps on some of their languages that leave room."""
    cells = draw(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["en", "hi", "ar", "ru"])), min_size=2, unique=True))  # fmt: skip
    sizes = [draw(st.integers(1, 1000)) for _ in cells]
    languages = sorted({lang for _, lang in cells})
    count = draw(st.integers(0, len(languages) - 1))
    caps = {lang: draw(st.integers(1, 100)) / 100 for lang in languages[:count]}
    return {cell: size / sum(sizes) for cell, size in zip(cells, sizes, strict=True)}, caps


def by_language(shares):
    found = {}
    for (_, lang), share in shares.items():
        found[lang] = found.get(lang, 0) + share
    return found


@given(mixtures())
def test_no_language_is_above_its_cap_and_nothing_is_lost(mixture):
    shares, caps = mixture
    found = capped(shares, caps)
    assert list(found) == list(shares)
    assert sum(found.values()) == pytest.approx(1)
    total, asked = by_language(found), by_language(shares)
    for lang, share in total.items():
        assert share <= caps.get(lang, 1) + 1e-9
        if lang not in caps:
            assert share >= asked[lang] - 1e-9, "what is not capped only gains"


@given(mixtures())
def test_what_is_not_held_back_keeps_its_ratios(mixture):
    shares, caps = mixture
    found = capped(shares, caps)
    scales = {
        found[cell] / shares[cell] for cell in shares if by_language(found)[cell[1]] < caps.get(cell[1], 1) - 1e-9
    }
    assert not scales or max(scales) == pytest.approx(min(scales))
    for one in shares:
        for other in shares:
            if one[1] == other[1]:
                assert found[one] * shares[other] == pytest.approx(found[other] * shares[one])


@given(mixtures(), st.randoms(use_true_random=False))
def test_the_order_of_cells_and_caps_changes_no_capped_share(mixture, chance):
    shares, caps = mixture
    turned = {cell: shares[cell] for cell in chance.sample(list(shares), len(shares))}
    other = {name: caps[name] for name in chance.sample(list(caps), len(caps))}
    assert capped(turned, other) == capped(shares, caps)


def test_caps_that_hold_nothing_back_change_no_bit():
    shares = {("a", "en"): 0.1 + 0.2, ("a", "hi"): 0.7}
    assert capped(shares, {"en": 0.9, "hi": 0.8}) == shares


def test_the_excess_of_one_cap_may_fill_another():
    shares = {("a", "en"): 0.7, ("a", "hi"): 0.2, ("a", "ar"): 0.1}
    assert capped(shares, {"en": 0.3, "hi": 0.3}) == pytest.approx(
        {("a", "en"): 0.3, ("a", "hi"): 0.3, ("a", "ar"): 0.4}
    )


@pytest.mark.parametrize(
    ("caps", "found"),
    [
        ({"safety": 0.2}, {("general", "en"): 0.8, ("safety", "en"): 0.1, ("safety", "hi"): 0.1}),
        ({"safety/hi": 0.1}, {("general", "en"): 0.6, ("safety", "en"): 0.3, ("safety", "hi"): 0.1}),
        ({"hi": 0.1}, {("general", "en"): 0.6, ("safety", "en"): 0.3, ("safety", "hi"): 0.1}),
        ({"hi": 0}, {("general", "en"): 2 / 3, ("safety", "en"): 1 / 3, ("safety", "hi"): 0}),
        ({"en": 0.5, "hi": 0.5}, {("general", "en"): 1 / 3, ("safety", "en"): 1 / 6, ("safety", "hi"): 0.5}),
    ],
)
def test_a_cap_may_name_a_language_an_objective_or_a_cell(caps, found):
    shares = {("general", "en"): 0.5, ("safety", "en"): 0.25, ("safety", "hi"): 0.25}
    assert capped(shares, caps) == pytest.approx(found)


def test_caps_that_leave_something_to_nobody_are_refused():
    with pytest.raises(DataError, match=r"the caps leave 0\.2 of the mixture to nobody \(en, hi are all that it has\)"):
        capped({("a", "en"): 0.5, ("a", "hi"): 0.5}, {"en": 0.5, "hi": 0.3})


def test_a_cell_is_named_by_itself_its_objective_or_its_language():
    names = {"safety/hi": 1, "general": 2, "en": 3}
    assert [
        part_of(cell, names) for cell in [("safety", "hi"), ("general", "en"), ("safety", "en"), ("code", "hi")]
    ] == [
        "safety/hi",
        "general",
        "en",
        None,
    ]
