"""Every compiled loop, and its twin in torch, against a line of numpy."""

import numpy as np
import pytest
import torch

from mixmerge.merge import engines, kernels
from mixmerge.merge.device import Device

SIZES = [1, 15, 16, 17, 1024, 2047, 5000]  # around lanes, strips and folds


class Compiled:
    """The compiled loops over numpy arrays."""

    def __getattr__(self, name):
        return getattr(engines.CPU, name)

    def put(self, values):
        return values.copy()

    def get(self, values):
        return values


class Torched:
    """The same loops by torch: arrays go there and come back."""

    def __init__(self):
        self._device = Device("cpu")

    def __getattr__(self, name):
        return getattr(self._device, name)

    def put(self, values):
        return torch.from_numpy(values.copy())

    def get(self, values):
        return values.numpy()


@pytest.fixture(params=[Compiled, Torched], ids=["compiled", "torch"])
def loops(request):
    return request.param()


@pytest.fixture(params=SIZES)
def case(request):
    """float32 rows of three models and their base: some elements equal, some unchanged, some zero."""
    n, draw = request.param, np.random.default_rng(request.param)
    base = np.round(draw.standard_normal(n), 2).astype(np.float32)
    rows = base + np.round(draw.standard_normal((3, n)) * 0.1, 2).astype(np.float32)
    rows = np.where(draw.random((3, n)) < 0.3, base, rows).astype(np.float32)
    base[draw.random(n) < 0.1] = 0
    return rows, base, draw.random((3, n)) < 0.5


def wide(values):
    return values.astype(np.float64)


def test_a_weighted_sum_skips_weights_of_zero(loops, case):
    rows, _, _ = case
    out = loops.put(np.full(rows.shape[1], np.nan))
    loops.weighted_sum(loops.put(rows), np.array([0.3, 0.0, -1.7]), out)
    assert np.array_equal(loops.get(out), 0.3 * wide(rows[0]) + -1.7 * wide(rows[2]))


def test_weighted_sum_of_nothing_is_zero(loops, case):
    rows, _, _ = case
    out = loops.put(np.full(rows.shape[1], np.nan))
    loops.weighted_sum(loops.put(rows), np.zeros(3), out)
    assert not loops.get(out).any()


def test_dot_products_of_all_pairs(loops, case):
    rows, _, _ = case
    out = np.full((3, 3), np.nan)
    loops.dots(loops.put(rows), out)
    np.testing.assert_allclose(out, wide(rows) @ wide(rows).T, rtol=1e-11)


def test_masked_sums_are_added(loops, case):
    rows, _, mask = case
    sums = np.ones(3)
    loops.masked_sums(loops.put(rows[0]), loops.put(mask[0]), sums)
    size = np.abs(wide(rows[0]))
    np.testing.assert_allclose(sums, [1 + size.sum(), 1 + size[mask[0]].sum(), 1 + mask[0].sum()], rtol=1e-12)


def test_the_squares_that_a_mask_leaves(loops, case):
    rows, _, mask = case
    out = np.full(3, np.nan)
    loops.masked_squares(loops.put(rows), loops.put(mask[0]), out)
    np.testing.assert_allclose(out, (wide(rows) ** 2 * mask[0]).sum(axis=1), rtol=1e-12)


def test_the_variance_over_the_models(loops, case):
    rows, _, _ = case
    out = loops.put(np.full(rows.shape[1], np.nan, np.float32))
    loops.spread(loops.put(rows), out)
    np.testing.assert_allclose(loops.get(out), wide(rows).var(axis=0), rtol=1e-6, atol=1e-15)


