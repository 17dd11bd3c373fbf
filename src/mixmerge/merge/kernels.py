"""Compiled loops over one block: the only code that touches every element.

The one idea: a block is small enough for a core's cache, so a formula may be several plain loops over it; numba compiles
them once per machine into a cache. Arithmetic is float64, in a fixed order (sums run in lanes that are added at the
end), so a machine, a thread count or a block's neighbour changes no bit. Kernels release the interpreter lock, allocate
nothing that is returned, and never raise: what they find (a NaN, a count) they return.

Shapes: `n` elements in a block, `k` models. rows: float32 (k, n); base: float32 (n,); out: float64 (n,).
"""

from __future__ import annotations

import numpy as np

from mixmerge.merge.compiling import helper, kernel

BF16, F16, F32 = 0, 1, 2  # how raw elements are stored
STRIP = 2048  # elements that a fused loop decodes at once: they stay in the nearest cache


@helper
def width(stored):  # type: ignore[no-untyped-def]
    """uint16 words of an element."""
    return 2 if stored == F32 else 1


@helper
def decoded(words, place, stored, out):  # type: ignore[no-untyped-def]
    """Raw elements from a place in uint16 words on -> float32, exactly; whether all are finite."""
    bits = out.view(np.uint32)
    if stored == F32:
        whole = words[place : place + 2 * out.size].view(np.uint32)
        largest = np.uint32(0)
        for j in range(out.size):
            bits[j] = whole[j]
            largest = max(largest, whole[j] & np.uint32(0x7FFFFFFF))
        return largest < np.uint32(0x7F800000)
    half = words[place : place + out.size]
    worst = np.uint16(0)
    for j in range(out.size):
        worst = max(worst, np.uint16(half[j] & np.uint16(0x7FFF)))
    if stored == BF16:
        for j in range(out.size):
            bits[j] = np.uint32(half[j]) << np.uint32(16)
        return worst < np.uint16(0x7F80)
    for j in range(out.size):
        # the same digits under float32's exponent are 2^112 times too small, subnormal ones too
        sign, digits = np.uint32(half[j] & np.uint16(0x8000)), np.uint32(half[j] & np.uint16(0x7FFF))
        bits[j] = (sign << np.uint32(16)) | (digits << np.uint32(13))
        out[j] *= np.float32(2.0**112)
    return worst < np.uint16(0x7C00)


@kernel
def decode(words, place, stored, out):  # type: ignore[no-untyped-def]
    """Raw elements from a place in uint16 words on -> float32, exactly; whether all are finite."""
    return decoded(words, place, stored, out)


@kernel
def task_vector(words, places, stored, index, out):  # type: ignore[no-untyped-def]
    """out = x - base in float32, from the raw elements of the base (0) and of the model (index).

    Its magnitudes order like the exact differences do. Gives -1, or 0 or the index where one of the two is not finite.
    """
    base = np.empty(STRIP, np.float32)
    for start in range(0, out.size, STRIP):
        stretch = out[start : start + STRIP]
        b = base[: stretch.size]
        if not decoded(words, places[0] + start * width(stored[0]), stored[0], b):
            return 0
        if not decoded(words, places[index] + start * width(stored[index]), stored[index], stretch):
            return index
        for j in range(stretch.size):
            stretch[j] -= b[j]
    return -1


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
    pair_up(rows, 0, rows.shape[1], np.empty((rows.shape[0], 1024)), np.empty(256), out)


