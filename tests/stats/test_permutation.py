"""Sign-flip tests against scipy and their definition; Holm's correction against statsmodels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mixmerge.stats.paired import means
from mixmerge.stats.permutation import compare, contributions, holm, sign_flip


def two(clusters: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.random((3, clusters)) < 0.4, rng.random((3, clusters)) < 0.7]).astype(float)


def test_the_exact_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.6, 1, 10), rng.normal(0, 1, 10)
    theirs = stats.permutation_test(
        (first, second), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    found = compare([np.stack([second, first])[:, None]], against=0, flips=1000, seed=0, purpose="x")
    assert found.exact
    assert found.p[1] == pytest.approx(theirs.pvalue)
    assert found.difference[1] == pytest.approx(theirs.statistic)


def test_the_sampled_test_is_near_the_exact_one_and_scipys_sampled_one() -> None:
    terms = np.random.default_rng(3).normal(0.35, 1, (1, 16))
    exact, was = sign_flip(terms, flips=2**16, seed=0, purpose="x")
    sampled, was_not = sign_flip(terms, flips=20_000, seed=0, purpose="x")
    assert was
    assert not was_not
    theirs = stats.permutation_test(
        (terms[0],), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert sampled[0] == pytest.approx(exact[0], abs=4 * np.sqrt(exact[0] / 20_000))
    assert theirs.pvalue == pytest.approx(exact[0], abs=6 * np.sqrt(exact[0] / 20_000))


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4).map(np.array),
)
def test_the_exact_test_counts_what_its_definition_says(rows: np.ndarray) -> None:
    p, exact = sign_flip(rows / 7.0, flips=64, seed=0, purpose="x")
    assert exact
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))
    for row, found in zip(rows, p, strict=True):
        assert found == pytest.approx((np.abs(signs @ row) >= abs(row.sum())).mean())


def test_dividing_by_the_standard_error_changes_no_p_value() -> None:
    row = np.random.default_rng(5).exponential(1, 9) - 0.7
    signs = np.array(list(itertools.product([-1, 1], repeat=9)))

    def student(terms: np.ndarray) -> np.ndarray:
        return np.abs(terms.mean(axis=-1)) / (terms.std(axis=-1, ddof=1) / 3)

    studentised = (student(signs * row) >= student(row) - 1e-12).mean()
    assert sign_flip(row[None], flips=512, seed=0, purpose="x")[0][0] == pytest.approx(studentised)


def test_a_sampled_p_value_is_never_nought_and_counts_the_observed_signs_as_one_more() -> None:
    p, exact = sign_flip(np.ones((1, 40)), flips=99, seed=0, purpose="x")
    assert not exact
    assert p[0] == 1 / 100


def test_sampled_p_values_depend_on_seed_and_purpose_and_on_nothing_else() -> None:
    terms = np.random.default_rng(0).normal(0.2, 1, (3, 30))

    def p(seed: int, purpose: str) -> list[float]:
        return sign_flip(terms, flips=200, seed=seed, purpose=purpose)[0].tolist()

    assert p(1, "win") == p(1, "win")
    assert len({tuple(p(1, "win")), tuple(p(2, "win")), tuple(p(1, "harm"))}) == 3


def test_many_sets_of_signs_are_tried_in_pieces_without_losing_any() -> None:
    terms = np.random.default_rng(2).integers(-2, 3, (1, 15)).astype(float)
    terms[terms == 0] = 1
    p, exact = sign_flip(terms, flips=2**14, seed=0, purpose="x")
    signs = np.array(list(itertools.product([-1, 1], repeat=15)))
    assert exact
    assert p[0] == pytest.approx((np.abs(signs @ terms[0]) >= abs(terms[0].sum())).mean())


def test_prompts_on_which_nothing_differs_make_no_test_inexact() -> None:
    terms = np.zeros((2, 500))
    terms[0, :6] = 1
    p, exact = sign_flip(terms, flips=100, seed=0, purpose="x")
    assert exact
    assert p.tolist() == [2 / 64, 1.0]


def test_identical_candidates_have_p_1_and_none_has_none() -> None:
    values = np.tile(two(8)[:1], (3, 1, 1))
    values[2] = np.nan
    found = compare([values], against=0, flips=1000, seed=0, purpose="x")
    assert found.p[1] == 1
    assert found.clusters[1] == 0
    assert np.isnan([found.p[0], found.p[2], found.adjusted[0], found.adjusted[2], found.difference[2]]).all()
    assert found.adjusted[1] == 1


def test_the_terms_add_up_to_the_difference_of_macro_averages() -> None:
    values = two(20)
    values[:, 0, 7:] = np.nan  # a language with few prompts weighs as much as the others
    terms = contributions(values, 0)
    average = means(values).mean(axis=1)
    assert terms[1].sum() == pytest.approx(average[1] - average[0])
    assert (terms[0] == 0).all()


def test_cells_that_only_one_of_the_two_has_count_for_nothing() -> None:
    values = two(20)
    values[1, 2, 4] = np.nan
    both = values.copy()
    both[0, 2, 4] = np.nan
    assert contributions(values, 0) == pytest.approx(contributions(both, 0))


def test_a_language_that_a_candidate_has_nothing_in_is_left_out_of_its_average() -> None:
    values = two(20)
    values[1, 2] = np.nan
    average = means(values)[:, :2].mean(axis=1)
    assert contributions(values, 0)[1].sum() == pytest.approx(average[1] - average[0])


def test_the_balance_is_tested_over_the_prompts_of_all_its_axes() -> None:
    win, harm = two(12, 1), two(30, 2)
    found = compare([win, harm], against=0, flips=500, seed=0, purpose="x")
    parts = [compare([axis], against=0, flips=500, seed=0, purpose="x") for axis in (win, harm)]
    assert found.difference[1] == pytest.approx(np.mean([part.difference[1] for part in parts]))
    assert found.clusters[1] == sum(part.clusters[1] for part in parts)
    assert found.p[1] <= max(part.p[1] for part in parts)


def test_only_the_candidates_asked_for_share_the_level() -> None:
    values = np.random.default_rng(0).random((6, 2, 9))
    everyone = compare([values], against=5, flips=300, seed=0, purpose="x")
    one = compare([values], against=5, among=[2], flips=300, seed=0, purpose="x")
    assert one.p[2] == everyone.p[2] == one.adjusted[2]
    assert np.isnan(one.p[[0, 1, 3, 4, 5]]).all()
    assert (everyone.adjusted[:5] >= everyone.p[:5]).all()


@settings(max_examples=25, deadline=None)  # theirs collects garbage at every call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holms_correction_is_that_of_statsmodels(p: list[float]) -> None:
    assert holm(np.array(p)) == pytest.approx(multipletests(p, method="holm")[1])


def test_what_was_not_tested_costs_the_others_nothing() -> None:
    adjusted = holm(np.array([0.02, np.nan, 0.04]))
    assert adjusted[[0, 2]].tolist() == [0.04, 0.04]
    assert np.isnan(adjusted[1])


def test_a_correction_of_no_tests_is_empty() -> None:
    assert holm(np.array([])).shape == (0,)
    assert np.isnan(compare([two(5)[:1]], against=0, flips=9, seed=0, purpose="x").p).all()