def test_only_what_agrees_with_the_sum_takes_part(loops, case):
    rows, base, mask = case
    weights, out = np.array([0.5, 0.3, 0.2]), loops.put(np.full(rows.shape[1], np.nan))
    loops.agreeing(loops.put(rows), loops.put(base), loops.put(mask[0]), weights, out)
    d = wide(rows) - wide(base)
    total = d[0] + d[1] + d[2]
    agrees = ((d > 0) == (total >= 0)) & (d != 0) & mask[0]
    divisor = (weights[:, None] * agrees).sum(axis=0)
    mix = (weights[:, None] * d * agrees).sum(axis=0)
    np.testing.assert_allclose(loops.get(out), base + mix / np.where(divisor > 0, divisor, 1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_changed_mean_and_counts(loops, case, epsilon):
    rows, base, _ = case
    boosts, out = np.array([1.1, 1.0, 1.3]), loops.put(np.full(rows.shape[1], np.nan))
    loops.changed_mean(loops.put(rows), loops.put(base), np.float32(epsilon), boosts, out)
    changed = np.abs(rows - base) > np.float32(epsilon)
    models = changed.sum(axis=0)
    d = (wide(rows) - wide(base)) * changed
    alone = (d * boosts[:, None]).sum(axis=0)
    expected = base + np.where(models == 1, alone, d.sum(axis=0) / np.maximum(models, 1))
    np.testing.assert_allclose(loops.get(out), expected, rtol=1e-12, atol=1e-15)
    counts = np.full((3, 2), -1)
    loops.count_changed(loops.put(rows), loops.put(base), np.float32(epsilon), counts)
    assert np.array_equal(counts[:, 0], changed.sum(axis=1))
    assert np.array_equal(counts[:, 1], (changed & (models == 1)).sum(axis=1))


@pytest.mark.parametrize("t", [0.0, 0.003, 0.05, 1.0])
def test_what_is_near_is_taken_over_whole(loops, case, t):
    rows, base, _ = case
    out = loops.put(np.full(base.size, np.nan))
    loops.swap_near(loops.put(rows[0]), loops.put(base), t, out)
    d = wide(rows[0]) - wide(base)
    assert np.array_equal(loops.get(out), np.where(np.abs(d) <= t, wide(rows[0]), wide(base) + np.sign(d) * t))


def test_what_lies_beyond_the_fence_is_taken(loops, case):
    rows, base, _ = case
    out = loops.put(np.full(base.size, np.nan))
    taken = loops.take_beyond(loops.put(rows[1]), 0.7, loops.put(rows[0]), loops.put(base), out)
    beyond = np.abs(wide(rows[1])) >= 0.7
    assert taken == beyond.sum()
    assert np.array_equal(loops.get(out), np.where(beyond, rows[0], base))


@pytest.mark.parametrize("row", [1, 5, 40])
def test_what_belongs_to_rows(loops, row):
    draw = np.random.default_rng(row)
    rows = draw.standard_normal((3, 12 * row)).astype(np.float32)
    matrix = wide(rows).reshape(3, 12, row)
    out = np.full((3, 3, 12), np.nan)
    loops.row_dots(loops.put(rows), row, out)
    np.testing.assert_allclose(out, np.einsum("arc,brc->abr", matrix, matrix), rtol=1e-11, atol=1e-13)
    out = np.full((3, 3, row), np.nan)
    loops.column_dots(loops.put(rows), row, out)
    np.testing.assert_allclose(out, np.einsum("arc,brc->abc", matrix, matrix), rtol=1e-11, atol=1e-13)
    for by_row, shape in ((True, (3, 12)), (False, (3, row))):
        coefficients, summed = draw.standard_normal(shape), loops.put(np.full(12 * row, np.nan))
        loops.weighted_rows(loops.put(rows), row, coefficients, by_row, summed)
        spread = coefficients[:, :, None] if by_row else coefficients[:, None, :]
        np.testing.assert_allclose(loops.get(summed), (spread * matrix).sum(axis=0).ravel(), rtol=1e-12, atol=1e-14)
    factors, scaled = draw.standard_normal(12), loops.put(np.full(12 * row, np.nan, np.float32))
    loops.times_rows(loops.put(rows[0]), row, factors, scaled)
    assert np.array_equal(loops.get(scaled), (matrix[0] * factors[:, None]).astype(np.float32).ravel())


@pytest.mark.parametrize(
    "window",
    [
        (0, 1 << 62, 0x7F800000, 0),  # all
        (0x7F800000, 0, 0x7F800000, 0),  # none
        (0x3F000000, 1 << 62, 0x7F800000, 0),  # from 0.5 on
        (0x3DCCCCCD, 120, 0x3F000000, 130),  # from 0.1 to 0.5, the ends up to a place
    ],
)
def test_a_window_of_magnitudes_with_its_ends(loops, case, window):
    rows, _, _ = case
    mask = loops.put(np.zeros(rows.shape[1], np.bool_))
    loops.keep_window(loops.put(rows[0]), 100, np.array(window), mask)
    above, above_end, below, below_end = window
    bits, places = np.abs(rows[0]).view(np.uint32).astype(np.int64), np.arange(rows.shape[1]) + 100
    kept = (bits > above) | ((bits == above) & (places < above_end))
    if below < 0x7F800000:
        kept &= (bits < below) | ((bits == below) & (places >= below_end))
    assert np.array_equal(loops.get(mask), kept)


def packed(loops, rows, base):
    """The raw elements of the base and the models, as a block has them."""
    words = np.concatenate([base, *rows]).view(np.uint16)
    places, stored = np.arange(4) * 2 * base.size, np.full(4, kernels.F32, np.uint8)
    found, begins = loops.raw(words, places, stored, base.size)
    return found, begins, stored


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.125), (1.0, -1.0, 0.5), (0.0, 0.0, 0.0)])
def test_the_consensus_of_kept_task_vectors(loops, case, elect, normalize, weights):
    rows, base, mask = case
    w, scales = np.array(weights), np.array([1.0, 2.0, 0.5])
    out, none = loops.put(np.full(base.size, np.nan)), np.empty((0, 4), np.int64)
    at = *packed(loops, rows, base), 0, loops.put(mask), none
    assert loops.consensus(*at, w, scales, elect, normalize, 1.5, out) == -1
    d = (w * scales)[:, None] * (wide(rows) - wide(base)) * mask
    total = d[0] + d[1] + d[2]
    part = ((d > 0) == (total >= 0)) & (d != 0) if elect else np.ones_like(mask)
    divisor = (w[:, None] * part).sum(axis=0)
    mix = (d * part).sum(axis=0)
    if normalize:
        mix = mix / np.where(np.abs(divisor) >= 1e-8, divisor, 1.0)
    np.testing.assert_allclose(loops.get(out), base + 1.5 * mix, rtol=1e-9, atol=1e-12)


