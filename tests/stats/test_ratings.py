"""Ratings against choix, statsmodels and known truths; their intervals' coverage; what verdicts cannot tell, by name."""

from __future__ import annotations

import choix
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from statsmodels.discrete.discrete_model import Logit

from mixmerge.stats.davidson import chances, fit, lead
from mixmerge.stats.paired import bootstrap_means, cluster_weights, unseen_share
from mixmerge.stats.ratings import Ratings, Verdicts, against_base, length_lead, rate

TRUE = np.array([0.0, 0.6, -0.5, 1.4])


def verdicts(
    rng: np.random.Generator,
    clusters: int,
    *,
    leads: np.ndarray = TRUE,
    slope: float = 0.0,
    nu: float = 0.6,
    shared: float = 0.0,
    longer: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores against candidate 0 and lengths, both (C, 6, clusters); `longer`: how much longer each is than the one before."""
    count = len(leads)
    lengths = np.exp(rng.normal(5, 0.5, (count, 6, clusters)) + longer * np.arange(count)[:, None, None])
    eta = leads[:, None, None] + slope * length_lead(lengths, np.broadcast_to(lengths[:1], lengths.shape))
    eta = eta + rng.normal(0, shared, (count, 1, clusters))
    won, tied, _ = chances(eta, np.log(nu) if nu else np.array(-np.inf))
    drawn = rng.random(won.shape)
    values = np.where(drawn < won, 1.0, np.where(drawn < won + tied, 0.5, 0.0))
    values[0] = 0.5
    return values, lengths


def rated(values: np.ndarray, lengths: np.ndarray | None = None, *, draws: int = 200, seed: int = 0) -> Ratings:
    found = against_base(values, 0, lengths)
    return rate(found, candidates=len(values), base=0, draws=draws, level=0.95, seed=seed, purpose="x")


def rows(first: list[int], second: list[int], score: list[float], clusters: int | None = None) -> Verdicts:
    count = len(first)
    return Verdicts(
        np.array(first),
        np.array(second),
        np.array(score, dtype=float),
        np.arange(count) % (clusters or count),
        np.zeros(count),
        np.ones(count),
        clusters or count,
    )


def tournament(rng: np.random.Generator, leads: np.ndarray, games: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = rng.integers(0, len(leads), games)
    second = (first + rng.integers(1, len(leads), games)) % len(leads)
    won = rng.random(games) < 1 / (1 + np.exp(leads[second] - leads[first]))
    return first, second, won.astype(float)


def test_without_ties_the_fit_is_that_of_choix() -> None:
    first, second, score = tournament(np.random.default_rng(0), np.array([0, 0.5, 1.0, -0.7, 0.2]), 400)
    games = [(int(a), int(b)) if s else (int(b), int(a)) for a, b, s in zip(first, second, score, strict=True)]
    theirs = choix.opt_pairwise(5, games)
    counts = np.zeros((1, 400, 3))
    counts[0, np.arange(400), np.where(score == 1, 0, 2)] = 1
    slopes = (np.eye(5)[first] - np.eye(5)[second])[:, 1:]
    ours = fit(counts, slopes, np.zeros(4))[0]
    assert ours[:4] == pytest.approx(theirs[1:] - theirs[0], abs=1e-4)
    assert ours[4] == -np.inf


def test_ratings_of_a_tournament_are_those_of_choix_but_for_the_small_prior() -> None:
    first, second, score = tournament(np.random.default_rng(1), TRUE, 4000)
    games = [(int(a), int(b)) if s else (int(b), int(a)) for a, b, s in zip(first, second, score, strict=True)]
    theirs = choix.opt_pairwise(4, games)
    found = rate(
        rows(first.tolist(), second.tolist(), score.tolist(), 500),
        candidates=4,
        base=0,
        draws=50,
        level=0.95,
        seed=0,
        purpose="x",
    )
    assert [each.lead.value for each in found.candidates] == pytest.approx(theirs - theirs[0], abs=0.01)
    assert found.ties.value == 0
    assert found.length_problem == "unknown"


def test_the_slope_on_length_is_that_of_statsmodels_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    values, lengths = verdicts(rng, 60, slope=1.0, nu=0.0)
    found = against_base(values, 0, lengths)
    slopes = np.concatenate([np.eye(4)[found.first][:, 1:], found.length[:, None]], axis=1)
    theirs = Logit(found.score, slopes).fit(disp=0).params
    counts = np.zeros((1, len(slopes), 3))
    counts[0, np.arange(len(slopes)), np.where(found.score == 1, 0, 2)] = 1
    assert fit(counts, slopes, np.zeros(4))[0, :4] == pytest.approx(theirs, abs=1e-5)
    whole = rated(values, lengths)
    assert [each.lead.value for each in whole.candidates[1:]] == pytest.approx(theirs[:3], abs=0.02)
    assert whole.length is not None
    assert whole.length.value == pytest.approx(theirs[3], abs=0.02)


def test_with_ties_the_fit_is_the_best_that_a_general_optimiser_finds() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 9, (5, 6, 3)).astype(float)
    slopes = rng.normal(size=(6, 3))
    for sample, ours in zip(counts, fit(counts, slopes, np.full(3, 0.1)), strict=True):

        def loss(unknown: np.ndarray, sample: np.ndarray = sample) -> float:
            logs = np.log(np.stack(chances(slopes @ unknown[:3], unknown[3]), axis=1))
            return float(-(sample * logs).sum() + 0.05 * (unknown[:3] ** 2).sum())

        theirs = optimize.minimize(loss, np.zeros(4), tol=1e-10)
        assert ours == pytest.approx(theirs.x, abs=1e-4)


def test_each_candidate_is_given_exactly_the_score_it_had() -> None:
    # Davidson's property, the prior's half a win, tie and loss aside
    values, _ = verdicts(np.random.default_rng(4), 300)
    found = rated(values)
    for each, scores in zip(found.candidates[1:], values[1:], strict=True):
        assert each.score.value == pytest.approx(scores.mean(), abs=0.002)
        assert each.lead.n == 1800


@given(st.floats(0.02, 0.98), st.floats(-3, 3))
def test_a_lead_and_its_score_are_two_ways_to_say_one_thing(score: float, log_nu: float) -> None:
    won, tied, lost = chances(np.array(lead(score, log_nu)), np.array(log_nu))
    assert won + tied / 2 == pytest.approx(score)
    assert won + tied + lost == pytest.approx(1)


def test_known_ratings_ties_and_slope_are_recovered_whoever_writes_longer() -> None:
    values, lengths = verdicts(np.random.default_rng(5), 2500, slope=1.5, longer=0.4)
    found = rated(values, lengths, draws=50)
    assert [each.lead.value for each in found.candidates] == pytest.approx(TRUE, abs=0.08)
    assert found.length is not None
    assert found.length.value == pytest.approx(1.5, abs=0.1)
    assert found.ties.value == pytest.approx(0.6 / 2.6, abs=0.01)


def test_a_candidate_that_only_writes_longer_gains_nothing_from_it() -> None:
    values, lengths = verdicts(np.random.default_rng(6), 800, leads=np.zeros(3), slope=2.0, longer=0.8)
    plain, fair = rated(values), rated(values, lengths)
    assert plain.candidates[2].score.low > 0.7
    assert fair.candidates[2].score.low < 0.5 < fair.candidates[2].score.high
    assert fair.length is not None
    assert fair.length.low < 2.0 < fair.length.high


@pytest.mark.parametrize("clusters", [10, 40])
def test_intervals_of_ratings_cover_the_truth_in_93_to_97_of_100_studies(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    made = {"slope": 1.0, "shared": 0.7, "longer": 0.2}
    # prompts of unlike difficulty flatten the ratings: the truth is what endless prompts would be rated
    endless = rated(*verdicts(rng, 10_000, **made), draws=2)
    runs, covered = 300, np.zeros((4, 2))
    for run in range(runs):
        found = rated(*verdicts(rng, clusters, **made), draws=200, seed=run)
        assert found.length is not None
        assert endless.length is not None
        pairs = [
            (estimate, truth.value)
            for mine, whole in zip(found.candidates[1:], endless.candidates[1:], strict=True)
            for estimate, truth in ((mine.lead, whole.lead), (mine.score, whole.score))
        ]
        pairs += [(found.length, endless.length.value), (found.ties, endless.ties.value)]
        covered += np.array([each.low <= truth <= each.high for each, truth in pairs]).reshape(4, 2)
    # each of the eight within three standard errors of 300 studies, all together within what is promised
    assert (np.abs(covered / runs - 0.95) <= 0.035).all(), covered / runs
    assert 0.93 <= covered.mean() / runs <= 0.97


def test_draws_are_those_of_the_win_rate_over_the_same_prompts() -> None:
    values, _ = verdicts(np.random.default_rng(7), 60, shared=0.5)
    found = rated(values, draws=500, seed=3)
    wins = bootstrap_means(values, draws=500, seed=3, purpose="x").mean(axis=2)
    for i in (1, 2, 3):
        assert np.corrcoef(found.drawn[:, i], wins[:, i])[0, 1] > 0.97


def test_fitting_lengths_in_bins_gives_the_draws_that_exact_lengths_give() -> None:
    values, lengths = verdicts(np.random.default_rng(8), 25, slope=1.5, longer=0.3)
    found = rated(values, lengths, draws=300)
    made = against_base(values, 0, lengths)
    weights = cluster_weights(25, draws=300, seed=0, purpose="x")
    counts = np.zeros((300, len(made.score) + 3, 3))
    outcome = np.select([made.score == 1, made.score == 0.5], [0, 1], 2)
    counts[:, np.arange(len(made.score)), outcome] = weights[:, made.cluster]
    counts[:, len(made.score) :] = 0.5
    slopes = np.concatenate([np.eye(4)[made.first][:, 1:], made.length[:, None]], axis=1)
    slopes = np.concatenate([slopes, np.eye(4)[:3]])
    exact = fit(counts, slopes, np.array([0, 0, 0, 0.01]))[:, :3]
    off = np.sqrt(((found.drawn[:, 1:] - exact) ** 2).mean(axis=0))
    assert (off < 0.12 * exact.std(axis=0)).all()  # a hundredth of the variance
    assert (np.abs((found.drawn[:, 1:] - exact).mean(axis=0)) < 0.02 * exact.std(axis=0)).all()


def test_languages_weigh_the_same_however_many_prompts_they_have() -> None:
    values, _ = verdicts(np.random.default_rng(9), 400)
    values[1, 0], values[1, 1:] = 1.0, 0.0
    values[1, 1:, 40:] = np.nan
    found = against_base(values, 0)
    mine = found.first == 1
    assert found.weight[mine].sum() == pytest.approx(mine.sum())
    assert (found.weight * found.score)[mine].sum() / mine.sum() == pytest.approx(1 / 6)


def test_one_that_always_wins_is_rated_by_the_prior_and_said_to_be_without_bound() -> None:
    values, _ = verdicts(np.random.default_rng(10), 20)
    values[1], values[2] = 1.0, 0.0
    found = rated(values)
    ahead, behind = found.candidates[1], found.candidates[2]
    assert (ahead.problem, behind.problem, found.candidates[3].problem) == ("unbounded", "unbounded", "")
    assert 0 < ahead.lead.low < ahead.lead.value < ahead.lead.high == np.inf
    assert -np.inf == behind.lead.low < behind.lead.value < behind.lead.high < 0
    assert (ahead.score.high, behind.score.low) == (1, 0)
    assert ahead.score.low == pytest.approx(1 - behind.score.high) == pytest.approx(0.839, abs=0.001)


def test_one_that_nobody_compared_with_the_base_has_no_rating() -> None:
    found = rate(
        rows([1, 0, 2, 3], [0, 1, 3, 2], [1, 1, 1, 1]),
        candidates=5,
        base=0,
        draws=20,
        level=0.95,
        seed=0,
        purpose="x",
    )
    assert [each.problem for each in found.candidates] == ["", "", "unconnected", "unconnected", "unconnected"]
    assert np.isnan([each.lead.value for each in found.candidates[2:]]).all()
    assert [each.lead.n for each in found.candidates] == [2, 2, 0, 0, 0]


def test_a_candidate_may_be_known_by_way_of_another() -> None:
    rng = np.random.default_rng(11)
    first, second = np.repeat([1, 2], 1500), np.repeat([0, 1], 1500)
    score = (rng.random(3000) < 1 / (1 + np.exp(-0.8))).astype(float)
    found = rate(
        rows(first.tolist(), second.tolist(), score.tolist(), 300),
        candidates=3,
        base=0,
        draws=200,
        level=0.95,
        seed=0,
        purpose="x",
    )
    assert found.candidates[2].problem == ""
    assert found.candidates[2].lead.low < 1.6 < found.candidates[2].lead.high
    assert found.candidates[1].lead.low < 0.8 < found.candidates[1].lead.high


def test_who_is_named_first_makes_no_difference() -> None:
    values, lengths = verdicts(np.random.default_rng(12), 30, slope=1.0)
    made = against_base(values, 0, lengths)
    turned = Verdicts(made.second, made.first, 1 - made.score, made.cluster, -made.length, made.weight, made.clusters)
    both = [
        rate(each, candidates=4, base=0, draws=50, level=0.95, seed=0, purpose="x").drawn for each in (made, turned)
    ]
    assert both[0] == pytest.approx(both[1], abs=1e-5)


def test_lengths_that_never_vary_within_a_pair_are_not_taken_for_a_taste() -> None:
    values, lengths = verdicts(np.random.default_rng(13), 20)
    lengths[:] = np.array([100, 150, 200, 400])[:, None, None]
    found = rated(values, lengths)
    assert (found.length, found.length_problem) == (None, "constant")
    assert [each.lead for each in found.candidates] == [each.lead for each in rated(values).candidates]


def test_a_judge_that_only_counts_words_is_said_to_and_its_slope_has_no_end() -> None:
    values, lengths = verdicts(np.random.default_rng(15), 20)
    values[1:] = (lengths[1:] > lengths[0]).astype(float)
    found = rated(values, lengths)
    assert found.length_problem == "unbounded"
    assert found.length is not None
    assert found.length.value > 10
    assert found.length.high == np.inf
    assert all(each.lead.low < 0 < each.lead.high for each in found.candidates[1:])


def test_one_that_always_ties_is_not_known_to_be_equal_for_ever() -> None:
    values, _ = verdicts(np.random.default_rng(16), 20)
    values[1] = 0.5
    tied = rated(values).candidates[1]
    assert tied.lead.value == pytest.approx(0)
    # none of 20 clusters decided leaves up to 16 % possible, all on one side
    assert (tied.score.low, tied.score.high) == pytest.approx((0.5 - 0.161 / 2, 0.5 + 0.161 / 2), abs=0.001)
    assert tied.lead.low == pytest.approx(-tied.lead.high)


@pytest.mark.parametrize("clusters", [2, 5, 40])
def test_a_rating_that_no_resample_moves_is_as_open_as_the_prompts_that_were_not_seen(clusters: int) -> None:
    values = np.full((2, 3, clusters), 0.5)
    values[1, 2] = 1.0  # ahead in one language alone, on every prompt
    found = rated(values).candidates[1]
    unseen = unseen_share(0.95, clusters)
    assert found.score.high - found.score.low == pytest.approx(unseen)
    assert found.score.low < found.score.value < found.score.high
    assert found.lead.low < found.lead.value < found.lead.high
    assert (found.lead.low > 0) == (clusters == 40)


def test_where_no_tie_was_seen_some_remain_possible() -> None:
    values, _ = verdicts(np.random.default_rng(17), 20, nu=0.0)
    found = rated(values)
    assert (found.ties.value, found.ties.low) == (0, 0)
    assert found.ties.high == pytest.approx(0.161, abs=0.001)


def test_a_study_of_the_base_alone_has_one_rating() -> None:
    found = rated(np.full((1, 2, 5), 0.5))
    assert [(each.lead.value, each.score.value, each.problem) for each in found.candidates] == [(0, 0.5, "")]
    assert (found.ties.low, found.ties.high) == (0, 1)


def test_from_one_prompt_nothing_is_known() -> None:
    values, _ = verdicts(np.random.default_rng(14), 1)
    values[1, 0], values[1, 1] = 1.0, 0.0
    found = rated(values)
    assert (found.candidates[1].lead.low, found.candidates[1].lead.high) == (-np.inf, np.inf)
    assert (found.candidates[1].score.low, found.candidates[1].score.high) == (0, 1)


def test_a_length_lead_is_bounded_and_turns_with_the_sides() -> None:
    first, second = np.array([0.0, 1e9, 30.0, 0.0]), np.array([0.0, 1.0, 10.0, 5.0])
    assert length_lead(first, second) == pytest.approx([0, 1, 0.5, -1])
    assert length_lead(second, first) == pytest.approx(-length_lead(first, second))
    assert length_lead(first, second)[2] == pytest.approx(np.tanh(np.log(3) / 2))


def test_a_fit_that_has_no_optimum_is_an_error_and_not_a_number() -> None:
    counts = np.array([[[3.0, 0.0, 0.0]]])
    with pytest.raises(ArithmeticError, match=r"the ratings"):
        fit(counts, np.ones((1, 1)), np.zeros(1))
