"""A judge's errors against other computations and published formulas; corrected intervals against simulated judges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from mixmerge.stats.judge_error import (
    Correction,
    Recall,
    cohen_kappa,
    confusion,
    correct,
    effective_rows,
    kappa_estimate,
    mean_share,
    rogan_gladen,
    share,
)
from mixmerge.stats.paired import bootstrap_means, interval

GOOD = {"harmful": Recall(90, 100, 100), "safe": Recall(95, 100, 100)}


def corrected(values: np.ndarray, recalls: dict[str, dict[str, Recall]], languages: list[str], **more) -> Correction:
    drawn = bootstrap_means(values, draws=more.pop("draws", 400), seed=0, purpose="x")
    settings = {"positive": "harmful", "negative": "safe", "judge": "guard", "level": 0.95, "seed": 0} | more
    return correct(values, drawn, languages, recalls, **settings)


def answers(rng: np.random.Generator, shape: tuple[int, ...], rate: float) -> np.ndarray:
    return (rng.random(shape) < rate).astype(float)


# Shares and groups


@given(st.integers(1, 300), st.data())
def test_the_interval_of_a_share_is_wilsons(rows: int, data) -> None:
    right = data.draw(st.integers(0, rows))
    found = share(np.arange(rows) < right)
    expected = stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
    assert found is not None
    assert (found.value, found.n) == (right / rows, rows)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_rows_have_no_share_and_the_exact_interval_would_be_wider() -> None:
    assert share([]) is None
    found, exact = share([True] * 45 + [False] * 5), stats.binomtest(45, 50).proportion_ci(0.95)
    assert found is not None
    assert found.high - found.low < exact.high - exact.low


def test_rows_that_are_copies_count_once_and_independent_ones_count_in_full() -> None:
    rng = np.random.default_rng(0)
    once = rng.random(200) < 0.8
    groups = list(range(200))
    assert effective_rows(once) == effective_rows(once, groups) == 200
    assert effective_rows(np.tile(once, 4), groups * 4) == pytest.approx(200, rel=0.02)
    fresh = rng.random(800) < 0.8
    assert 500 < effective_rows(fresh, groups * 4) <= 800


def test_where_all_rows_are_alike_there_are_no_more_of_them_than_groups() -> None:
    assert effective_rows([True] * 30, [i // 3 for i in range(30)]) == 10
    assert effective_rows([True, False] * 5, ["one prompt"] * 10) == 1
    assert effective_rows([]) == 0


def test_as_many_group_keys_as_rows_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"1 group keys for 2 rows"):
        effective_rows([True, False], ["a"])


def test_intervals_of_grouped_rows_cover_the_true_share() -> None:
    rng = np.random.default_rng(4)
    inside = naive = 0
    for _ in range(400):
        easy = rng.beta(9, 1, 60)
        right = rng.random((60, 5)) < easy[:, None]
        found = share(right.ravel(), np.repeat(np.arange(60), 5).tolist())
        alone = share(right.ravel())
        assert found is not None
        assert alone is not None
        inside += found.low <= 0.9 <= found.high
        naive += alone.low <= 0.9 <= alone.high
    assert 0.92 <= inside / 400 <= 0.985
    assert naive < inside


def test_draws_of_a_recall_are_jeffreys_posterior_and_depend_on_seed_and_purpose_alone() -> None:
    found = Recall(18, 20, 20)
    drawn = found.draws(40_000, 1, "guard", "fr", "safe")
    for part in (0.025, 0.5, 0.975):
        assert np.quantile(drawn, part) == pytest.approx(stats.beta.ppf(part, 18.5, 2.5), abs=0.01)
    np.testing.assert_array_equal(drawn, found.draws(40_000, 1, "guard", "fr", "safe"))
    assert not np.array_equal(drawn, found.draws(40_000, 1, "guard", "hi", "safe"))
    wide = Recall(180, 200, 20).draws(40_000, 1, "guard", "fr", "safe")
    np.testing.assert_allclose(wide, drawn)


# Kappa


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=60))
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, found = (np.array(side) for side in zip(*pairs, strict=True))
    kappa = cohen_kappa(confusion(truth, found, 3))
    if len({*truth, *found}) == 1:
        assert np.isnan(kappa)
        assert kappa_estimate(truth, found, 3) is None
    else:
        assert kappa == pytest.approx(cohen_kappa_score(truth, found), abs=1e-12)


def test_an_answer_that_is_no_verdict_counts_as_disagreement() -> None:
    table = confusion(np.array([0, 0, 1, 1]), np.array([0, 7, 1, -1]), 2)
    assert table.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert cohen_kappa(table) < cohen_kappa(table[:, :2]) == 1


def test_full_agreement_is_not_certainty_and_more_rows_bring_more_of_it() -> None:
    few, many = (kappa_estimate(truth, truth, 2) for truth in (np.arange(20) % 2, np.arange(400) % 2))
    assert few is not None
    assert many is not None
    assert few.value == few.high == many.high == 1
    assert 0.6 < few.low < 0.95 < many.low < 1


@pytest.mark.parametrize(
    ("positives", "sensitivity", "specificity", "rows"), [(0.5, 0.95, 0.97, 100), (0.2, 0.8, 0.9, 150)]
)
def test_intervals_of_kappa_cover_the_kappa_of_the_judge(
    positives: float, sensitivity: float, specificity: float, rows: int
) -> None:
    cells = np.array([[sensitivity, 1 - sensitivity], [1 - specificity, specificity]])
    kappa = cohen_kappa(cells * np.array([[positives], [1 - positives]]))
    rng, inside = np.random.default_rng(1), 0
    for study in range(400):
        truth = (rng.random(rows) > positives).astype(int)
        right = rng.random(rows) < np.where(truth == 0, sensitivity, specificity)
        found = kappa_estimate(truth, np.where(right, truth, 1 - truth), 2, draws=800, seed=study)
        assert found is not None
        inside += found.low <= kappa <= found.high
    assert 0.92 <= inside / 400 <= 0.985


def test_grouped_rows_widen_kappa_but_do_not_move_it() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(2, size=100)
    found = np.where(rng.random(100) < 0.85, truth, 1 - truth)
    one = kappa_estimate(truth, found, 2)
    copied = kappa_estimate(np.tile(truth, 5), np.tile(found, 5), 2, list(range(100)) * 5)
    naive = kappa_estimate(np.tile(truth, 5), np.tile(found, 5), 2)
    assert one is not None
    assert copied is not None
    assert naive is not None
    assert (copied.low, copied.high) == pytest.approx((one.low, one.high), abs=0.02)
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)


def test_kappa_stays_inside_its_interval_where_words_differ_in_their_groups() -> None:
    truth = np.array([0] * 400 + [1] * 60)
    found = truth.copy()
    found[:12], found[400:405] = 1, 0
    estimate = kappa_estimate(truth, found, 2, [i // 40 for i in range(400)] + list(range(1000, 1060)))
    assert estimate is not None
    assert estimate.low + 0.02 < estimate.value < estimate.high - 0.02


# The formula


def test_the_corrected_share_is_that_of_published_examples() -> None:
    # brucellosis in a herd, and Moujaber et al. 2008: the examples of epiR's epi.prev
    assert rogan_gladen(23 / 150, 0.96, 0.89) == pytest.approx(0.051, abs=5e-4)
    assert rogan_gladen(6 / 151, 0.964, 0.927) == 0


@given(st.floats(0, 1), st.floats(0.51, 1), st.floats(0.51, 1), st.floats(0, 1))
def test_correction_undoes_what_the_judges_errors_do(
    true: float, sensitivity: float, specificity: float, decided: float
) -> None:
    apparent = decided * (true * sensitivity + (1 - true) * (1 - specificity))
    assert rogan_gladen(apparent, sensitivity, specificity, decided) == pytest.approx(decided * true, abs=1e-9)


def test_two_shares_of_one_judge_stay_complements() -> None:
    assert rogan_gladen(0.3, 0.9, 0.8) == pytest.approx(1 - rogan_gladen(0.7, 0.8, 0.9))


def lang_reiczigel(found: int, rows: int, right: Recall, left: Recall) -> tuple[float, float]:
    """The interval of Lang & Reiczigel (2014, section 2.2), written from the paper's formula."""
    z = stats.norm.isf(0.025)
    se, sp = ((each.right + 1) / (each.rows + 2) for each in (right, left))
    apparent = (found + z * z / 2) / (rows + z * z)
    skill = se + sp - 1
    true = (apparent + sp - 1) / skill
    of_se, of_sp = se * (1 - se) / (right.rows + 2), sp * (1 - sp) / (left.rows + 2)
    shift = 2 * z * z * (true * of_se - (1 - true) * of_sp)
    noise = apparent * (1 - apparent) / (rows + z * z) + true**2 * of_se + (1 - true) ** 2 * of_sp
    half = z * np.sqrt(noise) / skill
    return max(0.0, true + shift - half), min(1.0, true + shift + half)