def test_a_window_in_consensus_is_the_same_as_its_mask(loops, case):
    rows, base, _ = case
    n, raw = base.size, packed(loops, rows, base)
    whole = 1 << 62
    ends = [(0x3DCCCCCD, 7, 0x7F800000, 0), (0x3C23D70A, whole, 0x3DCCCCCD, 3), (0, whole, 0x7F800000, 0)]
    windows, mask = np.array(ends), loops.put(np.zeros((3, n), np.bool_))
    for i in range(3):
        vector = loops.put(np.empty(n, np.float32))
        assert loops.task_vector(*raw, i + 1, vector) == -1
        assert np.array_equal(loops.get(vector), rows[i] - base)
        loops.keep_window(vector, 5, windows[i], mask[i])
    found = []
    for given in (np.empty((0, 4), np.int64), windows):
        out = loops.put(np.full(n, np.nan))
        loops.consensus(*raw, 5, mask, given, np.array([0.5, 0.3, 0.2]), np.ones(3), True, True, 1.0, out)
        found.append(loops.get(out))
    assert np.array_equal(*found)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_random_masks_are_the_same_everywhere(density):
    kept = []
    for loops in (Compiled(), Torched()):
        words, mask = loops.empty(3001, np.uint32), loops.empty(3001, np.bool_)
        loops.philox(7, 9, 130, words)
        loops.below(words, np.uint64(round(density * 2**32)), mask)
        kept.append(loops.get(mask).copy())
        assert loops.count(mask) == kept[-1].sum()
    assert np.array_equal(*kept)
    assert abs(kept[0].mean() - density) < 0.05
