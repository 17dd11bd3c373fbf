"""Krippendorff's alpha against the author's worked examples, a published package, and its own coverage."""

from __future__ import annotations

import warnings

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixmerge.stats.agreement import alpha_estimate, encode, krippendorff_alpha

_ = -1
# "Computing Krippendorff's Alpha-Reliability" (Krippendorff 2011), section C: four observers, twelve units, missing values
FOUR_OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


def published(codes: np.ndarray) -> float:
    data = np.where(codes < 0, np.nan, codes.astype(float))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(krippendorff.alpha(reliability_data=data, level_of_measurement="nominal"))


def rated(rng: np.random.Generator, judges: int, units: int, right: float, words: int = 2) -> np.ndarray:
    """Judges that see the truth with probability `right` and say any word else."""
    truth = rng.integers(words, size=units)
    return np.where(rng.random((judges, units)) < right, truth, rng.integers(words, size=(judges, units)))


def test_alpha_is_that_of_krippendorffs_example_with_missing_values() -> None:
    assert krippendorff_alpha(FOUR_OBSERVERS) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_that_of_krippendorffs_examples_with_two_observers() -> None:
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([meg, owen]) == pytest.approx(0.095, abs=5e-4)
    ben, gerry = encode([list("aabbdcccedda"), list("babbbccceddd")])
    assert krippendorff_alpha([ben, gerry]) == pytest.approx(0.692, abs=5e-4)


@given(hnp.arrays(np.int64, st.tuples(st.integers(2, 5), st.integers(2, 14)), elements=st.integers(-1, 3)))
def test_alpha_is_that_of_the_published_package(codes: np.ndarray) -> None:
    pairable = codes[:, (codes >= 0).sum(axis=0) >= 2]
    assume(len(np.unique(pairable[pairable >= 0])) >= 2)
    assert krippendorff_alpha(codes) == pytest.approx(published(codes), abs=1e-9)


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(2, 4), st.integers(2, 10)), elements=st.integers(-1, 2)),
    st.randoms(use_true_random=False),
)
def test_names_of_words_and_order_of_judges_and_units_do_not_matter(codes: np.ndarray, random) -> None:
    judges, units = list(range(codes.shape[0])), list(range(codes.shape[1]))
    random.shuffle(judges)
    random.shuffle(units)
    renamed = np.where(codes < 0, -1, 2 - codes)[judges][:, units]
    np.testing.assert_allclose(krippendorff_alpha(renamed), krippendorff_alpha(codes), atol=1e-12)


def test_a_unit_with_one_verdict_adds_nothing() -> None:
    alone = np.full((4, 3), -1)
    alone[0] = [1, 2, 3]
    assert krippendorff_alpha(np.hstack([FOUR_OBSERVERS, alone])) == krippendorff_alpha(FOUR_OBSERVERS)


@pytest.mark.parametrize("codes", [[[0, 0, 0], [0, 0, 0]], [[0, -1], [-1, 1]], [[-1, -1], [-1, -1]]])
def test_alpha_is_not_defined_where_nothing_can_disagree(codes: list[list[int]]) -> None:
    assert np.isnan(krippendorff_alpha(codes))
    assert alpha_estimate(codes) is None


@pytest.mark.parametrize("codes", [[0, 1, 0], [[0.0, 1.0], [1.0, 0.0]], [[np.nan, 1.0], [1.0, 0.0]]])
def test_anything_but_integers_by_judge_and_unit_is_refused(codes: object) -> None:
    with pytest.raises(ValueError, match=r"expected integers \(judges, units\)"):
        krippendorff_alpha(codes)


def test_words_become_codes_and_a_missing_verdict_stays_missing() -> None:
    words = [["safe", None, "harmful", "unparsed"], ["safe", "safe", "safe", "unparsed"]]
    codes = encode(words)
    assert (codes < 0).tolist() == [[False, True, False, False], [False] * 4]
    assert krippendorff_alpha(codes) == krippendorff_alpha([[0, -1, 1, 2], [0, 0, 0, 2]])


def test_an_interval_holds_its_value_and_narrows_with_more_units() -> None:
    rng = np.random.default_rng(3)
    few, many = (alpha_estimate(rated(rng, 3, units, 0.8), draws=2000) for units in (40, 800))
    assert few is not None
    assert many is not None
    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert (few.n, many.n) == (40, 800)
    assert 3 < (few.high - few.low) / (many.high - many.low) < 7


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    codes = rated(np.random.default_rng(5), 2, 60, 0.7)
    first, again, other = (alpha_estimate(codes, draws=500, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_units_of_one_cluster_are_drawn_together() -> None:
    codes = rated(np.random.default_rng(7), 3, 50, 0.8)
    alone = alpha_estimate(codes, draws=4000)
    copied = alpha_estimate(np.tile(codes, 6), clusters=list(range(50)) * 6, draws=4000)
    naive = alpha_estimate(np.tile(codes, 6), draws=4000)
    assert alone is not None
    assert copied is not None
    assert naive is not None
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)


def test_as_many_cluster_keys_as_units_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"2 cluster keys for 12 units"):
        alpha_estimate(FOUR_OBSERVERS, clusters=["a", "b"])


def test_full_agreement_on_few_units_is_not_certainty() -> None:
    codes = np.tile(np.arange(20) % 2, (3, 1))
    found = alpha_estimate(codes)
    assert found is not None
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.6 < found.low < 0.75
    more = alpha_estimate(np.tile(codes, 10))
    assert more is not None
    assert found.low < more.low < 1


def test_from_one_cluster_nothing_is_known() -> None:
    found = alpha_estimate([[0, 1, 1], [0, 1, 0]], clusters=["p", "p", "p"])
    assert found is not None
    assert (found.low, found.high) == (-1.0, 1.0)


def coverage(units: int, right: float, per_cluster: int, studies: int = 250) -> float:
    """Share of simulated studies whose interval holds the alpha of the process."""
    rng = np.random.default_rng(units)
    truth = krippendorff_alpha(rated(rng, 3, 200_000, right))
    inside = 0
    for study in range(studies):
        codes = np.tile(rated(rng, 3, units // per_cluster, right), per_cluster)
        clusters = list(range(units // per_cluster)) * per_cluster
        found = alpha_estimate(codes, clusters, draws=600, seed=study)
        assert found is not None
        inside += found.low <= truth <= found.high
    return inside / studies


# The docstring of `alpha_estimate` has what 2,000 studies of each setting measured; here fewer, with room for chance.
@pytest.mark.parametrize(("units", "right", "per_cluster"), [(60, 0.7, 1), (200, 0.9, 1), (300, 0.7, 3)])
def test_intervals_cover_the_alpha_of_the_process(units: int, right: float, per_cluster: int) -> None:
    assert 0.9 <= coverage(units, right, per_cluster) <= 0.99