@pytest.mark.parametrize("found", [30, 80, 150])
def test_intervals_are_near_those_of_lang_and_reiczigel(found: int) -> None:
    values = (np.arange(250) < found).astype(float)[None, None]
    made = corrected(values, {"en": GOOD}, ["en"], draws=20_000)
    low, high = interval(mean_share(made.values, made.drawn)[1][:, 0], 0.95, 250)
    assert (low, high) == pytest.approx(lang_reiczigel(found, 250, GOOD["harmful"], GOOD["safe"]), abs=0.015)


# Correction


def test_a_point_is_corrected_by_the_formula_in_each_language() -> None:
    rng = np.random.default_rng(0)
    values = answers(rng, (3, 2, 40), 0.4)
    recalls = {"en": GOOD, "hi": {"harmful": Recall(60, 100, 100), "safe": Recall(80, 100, 100)}}
    found = corrected(values, recalls, ["en", "hi"])
    apparent = values.mean(axis=2)
    np.testing.assert_allclose(found.values[:, 0], (apparent[:, 0] - 0.05) / 0.85)
    np.testing.assert_allclose(found.values[:, 1], (apparent[:, 1] - 0.2) / 0.4)
    assert (found.uncorrected, found.pooled) == ({}, ())


def test_a_perfect_judge_with_many_rows_changes_next_to_nothing() -> None:
    values = answers(np.random.default_rng(0), (2, 1, 60), 0.3)
    sure = {word: Recall(10**6, 10**6, 10**6) for word in ("harmful", "safe")}
    found = corrected(values, {"en": sure}, ["en"])
    np.testing.assert_allclose(found.values[:, 0], values.mean(axis=2)[:, 0])
    np.testing.assert_allclose(found.drawn, bootstrap_means(values, draws=400, seed=0, purpose="x"), atol=1e-4)


