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


# Called once in a process, when a kernel had to be compiled because this machine's cache did not have it.
when_compiling: list[Callable[[], None]] = []


def kernel(function: Any) -> Callable[..., Any]:
    """Compile on first use, with the interpreter lock released; kept on disk for the next process."""
    lock = Lock()
    compiled: Any = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            with lock:
                if compiled is None:
                    import numba  # here, so that reading a configuration does not wait for it

                    fresh = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
                    found = fresh(*args)
                    while fresh.stats.cache_misses and when_compiling:
                        when_compiling.pop()()
                    compiled = fresh
                    return found
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
def low_rank(base, left, right, scale, column, out):  # type: ignore[no-untyped-def]
    """out = base + scale left @ right, row after row from `column` of the first on; left: (rows, r), right: (r, columns)."""
    start = 0
    for row in range(left.shape[0]):
        size = int(min(right.shape[1] - column, out.size - start))
        stretch = out[start : start + size]
        stretch[:] = 0.0
        for k in range(right.shape[0]):
            factor, values = np.float64(left[row, k]), right[k, column : column + size]
            for j in range(size):
                stretch[j] += factor * values[j]
        for j in range(size):
            stretch[j] = base[start + j] + scale * stretch[j]
        start, column = start + size, 0


@kernel
def add_squares(values, start, columns, by_column, out):  # type: ignore[no-untyped-def]
    """Add the squares of values, which stand from flat index `start` on, to their row's or their column's sum."""
    for j in range(values.size):
        out[(start + j) % columns if by_column else (start + j) // columns] += values[j] * values[j]


@kernel
def gain(values, start, columns, by_row, by_column, out):  # type: ignore[no-untyped-def]
    """float64 -> float32, times the gain of the row or of the column where there is one."""
    for j in range(values.size):
        value = values[j]
        if by_row.size:
            value *= by_row[(start + j) // columns]
        if by_column.size:
            value *= by_column[(start + j) % columns]
        out[j] = value


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
def signs(rows, counts, sums, changed):  # type: ignore[no-untyped-def]
    """Where task vectors agree and where their signs conflict; all added to what is there.

    counts, int64 (k + 1, 2): [m, 0] elements that m of them change, [m, 1] those of them with both signs.
    sums, float64 (2,): sum |d| over the elements that two or more change, and over those of them with both signs.
    changed, int64 (k,): elements that each changes.
    """
    for j in range(rows.shape[1]):
        positive = negative = 0
        size = 0.0
        for i in range(rows.shape[0]):
            d = rows[i, j]
            positive += d > 0.0
            negative += d < 0.0
            changed[i] += d != 0.0
            size += abs(np.float64(d))
        both = (positive > 0) & (negative > 0)
        counts[positive + negative, 0] += 1
        counts[positive + negative, 1] += both
        if positive + negative > 1:
            sums[0] += size
            sums[1] += size * both


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
def gather_low(values, high, out):  # type: ignore[no-untyped-def]
    """The low 16 bits of the magnitudes in bin `high`, in their order, into uint16 (n,); gives how many there are."""
    bits = values.view(np.uint32)
    found = 0
    for j in range(bits.size):
        # written always, kept if it belongs: no branch that could be guessed wrongly
        out[found] = np.uint16(bits[j] & np.uint32(0xFFFF))
        found += (bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(16) == high
    return found


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
    keys, moved = np.empty(row, np.uint64), np.empty(row, np.uint64)
    counts = np.empty((3, 2048), np.int32)
    for start in range(0, values.size, row):
        counts[:] = 0
        for j in range(row):
            magnitude = bits[start + row - 1 - j] & np.uint32(0x7FFFFFFF)
            keys[j] = (np.uint64(magnitude) << np.uint64(32)) | np.uint64(row - 1 - j)
            counts[0, magnitude & np.uint32(2047)] += 1
            counts[1, (magnitude >> np.uint32(11)) & np.uint32(2047)] += 1
            counts[2, magnitude >> np.uint32(22)] += 1
        for digit in range(3):
            shift = np.uint64(32 + 11 * digit)
            ends = counts[digit]
            if ends[(keys[0] >> shift) & np.uint64(2047)] == row:
                continue  # all alike here
            total = np.int64(0)
            for value in range(2048):
                here = ends[value]
                ends[value] = total
                total += here
            for j in range(row):
                place = (keys[j] >> shift) & np.uint64(2047)
                moved[ends[place]] = keys[j]
                ends[place] += 1
            keys, moved = moved, keys
        for rank in range(row):
            at = start + np.int64(keys[rank] & np.uint64(0xFFFFFFFF))
            mask[at] = words[at] < (low + span * rank) * 4294967296.0


@kernel
def philox(key_low, key_high, start, out):  # type: ignore[no-untyped-def]
    """Words start .. start+n of the stream of a 64-bit key, into uint32 (n,): Philox4x32-10, counter c gives words 4c .. 4c+3.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    lanes = 64  # counters at once, so that the compiler sees plain loops
    x = np.empty((4, lanes), np.uint32)
    low = np.uint64(0xFFFFFFFF)
    first = start // 4
    for group in range(first, (start + out.size + 3) // 4, lanes):
        for lane in range(lanes):
            counter = np.uint64(group + lane)
            x[0, lane] = np.uint32(counter & low)
            x[1, lane] = np.uint32(counter >> np.uint64(32))
            x[2, lane] = np.uint32(0)
            x[3, lane] = np.uint32(0)
        k0, k1 = np.uint32(key_low), np.uint32(key_high)
        for _ in range(10):
            for lane in range(lanes):
                a = np.uint64(0xD2511F53) * np.uint64(x[0, lane])
                b = np.uint64(0xCD9E8D57) * np.uint64(x[2, lane])
                x0 = np.uint32(b >> np.uint64(32)) ^ x[1, lane] ^ k0
                x2 = np.uint32(a >> np.uint64(32)) ^ x[3, lane] ^ k1
                x[0, lane], x[1, lane] = x0, np.uint32(b & low)
                x[2, lane], x[3, lane] = x2, np.uint32(a & low)
            k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
            k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
        place = group * 4 - start
        if place >= 0 and place + 4 * lanes <= out.size:
            for lane in range(lanes):
                for word in range(4):
                    out[place + 4 * lane + word] = x[word, lane]
        else:
            for lane in range(lanes):
                for word in range(4):
                    at = place + 4 * lane + word
                    if 0 <= at < out.size:
                        out[at] = x[word, lane]
