"""Compiled loops over one block: the only code that touches every element.

The one idea: a block is small enough for a core's cache, so a formula may be several plain loops over it; numba compiles
them once per machine into a cache. Arithmetic is float64, in a fixed order (sums run in 16 lanes that are added at the
end), so a machine, a thread count or a block's neighbour changes no bit. Kernels release the interpreter lock, allocate
nothing that is returned, and never raise: what they find (a NaN, a count) they return.

Shapes: `n` elements in a block, `k` models. rows: float32 (k, n); base: float32 (n,); out: float64 (n,).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

import numpy as np

LANES = 16
HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16  # of a float32's magnitude: its high 15 and its low 16 bits


def kernel(function: Any) -> Callable[..., Any]:
    """Compile on first use, with the interpreter lock released; kept on disk for the next process."""
    lock = Lock()
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            with lock:
                if compiled is None:
                    import numba  # here, so that reading a configuration does not wait for it

                    compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        return compiled(*args)

    return call


@kernel
def decode_bf16(raw, out):  # type: ignore[no-untyped-def]
    """uint16 -> float32, exactly; whether all are finite."""
    bits = out.view(np.uint32)
    worst = np.uint16(0)
    for j in range(raw.size):
        bits[j] = np.uint32(raw[j]) << np.uint32(16)
        worst = max(worst, np.uint16(raw[j] & np.uint16(0x7FFF)))
    return worst < np.uint16(0x7F80)


@kernel
def all_finite(values):  # type: ignore[no-untyped-def]
    """Whether float32 values hold no NaN and no infinity."""
    bits = values.view(np.uint32)
    worst = np.uint32(0)
    for j in range(bits.size):
        worst = max(worst, bits[j] & np.uint32(0x7FFFFFFF))
    return worst < np.uint32(0x7F800000)


@kernel
def encode_bf16(values, single, out):  # type: ignore[no-untyped-def]
    """float64 -> bfloat16 as uint16, one rounding to nearest even; `single` is float32 scratch. Whether all are finite."""
    bits = single.view(np.uint32)
    worst = np.uint16(0)
    for j in range(values.size):
        value = values[j]
        nearest = np.float32(value)
        single[j] = nearest
        # Rounding twice can differ from rounding once: round the first time to odd instead (truncate, keep a sticky bit).
        word = bits[j]
        back = np.float64(nearest)
        if back != value:
            if abs(back) > abs(value):
                word -= np.uint32(1)
            word |= np.uint32(1)
        word += np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        stored = np.uint16(word >> np.uint32(16))
        out[j] = stored
        worst = max(worst, np.uint16(stored & np.uint16(0x7FFF)))
    return worst < np.uint16(0x7F80)


@kernel
def weighted_sum(rows, coefficients, out):  # type: ignore[no-untyped-def]
    """out = sum c_i x_i; a coefficient of 0 adds nothing, not even the sign of its zero, so 1 x + 0 y is x bit for bit."""
    first = True
    for i in range(rows.shape[0]):
        c = coefficients[i]
        if c == 0.0:
            continue
        x = rows[i]
        if first:
            for j in range(out.size):
                out[j] = c * x[j]
        else:
            for j in range(out.size):
                out[j] += c * x[j]
        first = False
    if first:
        out[:] = 0.0


@kernel
def dots(rows, out):  # type: ignore[no-untyped-def]
    """out[a, b] = x_a . x_b for all pairs: float64 (k, k)."""
    lanes = np.empty(LANES)
    n = rows.shape[1]
    for a in range(rows.shape[0]):
        for b in range(a + 1):
            x, y = rows[a], rows[b]
            lanes[:] = 0.0
            for start in range(0, n - LANES + 1, LANES):
                for lane in range(LANES):
                    lanes[lane] += np.float64(x[start + lane]) * np.float64(y[start + lane])
            for j in range(n - n % LANES, n):
                lanes[j % LANES] += np.float64(x[j]) * np.float64(y[j])
            out[a, b] = out[b, a] = lanes.sum()


@kernel
def difference(x, base, out):  # type: ignore[no-untyped-def]
    """out = x - base in float32: a task vector, whose magnitudes order like the exact differences do."""
    for j in range(base.size):
        out[j] = x[j] - base[j]


@kernel
def count_high(values, histogram):  # type: ignore[no-untyped-def]
    """Count the magnitudes of float32 values by their high bits, added to int64 (HIGH_BINS,)."""
    bits = values.view(np.uint32)
    for j in range(bits.size):
        histogram[(bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@kernel
def count_low(values, high, histogram):  # type: ignore[no-untyped-def]
    """Of the magnitudes in bin `high`, count the low 16 bits, added to int64 (LOW_BINS,)."""
    bits = values.view(np.uint32)
    for j in range(bits.size):
        if (bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(16) == high:
            histogram[bits[j] & np.uint32(0xFFFF)] += 1


@kernel
def places_of(values, magnitude, places):  # type: ignore[no-untyped-def]
    """Indices in the block whose magnitude has these bits, into int64 (n,); gives how many there are."""
    bits = values.view(np.uint32)
    found = 0
    for j in range(bits.size):
        if bits[j] & np.uint32(0x7FFFFFFF) == magnitude:
            places[found] = j
            found += 1
    return found


@kernel
def keep_window(values, start, above, above_end, below, below_end, mask):  # type: ignore[no-untyped-def]
    """mask (bool) of the magnitudes among the largest down to (above, above_end) without those down to (below, below_end).

    A magnitude is among the largest down to (m, end) when it exceeds m, or equals it at a flat index before `end`.
    """
    bits = values.view(np.uint32)
    for j in range(bits.size):
        m = bits[j] & np.uint32(0x7FFFFFFF)
        mask[j] = (m > above) | ((m == above) & (start + j < above_end))
    if below < np.uint32(0x7F800000):
        for j in range(bits.size):
            m = bits[j] & np.uint32(0x7FFFFFFF)
            mask[j] &= (m < below) | ((m == below) & (start + j >= below_end))


@kernel
def masked_sums(values, mask, sums):  # type: ignore[no-untyped-def]
    """sums += [sum |v|, sum |v| where kept, how many are kept]: float64 (3,)."""
    lanes = np.zeros((3, LANES))
    n = values.size
    for start in range(0, n - n % LANES, LANES):
        for lane in range(LANES):
            size, keep = np.float64(abs(values[start + lane])), np.float64(mask[start + lane])
            lanes[0, lane] += size
            lanes[1, lane] += size * keep
            lanes[2, lane] += keep
    for j in range(n - n % LANES, n):
        size, keep = np.float64(abs(values[j])), np.float64(mask[j])
        lanes[0, j % LANES] += size
        lanes[1, j % LANES] += size * keep
        lanes[2, j % LANES] += keep
    for i in range(3):
        sums[i] += lanes[i].sum()


@kernel
def consensus(rows, base, mask, weights, scales, elect, normalize, factor, out):  # type: ignore[no-untyped-def]
    """out = b + factor mix of the kept task vectors d_i, with D_i = w_i scale_i d_i.

    elect: the sign of sum D_i (0 counts as +) is elected per element, and only D_i of that sign take part (zeros never).
    normalize: the mix is divided by the sum of the weights that took part, or of all without an election (1 if ~0).
    """
    strip = 1024
    total, divisor = np.empty(strip), np.empty(strip)
    for start in range(0, out.size, strip):
        n = min(strip, out.size - start)
        b = base[start : start + n]
        o = out[start : start + n]
        total[:] = 0.0
        all_weights = 0.0
        for i in range(rows.shape[0]):
            x, m, c = rows[i, start : start + n], mask[i, start : start + n], weights[i] * scales[i]
            all_weights += weights[i]
            for j in range(n):
                total[j] += c * (np.float64(x[j]) - np.float64(b[j])) * np.float64(m[j])
        if elect:
            o[:] = 0.0
            divisor[:] = 0.0
            for i in range(rows.shape[0]):
                x, m, c, w = rows[i, start : start + n], mask[i, start : start + n], weights[i] * scales[i], weights[i]
                for j in range(n):
                    d = c * (np.float64(x[j]) - np.float64(b[j])) * np.float64(m[j])
                    agrees = ((d > 0.0) == (total[j] >= 0.0)) & (d != 0.0)
                    o[j] += d if agrees else 0.0
                    divisor[j] += w if agrees else 0.0
        else:
            o[:] = total[:n]
            divisor[:] = all_weights
        if normalize:
            for j in range(n):
                # weights of both signs can cancel: such an element keeps its plain sum
                o[j] /= divisor[j] if abs(divisor[j]) >= 1e-8 else 1.0
        for j in range(n):
            o[j] = np.float64(b[j]) + factor * o[j]


@kernel
def keep_by_rank(values, row, low, span, words, mask):  # type: ignore[no-untyped-def]
    """mask = words / 2^32 < low + span r, with r the rank (0 the smallest) of a magnitude in its row of `row` elements.

    Of equal magnitudes the lowest index ranks highest. A radix sort of each row, 11 bits at a time.
    """
    bits = values.view(np.uint32)
    order, moved = np.empty(row, np.int32), np.empty(row, np.int32)
    ends = np.empty(2048, np.int64)
    for start in range(0, values.size, row):
        for j in range(row):
            order[j] = row - 1 - j
        for shift in (np.uint32(0), np.uint32(11), np.uint32(22)):
            ends[:] = 0
            for j in range(row):
                ends[((bits[start + j] & np.uint32(0x7FFFFFFF)) >> shift) & np.uint32(2047)] += 1
            if ends[((bits[start] & np.uint32(0x7FFFFFFF)) >> shift) & np.uint32(2047)] == row:
                continue  # all alike here, as the low bits of bfloat16 are
            total = 0
            for digit in range(2048):
                here = ends[digit]
                ends[digit] = total
                total += here
            for j in range(row):
                digit = ((bits[start + order[j]] & np.uint32(0x7FFFFFFF)) >> shift) & np.uint32(2047)
                moved[ends[digit]] = order[j]
                ends[digit] += 1
            order, moved = moved, order
        for rank in range(row):
            j = start + order[rank]
            mask[j] = words[j] < (low + span * rank) * 4294967296.0