@kernel
def row_dots(rows, row, out):  # type: ignore[no-untyped-def]
    """out[a, b, r] = x_a . x_b over row number r, of `row` elements: float64 (k, k, rows)."""
    k, strip = rows.shape[0], strip_of(row)
    wide, products, found = np.empty((k, strip)), np.empty(strip // 4), np.empty((k, k))
    for r in range(out.shape[2]):
        pair_up(rows, r * row, row, wide, products, found)
        out[:, :, r] = found


@kernel
def column_dots(rows, row, out):  # type: ignore[no-untyped-def]
    """out[a, b, c] = x_a . x_b over column number c of these rows of `row` elements: float64 (k, k, row)."""
    out[:] = 0.0
    for start in range(0, rows.shape[1], row):
        for a in range(rows.shape[0]):
            x = rows[a, start : start + row]
            for b in range(a + 1):
                y, total = rows[b, start : start + row], out[a, b]
                for c in range(row):
                    total[c] += np.float64(x[c]) * np.float64(y[c])
    for a in range(rows.shape[0]):
        for b in range(a):
            out[b, a] = out[a, b]


@kernel
def weighted_rows(rows, row, coefficients, by_row, out):  # type: ignore[no-untyped-def]
    """out = sum c_i x_i, with a coefficient for each row, float64 (k, rows), or else for each column, float64 (k, row)."""
    for r in range(out.size // row):
        total = out[r * row : (r + 1) * row]
        total[:] = 0.0
        for i in range(rows.shape[0]):
            x, c = rows[i, r * row : (r + 1) * row], coefficients[i]
            if by_row:
                for j in range(row):
                    total[j] += c[r] * x[j]
            else:
                for j in range(row):
                    total[j] += c[j] * x[j]


@helper
def strip_of(row):  # type: ignore[no-untyped-def]
    """How many products of a row are folded at a time: a power of two that holds the row, or 1024."""
    strip = 4
    while strip < 1024 and strip < row:
        strip *= 2
    return strip


@helper
def pair_up(rows, first, n, wide, products, out):  # type: ignore[no-untyped-def]
    """out[a, b] = x_a . x_b over n elements from `first` on, strip by strip of float64 scratch `wide`."""
    k, strip = wide.shape
    out[:] = 0.0
    for start in range(first, first + n, strip):
        for a in range(k):
            row, x = rows[a, start : min(start + strip, first + n)], wide[a]
            for j in range(row.size):
                x[j] = row[j]
            x[row.size :] = 0.0
        for a in range(k):
            for b in range(a + 1):
                out[a, b] += dot(wide[a], wide[b], products)
    for a in range(k):
        for b in range(a):
            out[b, a] = out[a, b]


@helper
def dot(x, y, products):  # type: ignore[no-untyped-def]
    """x . y, folded in halves; `products` is scratch of a quarter of their size, which is a power of two."""
    n = products.size
    x0, x1, x2, x3 = x[:n], x[n : 2 * n], x[2 * n : 3 * n], x[3 * n :]
    y0, y1, y2, y3 = y[:n], y[n : 2 * n], y[2 * n : 3 * n], y[3 * n :]
    for j in range(n):
        products[j] = (x0[j] * y0[j] + x1[j] * y1[j]) + (x2[j] * y2[j] + x3[j] * y3[j])
    return folded(products)


@helper
def quartered(values):  # type: ignore[no-untyped-def]
    """The sum of a power of two of values, four quarters at once and then as folded; they are overwritten."""
    n = values.size // 4
    for j in range(n):
        values[j] = (values[j] + values[j + n]) + (values[j + 2 * n] + values[j + 3 * n])
    return folded(values[:n])


@helper
def folded(values):  # type: ignore[no-untyped-def]
    """The sum of a power of two of values, in halves; they are overwritten."""
    n = values.size
    while n > 1:
        n //= 2
        for j in range(n):
            values[j] += values[j + n]
    return values[0]


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
def masked_sums(values, mask, sums):  # type: ignore[no-untyped-def]
    """sums += [sum |v|, sum |v| where kept, how many are kept]: float64 (3,)."""
    strip = 1024
    whole, kept, count = np.empty(strip), np.empty(strip), 0
    for start in range(0, values.size, strip):
        v, m = values[start : start + strip], mask[start : start + strip]
        for j in range(v.size):
            whole[j] = np.float64(abs(v[j]))
            kept[j] = whole[j] * np.float64(m[j])
            count += m[j]
        whole[v.size :] = 0.0
        kept[v.size :] = 0.0
        sums[0] += quartered(whole)
        sums[1] += quartered(kept)
    sums[2] += count


@kernel
def keep_window(values, start, window, mask):  # type: ignore[no-untyped-def]
    """mask (bool) of the magnitudes among the largest down to (above, above_end) without those down to (below, below_end).

    A magnitude is among the largest down to (m, end) when it exceeds m, or equals it at a flat index before `end`.
    window: int64 (4,), the four in this order; m are the bits of a magnitude.
    """
    in_window(values, start, window, mask)


@helper
def in_window(values, start, window, mask):  # type: ignore[no-untyped-def]
    """keep_window, strip by strip."""
    bits = values.view(np.int32)
    # those equal to a limit belong together but where a limit's end lies within: a first part and a second
    middle = min(max(window[1] - start, 0), bits.size)
    for b, m, equal in ((bits[:middle], mask[:middle], 1), (bits[middle:], mask[middle:], 0)):
        above = np.int32(window[0] - equal)
        for j in range(b.size):
            m[j] = (b[j] & np.int32(0x7FFFFFFF)) > above
    if window[2] < 0x7F800000:
        middle = min(max(window[3] - start, 0), bits.size)
        for b, m, equal in ((bits[:middle], mask[:middle], 0), (bits[middle:], mask[middle:], 1)):
            below = np.int32(window[2] + equal)
            for j in range(b.size):
                m[j] &= (b[j] & np.int32(0x7FFFFFFF)) < below


@kernel
def consensus(words, places, stored, first, mask, windows, weights, scales, elect, normalize, factor, out):  # type: ignore[no-untyped-def]
    """out = b + factor mix of the kept task vectors d_i, with D_i = w_i scale_i d_i, from raw elements as in task_vector.

    Kept are those of the mask, bool (k, n), or, where `windows` has rows, int64 (k, 4), those that keep_window keeps; `first` is the
    flat index of the block.

    elect: the sign of sum D_i (0 counts as +) is elected per element, and only D_i of that sign take part (zeros never).
    normalize: the mix is divided by the sum of the weights that took part, or of all without an election (1 if ~0).
    Gives -1, or the index of one that is not finite.
    """
    k, strip = weights.size, 512
    base, x = np.empty(strip, np.float32), np.empty(strip, np.float32)
    single, kept = np.empty(strip, np.float32), np.empty(strip, np.bool_)
    d, total, mix, divisor = np.empty((k, strip)), np.empty(strip), np.empty(strip), np.empty(strip)
    for start in range(0, out.size, strip):
        n = min(strip, out.size - start)
        if not decoded(words, places[0] + start * width(stored[0]), stored[0], base[:n]):
            return 0
        total[:] = 0.0
        all_weights = 0.0
        for i in range(k):
            if not decoded(words, places[i + 1] + start * width(stored[i + 1]), stored[i + 1], x[:n]):
                return i + 1
            own, c = d[i], weights[i] * scales[i]
            all_weights += weights[i]
            if windows.shape[0]:
                for j in range(n):
                    single[j] = x[j] - base[j]
                in_window(single[:n], first + start, windows[i], kept[:n])
                m = kept[:n]
            else:
                m = mask[i, start : start + n]
            for j in range(n):
                own[j] = c * (np.float64(x[j]) - np.float64(base[j])) * np.float64(m[j])
                total[j] += own[j]
        if elect:
            mix[:] = 0.0
            divisor[:] = 0.0
            for i in range(k):
                own, w = d[i], weights[i]
                for j in range(n):
                    agrees = ((own[j] > 0.0) == (total[j] >= 0.0)) & (own[j] != 0.0)
                    mix[j] += own[j] if agrees else 0.0
                    divisor[j] += w if agrees else 0.0
        else:
            mix[:] = total
            divisor[:] = all_weights
        if normalize:
            for j in range(n):
                # weights of both signs can cancel: such an element keeps its plain sum
                mix[j] /= divisor[j] if abs(divisor[j]) >= 1e-8 else 1.0
        o = out[start : start + n]
        for j in range(n):
            o[j] = np.float64(base[j]) + factor * mix[j]
    return -1


@kernel
def spread(rows, out):  # type: ignore[no-untyped-def]
    """The variance over the models of each element, into float32 (n,)."""
    k, mean, square = rows.shape[0], np.empty(STRIP), np.empty(STRIP)
    for start in range(0, out.size, STRIP):
        o = out[start : start + STRIP]
        mean[:] = 0.0
        square[:] = 0.0
        for i in range(k):
            x = rows[i, start : start + o.size]
            for j in range(o.size):
                mean[j] += x[j]
        for i in range(k):
            x = rows[i, start : start + o.size]
            for j in range(o.size):
                off = x[j] - mean[j] / k
                square[j] += off * off
        for j in range(o.size):
            o[j] = square[j] / k


@kernel
def masked_squares(rows, mask, out):  # type: ignore[no-untyped-def]
    """out[i] = sum x_i^2 where the mask holds: float64 (k,)."""
    strip = 1024
    squares = np.empty(strip)
    for i in range(rows.shape[0]):
        out[i] = 0.0
        for start in range(0, mask.size, strip):
            x, m = rows[i, start : start + strip], mask[start : start + strip]
            for j in range(x.size):
                squares[j] = np.float64(x[j]) * np.float64(x[j]) * np.float64(m[j])
            squares[x.size :] = 0.0
            out[i] += quartered(squares)


@kernel
def agreeing(rows, base, mask, weights, out):  # type: ignore[no-untyped-def]
    """out = b + sum w_i e_i d_i / sum w_i e_i where the mask holds, e_i: d_i = x_i - b has the sign of sum d_i (0: +)."""
    k = rows.shape[0]
    total, mix, divisor = np.empty(STRIP), np.empty(STRIP), np.empty(STRIP)
    for start in range(0, out.size, STRIP):
        o, b, m = out[start : start + STRIP], base[start : start + STRIP], mask[start : start + STRIP]
        total[:] = 0.0
        mix[:] = 0.0
        divisor[:] = 0.0
        for i in range(k):
            x = rows[i, start : start + o.size]
            for j in range(o.size):
                total[j] += np.float64(x[j]) - np.float64(b[j])
        for i in range(k):
            x, w = rows[i, start : start + o.size], weights[i]
            for j in range(o.size):
                d = (np.float64(x[j]) - np.float64(b[j])) * np.float64(m[j])
                agrees = ((d > 0.0) == (total[j] >= 0.0)) & (d != 0.0)
                mix[j] += w * d if agrees else 0.0
                divisor[j] += w if agrees else 0.0
        for j in range(o.size):
            o[j] = np.float64(b[j]) + mix[j] / (divisor[j] if divisor[j] > 0.0 else 1.0)


@kernel
def changed_mean(rows, base, epsilon, boosts, out):  # type: ignore[no-untyped-def]
    """out = b + the mean of those x_i - b beyond epsilon (in float32), times boosts[i] where there is but one."""
    total, boosted, models = np.empty(STRIP), np.empty(STRIP), np.empty(STRIP)
    for start in range(0, out.size, STRIP):
        o, b = out[start : start + STRIP], base[start : start + STRIP]
        total[:] = 0.0
        boosted[:] = 0.0
        models[:] = 0.0
        for i in range(rows.shape[0]):
            x = rows[i, start : start + o.size]
            for j in range(o.size):
                changed = np.float64(abs(x[j] - b[j]) > epsilon)
                d = (np.float64(x[j]) - np.float64(b[j])) * changed
                total[j] += d
                boosted[j] += d * boosts[i]
                models[j] += changed
        for j in range(o.size):
            o[j] = np.float64(b[j]) + (boosted[j] if models[j] == 1.0 else total[j] / max(models[j], 1.0))


@kernel
def count_changed(rows, base, epsilon, out):  # type: ignore[no-untyped-def]
    """out[i] = how many elements x_i changes by more than epsilon, and how many of them no other does: int64 (k, 2)."""
    models = np.empty(STRIP, np.int32)
    out[:] = 0
    for start in range(0, base.size, STRIP):
        b = base[start : start + STRIP]
        models[:] = 0
        for i in range(rows.shape[0]):
            x = rows[i, start : start + b.size]
            for j in range(b.size):
                models[j] += abs(x[j] - b[j]) > epsilon
        for i in range(rows.shape[0]):
            x, all_, alone = rows[i, start : start + b.size], 0, 0
            for j in range(b.size):
                changed = abs(x[j] - b[j]) > epsilon
                all_ += changed
                alone += changed & (models[j] == 1)
            out[i, 0] += all_
            out[i, 1] += alone


@kernel
def swap_near(x, base, t, out):  # type: ignore[no-untyped-def]
    """out = b + w (x - b) with w = t / |x - b|; x itself where w is 1 or more, or nothing differs."""
    for j in range(out.size):
        b, value = np.float64(base[j]), np.float64(x[j])
        d = value - b
        out[j] = value if abs(d) <= t else b + (t if d > 0.0 else -t)


@kernel
def times_rows(values, row, factors, out):  # type: ignore[no-untyped-def]
    """out = values times the factor of their row, rounded once to float32."""
    for r in range(out.size // row):
        factor = factors[r]
        for j in range(r * row, (r + 1) * row):
            out[j] = values[j] * factor


@kernel
def take_beyond(values, fence, x, base, out):  # type: ignore[no-untyped-def]
    """out = x where |value| >= fence, else b; gives how many that are."""
    taken = 0
    for j in range(out.size):
        beyond = abs(np.float64(values[j])) >= fence
        taken += beyond
        out[j] = x[j] if beyond else base[j]
    return taken
