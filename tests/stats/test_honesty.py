"""Simulated judges: intervals cover the truth as often as they say, tests are wrong no oftener than their level."""

from __future__ import annotations

import numpy as np
import pytest

from mixmerge.stats.paired import bootstrap_means, estimate, interval, student_interval
from mixmerge.stats.permutation import compare, contributions, holm, sign_flip

LANGUAGES = 6
LEAN = np.linspace(-0.5, 0.5, LANGUAGES)[:, None]


def studies(
    rng: np.random.Generator, runs: int, clusters: int, offset: float, hard: float, gaps: tuple[float, ...]
) -> np.ndarray:
    """Verdicts 0 or 1 of `runs` studies: (runs, candidates, L, P); parallel prompts are hard or easy for all, and for each."""
    shared = rng.normal(0, hard, (runs, 1, 1, clusters))
    own = rng.normal(0, 0.5, (runs, len(gaps), 1, clusters))
    logits = offset + LEAN + np.array(gaps)[:, None, None] + shared + own
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)


def true_rate(offset: float, hard: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    chances = 1 / (1 + np.exp(-(offset + LEAN + nodes * np.hypot(hard, 0.5))))
    return float(chances.mean(axis=0) @ weights / weights.sum())


def test_the_simulation_has_the_rate_that_is_taken_for_the_truth() -> None:
    values = studies(np.random.default_rng(0), 40, 2000, -1.5, 1.0, (0.0,))
    assert values.mean() == pytest.approx(true_rate(-1.5, 1.0), abs=0.004)


@pytest.mark.parametrize("clusters", [10, 20, 50, 200])
@pytest.mark.parametrize(("offset", "hard"), [(0.0, 1.0), (0.0, 2.0), (-1.5, 1.0)])
def test_intervals_of_a_rate_cover_it_in_93_to_97_of_100_studies(clusters: int, offset: float, hard: float) -> None:
    rng = np.random.default_rng([clusters, int(10 * hard), int(-10 * offset)])
    values = studies(rng, 1500, clusters, offset, hard, (0.0,))[:, 0]
    drawn = bootstrap_means(values, draws=400, seed=1, purpose="x")
    truth = true_rate(offset, hard)
    found = [estimate(values[i], drawn[:, i], 0.95) for i in range(len(values))]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.93 <= covered <= 0.97, covered


@pytest.mark.parametrize("clusters", [8, 10, 20, 50, 200])
@pytest.mark.parametrize(("offset", "hard"), [(0.0, 1.0), (0.0, 2.0), (-1.5, 1.0)])
def test_intervals_of_a_difference_cover_it_in_93_to_97_of_100_studies(
    clusters: int, offset: float, hard: float
) -> None:
    rng = np.random.default_rng([1, clusters, int(10 * hard), int(-10 * offset)])
    both = studies(rng, 1500, clusters, offset, hard, (0.0, 0.7))
    values = both[:, 1] - both[:, 0]
    drawn = bootstrap_means(values, draws=400, seed=1, purpose="x").mean(axis=2)
    truth = true_rate(offset + 0.7, hard) - true_rate(offset, hard)
    ends = [student_interval(values[i].mean(), drawn[:, i], 0.95, clusters) for i in range(len(values))]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.93 <= covered <= 0.97, covered


def test_a_rare_harm_in_few_prompts_is_still_covered() -> None:
    # one prompt in fourteen: percentile intervals of ten clusters cover 87 to 92 % of such rates
    values = studies(np.random.default_rng(3), 1500, 10, -3.0, 1.0, (0.0,))[:, 0]
    drawn = bootstrap_means(values, draws=400, seed=1, purpose="x")
    found = [estimate(values[i], drawn[:, i], 0.95) for i in range(len(values))]
    covered = np.mean([each.low <= true_rate(-3.0, 1.0) <= each.high for each in found])
    assert 0.93 <= covered <= 0.99, covered


@pytest.mark.parametrize("clusters", [10, 40])
def test_intervals_of_a_relative_change_cover_it_in_93_to_97_of_100_studies(clusters: int) -> None:
    values = studies(np.random.default_rng([5, clusters]), 1500, clusters, -1.0, 1.0, (0.0, -1.0))
    drawn = bootstrap_means(values.reshape(-1, LANGUAGES, clusters), draws=400, seed=1, purpose="x").mean(axis=2)
    base, mine = drawn[:, 0::2], drawn[:, 1::2]
    truth = true_rate(-2.0, 1.0) / true_rate(-1.0, 1.0) - 1
    ends = [interval(mine[:, i] / base[:, i] - 1, 0.95, clusters) for i in np.flatnonzero((base > 0).all(axis=0))]
    assert len(ends) > 1400  # a base that did no harm in some draw has no relative change there
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.93 <= covered <= 0.97, covered


@pytest.mark.parametrize("clusters", [7, 12, 40])
def test_equal_candidates_are_told_apart_no_oftener_than_the_level(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    values = studies(rng, 4000, clusters, -1.0, 1.0, (0.0, 0.0))
    terms = (values[:, 1] - values[:, 0]).mean(axis=1) / clusters
    p, exact = sign_flip(terms, flips=2000, seed=0, purpose="x")
    assert exact == (clusters <= 11)
    for level in (0.01, 0.05, 0.2):
        error = np.sqrt(level * (1 - level) / len(p))
        assert (p <= level).mean() <= level + 2.6 * error
    assert (p <= 0.2).mean() >= 0.1  # and is no test that never speaks


def unbalanced(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Leaves out a fifth of the cells, one language but for three prompts, and some cells of one candidate only."""
    values = values.copy()
    gone = rng.random((1, *values.shape[1:])) < 0.2
    gone[:, 0, 3:] = True
    return np.where(gone | (rng.random(values.shape) < 0.05), np.nan, values)


def test_the_level_holds_where_languages_miss_prompts() -> None:
    rng = np.random.default_rng(5)
    studies_ = [unbalanced(rng, each) for each in studies(rng, 2500, 14, 0.5, 1.0, (0.0, 0.0))]
    terms = np.stack([contributions(values, 0)[1] for values in studies_])
    p, _ = sign_flip(terms, flips=2000, seed=0, purpose="x")
    assert (p <= 0.05).mean() <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / len(p))
    assert (p <= 0.2).mean() >= 0.12


def test_translations_counted_as_prompts_of_their_own_would_break_the_level() -> None:
    rng = np.random.default_rng(6)
    own = rng.normal(0, 2.0, (1500, 2, 1, 15))
    values = (rng.random((1500, 2, LANGUAGES, 15)) < 1 / (1 + np.exp(-own))).astype(float)
    differences = values[:, 1] - values[:, 0]
    apart, _ = sign_flip(differences.reshape(1500, -1), flips=500, seed=0, purpose="x")
    together, _ = sign_flip(differences.mean(axis=1), flips=500, seed=0, purpose="x")
    assert (apart <= 0.05).mean() > 0.15
    assert (together <= 0.05).mean() <= 0.065


def test_among_eight_candidates_no_better_than_the_base_a_false_find_is_as_rare_as_the_level() -> None:
    rng, runs, uncorrected, corrected = np.random.default_rng(7), 600, 0, 0
    for run, values in enumerate(studies(rng, runs, 25, -0.5, 1.0, (0.0,) * 9)):
        found = compare([values], against=0, flips=999, seed=run, purpose="x")
        uncorrected += int((found.p[1:] <= 0.05).any())
        corrected += int((found.adjusted[1:] <= 0.05).any())
    assert corrected / runs <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / runs)
    assert uncorrected / runs > 0.12


def test_where_some_candidates_are_better_the_others_are_falsely_found_no_oftener_than_the_level() -> None:
    rng = np.random.default_rng(8)
    differences = rng.normal(0, 1, (3000, 8, 20)) + np.array([2.0] * 3 + [0.0] * 5)[:, None]
    p, _ = sign_flip(differences.reshape(-1, 20), flips=999, seed=0, purpose="x")
    adjusted = np.stack([holm(row) for row in p.reshape(3000, 8)])
    assert (adjusted[:, 3:] <= 0.05).any(axis=1).mean() <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 3000)
    assert (adjusted[:, :3] <= 0.05).mean() > 0.95
