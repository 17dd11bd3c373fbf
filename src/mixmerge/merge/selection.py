"""Compiled loops that choose elements: by the rank of their magnitude in a tensor or a row, or at random.

The one idea: float magnitudes order like their bits, so a rank is found by counting bits, without a sort of the tensor.
As in kernels.py: a fixed order, no interpreter lock, nothing returned is allocated.

Shapes: values: float32 (n,), a task vector in a block; mask: bool (n,).
"""

from __future__ import annotations

import numpy as np

from mixmerge.merge.compiling import helper, kernel

STRIP = 1024  # elements that are looked at together
FEW, COUNTED = 8, 128  # elements of a row whose ranks are counted one by one; more are worth a look at all, or a sort
HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16  # of a float32's magnitude: its high 15 and its low 16 bits


@kernel
def count_high(values, histogram):  # type: ignore[no-untyped-def]
    """Count the magnitudes of float32 values by their high bits, added to int64 (HIGH_BINS,)."""
    bits = values.view(np.uint32)
    for j in range(bits.size):
        histogram[(bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@kernel
def gather_low(values, high, out):  # type: ignore[no-untyped-def]
    """The low 16 bits of the magnitudes in bin `high`, in their order, into uint16 (n + 1,); gives how many there are."""
    bits, wanted = values.view(np.uint32), np.uint32(high)
    hits = np.zeros(STRIP, np.uint8)
    eights = hits.view(np.uint64)
    found = np.int64(0)
    for start in range(0, bits.size, STRIP):
        some = bits[start : start + STRIP]
        for j in range(some.size):
            hits[j] = ((some[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)) == wanted
        hits[some.size :] = 0
        for eight in range(eights.size):
            if eights[eight]:  # few have any
                for j in range(8 * eight, min(8 * eight + 8, some.size)):
                    # written always, kept if it belongs: no branch that could be guessed wrongly
                    out[found] = np.uint16(some[j] & np.uint32(0xFFFF))
                    found += hits[j]
    return found


@kernel
def count_low(values, high, histogram):  # type: ignore[no-untyped-def]
    """Count the magnitudes in bin `high` by their low 16 bits, added to int64 (LOW_BINS,)."""
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
def keep_by_rank(values, row, low, span, words, mask):  # type: ignore[no-untyped-def]
    """mask = words / 2^32 < low + span r, with r the rank (0 the smallest) of a magnitude in its row of `row` elements.

    Of equal magnitudes the lowest index ranks highest. A histogram tells about where an element ranks, which decides for
    most words; what it leaves open is counted, or looked up in the sorted row where that is much.
    """
    bits = values.view(np.uint32)
    digits = np.int64(0)  # of the mantissa that tell bins apart
    while digits < 7 and row >> (digits + 6):
        digits += 1
    bins, shift = 8 << digits, np.uint32(23 - digits)
    magnitudes, keys, moved = np.empty(row, np.uint32), np.empty(row, np.uint64), np.empty(row, np.uint64)
    digit_counts, ranks = np.empty((3, 2048), np.int32), np.empty(row, np.int64)
    bin_of, members = np.empty(row, np.uint32), np.empty(bins, np.int32)
    surely, perhaps, most = np.empty(bins, np.uint32), np.empty(bins, np.uint32), np.int64(0xFFFFFFFF)
    open_ = np.zeros(-(-row // 8) * 8, np.uint8)
    eights, unsure = open_.view(np.uint64), np.empty(row + 1, np.int32)
    for start in range(0, values.size, row):
        word, kept, own = words[start : start + row], mask[start : start + row], bits[start : start + row]
        largest = np.uint32(0)
        for j in range(row):
            magnitudes[j] = own[j] & np.uint32(0x7FFFFFFF)
            largest = max(largest, own[j] & np.uint32(0x7FFFFFFF))
        # eight octaves down from the largest; the first bin holds all that is smaller
        lowest = np.int32(largest >> shift) - np.int32(bins - 1)
        for j in range(row):
            bin_of[j] = np.uint32(max(np.int32(magnitudes[j] >> shift) - lowest, np.int32(0)))
        members[:] = 0
        for j in range(row):
            members[bin_of[j]] += 1
        below = 0
        for i in range(bins):  # what does not fit 32 bits is left open
            surely[i] = min(max(limit_of(low, span, below), 0), most)
            below += members[i]
            perhaps[i] = min(max(limit_of(low, span, below - 1) - 1, 0), most)
        for j in range(row):
            sure = word[j] < surely[bin_of[j]]
            kept[j] = sure
            open_[j] = (not sure) & (word[j] <= perhaps[bin_of[j]])
        left = 0
        for eight in range(eights.size):
            if eights[eight]:  # few have any
                for j in range(8 * eight, min(8 * eight + 8, row)):
                    unsure[left] = j
                    left += open_[j]
        if left > FEW:  # many zeros, say, where small changes were rounded away: their places alone rank them
            zeros = np.int64(0)
            for j in range(row - 1, -1, -1):
                ranks[j] = zeros
                zeros += magnitudes[j] == 0
            others = 0
            for i in range(left):
                j = unsure[i]
                if magnitudes[j] == 0:
                    kept[j] = np.int64(word[j]) < limit_of(low, span, ranks[j])
                unsure[others] = j
                others += magnitudes[j] != 0
            left = others
        if left > COUNTED:
            sort_row(magnitudes, keys, moved, digit_counts)
            for rank in range(row):
                ranks[np.int64(keys[rank] & np.uint64(0xFFFFFFFF))] = rank
        for i in range(left):
            j = unsure[i]
            rank = ranks[j] if left > COUNTED else rank_in(magnitudes, j)
            kept[j] = np.int64(word[j]) < limit_of(low, span, rank)


@helper
def limit_of(low, span, rank):  # type: ignore[no-untyped-def]
    """The words below this keep an element of that rank: int64."""
    return np.int64(np.ceil((low + span * rank) * 4294967296.0))


@helper
def rank_in(magnitudes, place):  # type: ignore[no-untyped-def]
    """How many of a row rank below the one at `place`."""
    magnitude, rank = magnitudes[place], np.int32(0)
    before, after = magnitudes[:place], magnitudes[place:]
    for j in range(before.size):
        rank += np.int32(before[j] < magnitude)
    for j in range(1, after.size):
        rank += np.int32(after[j] <= magnitude)
    return np.int64(rank)


@helper
def sort_row(magnitudes, keys, moved, counts):  # type: ignore[no-untyped-def]
    """keys = (magnitude, place) in rising order, of equal magnitudes the last place first: a radix sort, 11 bits at a time."""
    row = magnitudes.size
    counts[:] = 0
    for j in range(row):
        magnitude = magnitudes[row - 1 - j]
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
        for j in range(row):
            keys[j] = moved[j]


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