def test_candidates_share_the_judges_errors_so_equal_ones_do_not_differ() -> None:
    one = answers(np.random.default_rng(0), (1, 2, 50), 0.3)
    found = corrected(np.tile(one, (2, 1, 1)), {"en": GOOD, "fr": GOOD}, ["en", "fr"])
    np.testing.assert_array_equal(found.drawn[:, 0], found.drawn[:, 1])
    assert not np.allclose(found.drawn[:, 0, 0], found.drawn[:, 0, 1])


def test_complied_and_refused_meet_the_same_errors() -> None:
    values = answers(np.random.default_rng(0), (1, 1, 80), 0.3)
    one = corrected(values, {"en": GOOD}, ["en"])
    other = corrected(1 - values, {"en": GOOD}, ["en"], positive="safe", negative="harmful")
    np.testing.assert_allclose(one.drawn + other.drawn, 1, atol=1e-9)


def test_a_candidate_without_a_single_find_has_an_interval_all_the_same() -> None:
    found = corrected(np.zeros((2, 1, 80)), {"en": {w: Recall(400, 400, 400) for w in GOOD}}, ["en"], draws=4000)
    low, high = interval(mean_share(found.values, found.drawn)[1][:, 0], 0.95, 80)
    assert low == 0
    assert 0.02 < high < 0.06
    np.testing.assert_array_equal(found.drawn[:, 0], found.drawn[:, 1])


def test_broken_texts_have_no_false_alarms_taken_off() -> None:
    values = np.concatenate([np.ones(30), np.zeros(30), np.zeros(40)])[None, None]
    part = np.array([[0.6]]), np.full((400, 1, 1), 0.6)
    found = corrected(values, {"en": GOOD}, ["en"], decided=part)
    assert found.values[0, 0] == pytest.approx(0.6 * (0.5 - 0.05) / 0.85)
    assert found.values[0, 0] > corrected(values, {"en": GOOD}, ["en"]).values[0, 0]


def test_a_language_without_rows_is_named_and_not_corrected() -> None:
    values = answers(np.random.default_rng(0), (2, 3, 40), 0.4)
    found = corrected(values, {"en": GOOD, "ru": {"harmful": GOOD["harmful"]}}, ["en", "hi", "ru"])
    assert found.uncorrected == {"hi": "no calibration rows", "ru": "no calibration row is truly 'safe'"}
    assert np.isnan(found.values[:, 1:]).all()
    assert np.isnan(found.drawn[:, :, 1:]).all()
    assert not np.isnan(found.drawn[:, :, 0]).any()
    assert all(np.isnan(each).all() for each in mean_share(found.values, found.drawn))


