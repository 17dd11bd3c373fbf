"""The compiled loops against plain numpy, where a shortcut in them could go wrong."""

import numpy as np
import pytest

from mixmerge.merge import kernels, selection

ROWS = [1, 7, 64, 300, 2048]


def vectors(kind: str, n: int) -> np.ndarray:
    draw = np.random.default_rng(7)
    values = draw.standard_normal(n).astype(np.float32)
    match kind:
        case "ties":  # as differences of bfloat16 weights are
            values = np.round(values, 1)
        case "zeros":
            values[:] = 0
        case "half zeros":
            values[draw.random(n) < 0.5] = 0
        case "many octaves":
            values *= np.exp(draw.standard_normal(n) * 8).astype(np.float32)
        case "nearly alike":
            values = np.float32(1) + values * np.float32(1e-5)
        case "two sizes":
            values = np.where(draw.random(n) < 0.5, values * np.float32(1e-6), np.float32(1000))
    return np.ascontiguousarray(values, np.float32)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "half zeros", "many octaves", "nearly alike", "two sizes"])
@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.1), (0.5, 0.5), (0.3, 0.0), (0.9, 0.15), (1.0, 0.0), (0.0, 0.0)]
)
def test_a_mask_by_rank_is_that_of_the_sorted_row(row: int, kind: str, density: float, epsilon: float) -> None:
    n = max(3, 6000 // row) * row
    values, words = vectors(kind, n), np.random.default_rng(8).integers(0, 2**32, n, dtype=np.uint32)
    words[::11], words[5::11] = 0, 2**32 - 1  # the words that a limit in 32 bits could get wrong
    low, span, mask = density - epsilon, 2 * epsilon / max(1, row - 1), np.empty(n, np.bool_)
    selection.keep_by_rank(values, row, low, span, words, mask)
    for magnitudes, word, kept in zip(
        np.abs(values).reshape(-1, row), words.reshape(-1, row), mask.reshape(-1, row), strict=True
    ):
        rank = np.empty(row, int)
        rank[np.lexsort((-np.arange(row), magnitudes))] = np.arange(row)  # of equal ones the first ranks highest
        assert np.array_equal(kept, word < (low + span * rank) * 2**32)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_the_low_bits_of_one_bin_come_in_their_order(row: int, kind: str) -> None:
    values = vectors(kind, row)
    bits = np.abs(values).view(np.uint32)
    histogram = np.zeros(selection.HIGH_BINS, np.int64)
    selection.count_high(values, histogram)
    assert np.array_equal(histogram, np.bincount(bits >> 16, minlength=selection.HIGH_BINS))
    for high in np.unique(bits >> 16):
        out = np.empty(row + 1, np.uint16)
        count = selection.gather_low(values, high, out)
        assert np.array_equal(out[:count], bits[bits >> 16 == high] & 0xFFFF)


@pytest.mark.parametrize(("stored", "dtype"), [(kernels.F16, np.float16), (kernels.F32, np.float32)])
def test_raw_elements_decode_exactly(stored: int, dtype: type) -> None:
    if dtype is np.float16:
        words = np.arange(1 << 16, dtype=np.uint16)  # all there are
    else:
        words = np.random.default_rng(0).integers(0, 1 << 16, 1 << 14, dtype=np.uint16)
    values = words.view(dtype)
    finite = np.isfinite(values)
    out, one = np.empty(values.size, np.float32), np.empty(1, np.float32)
    assert not kernels.decode(words, 0, stored, out)
    assert np.array_equal(out[finite], values[finite].astype(np.float32))
    assert np.array_equal(np.signbit(out[finite]), np.signbit(values[finite]))
    for at in [*np.flatnonzero(~finite)[:50], *np.flatnonzero(finite)[:50]]:
        assert kernels.decode(words, at * words.size // values.size, stored, one) == finite[at]


@pytest.mark.parametrize("n", [1, 3, 255, 1024, 1025, 5000])
def test_dot_products_of_any_length(n: int) -> None:
    rows = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    out, exact = np.full((3, 3), np.nan), rows.astype(np.float64) @ rows.astype(np.float64).T
    kernels.dots(rows, out)
    np.testing.assert_allclose(out, exact, rtol=1e-12, atol=1e-12 * n)
    assert np.array_equal(out, out.T)
    by_row = np.full((3, 3, 1), np.nan)
    kernels.row_dots(rows, n, by_row)
    np.testing.assert_allclose(by_row[:, :, 0], exact, rtol=1e-12, atol=1e-12 * n)
    by_column = np.full((3, 3, n), np.nan)
    kernels.column_dots(rows, n, by_column)
    np.testing.assert_allclose(by_column.sum(axis=2), exact, rtol=1e-12, atol=1e-12 * n)


def test_an_element_that_is_not_finite_is_found_in_the_base_and_in_the_model() -> None:
    words = np.zeros(3 * 5000, np.uint16)
    places, stored, out = np.arange(3) * 5000, np.zeros(3, np.uint8), np.empty(5000, np.float32)
    assert kernels.task_vector(words, places, stored, 2, out) == -1
    words[2 * 5000 + 4999] = 0x7F80
    assert kernels.task_vector(words, places, stored, 1, out) == -1
    assert kernels.task_vector(words, places, stored, 2, out) == 2
    words[4000] = 0x7FC1
    assert kernels.task_vector(words, places, stored, 2, out) == 0