def test_pooling_is_done_where_asked_and_has_the_spread_between_languages_in_it() -> None:
    values = answers(np.random.default_rng(0), (1, 3, 60), 0.4)
    recalls = {
        lang: {"harmful": Recall(n, 400, 400), "safe": Recall(380, 400, 400)} for lang, n in (("en", 380), ("fr", 220))
    }
    found = corrected(values, recalls, ["en", "fr", "hi"], pool=True, draws=4000)
    assert (found.pooled, found.uncorrected) == (("hi",), {})
    assert found.values[0, 2] == pytest.approx((values[0, 2].mean() - 0.05) / (0.75 + 0.95 - 1))
    assert found.drawn[:, 0, 2].std() > 1.2 * found.drawn[:, 0, :2].std(axis=0).min()
    assert corrected(values, {}, ["en", "fr", "hi"], pool=True).uncorrected.keys() == {"en", "fr", "hi"}


@pytest.mark.parametrize(
    ("right", "reason"),
    [
        ((40, 55), r"no better than chance \(sensitivity 0\.40, specificity 0\.55"),
        ((56, 56), r"too few calibration rows to tell the judge from chance .* no better in \d+%"),
    ],
)
def test_a_judge_that_may_be_no_better_than_chance_corrects_nothing_and_the_reason_is_named(
    right: tuple[int, int], reason: str
) -> None:
    recalls = {word: Recall(n, 100, 100) for word, n in zip(("harmful", "safe"), right, strict=True)}
    found = corrected(answers(np.random.default_rng(0), (1, 1, 40), 0.4), {"en": recalls}, ["en"])
    assert np.isnan(found.values).all()
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found.uncorrected["en"])


# Coverage

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def coverage(
    base: float, sensitivity: float, specificity: float, rows: int, clusters: int, languages: int, studies: int
) -> tuple[float, float, float]:
    """Share of studies whose interval holds the true macro-average: corrected, difference of two corrected, raw.

    Two candidates share hard and easy prompts, and prompts are parallel over the languages.
    """
    names = [f"l{i}" for i in range(languages)]
    logits = np.log(np.array([base, 1.5 * base]) / (1 - np.array([base, 1.5 * base])))
    true = [float((WEIGHTS / WEIGHTS.sum() / (1 + np.exp(-(each + NODES)))).sum()) for each in logits]
    rng, inside = np.random.default_rng([int(1000 * base), rows, clusters, languages]), np.zeros(3)
    for study in range(studies):
        hard = rng.normal(0, 1, clusters)
        truth = rng.random((2, languages, clusters)) < 1 / (1 + np.exp(-(logits[:, None, None] + hard)))
        values = (rng.random(truth.shape) < np.where(truth, sensitivity, 1 - specificity)).astype(float)
        recalls = {
            name: {
                "harmful": Recall(int(rng.binomial(rows, sensitivity)), rows, rows),
                "safe": Recall(int(rng.binomial(rows, specificity)), rows, rows),
            }
            for name in names
        }
        raw = bootstrap_means(values, draws=500, seed=study, purpose="x")
        found = corrected(values, recalls, names, draws=500, seed=study)
        drawn = mean_share(found.values, found.drawn)[1]
        ends = [
            (interval(drawn[:, 0], 0.95, clusters), true[0]),
            (interval(drawn[:, 1] - drawn[:, 0], 0.95, clusters, (-1, 1)), true[1] - true[0]),
            (interval(raw.mean(axis=2)[:, 0], 0.95, clusters), true[0]),
        ]
        inside += [low <= value <= high for (low, high), value in ends]
    return tuple(inside / studies)


# The docstring of `correct` has what 400 to 600 studies of each of 30 settings measured; here a few, with room for chance.
@pytest.mark.parametrize(
    ("base", "sensitivity", "specificity", "rows", "languages"),
    [(0.1, 0.9, 0.95, 100, 1), (0.3, 0.75, 0.8, 100, 1), (0.1, 0.9, 0.9, 60, 6), (0.03, 0.75, 0.8, 100, 6)],
)
def test_corrected_intervals_cover_the_true_share_where_raw_ones_do_not(
    base: float, sensitivity: float, specificity: float, rows: int, languages: int
) -> None:
    one, difference, raw = coverage(base, sensitivity, specificity, rows, 100, languages, studies=150)
    assert 0.9 <= one <= 0.995
    assert 0.9 <= difference <= 0.995
    assert raw < one - 0.03
