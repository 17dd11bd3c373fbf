"""Methods that thin the task vectors, let the inputs agree on signs, and add what is left to the base.

The one idea: thinning is a mask per input that any block can make alone: a window of magnitudes whose ends are found
from histograms (exact: float magnitudes order like their bit patterns), or random words of a counter-based stream keyed by
(seed, tensor, input). Of equal magnitudes the lowest flat index counts as the largest, so the same elements are kept anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixmerge.merge import selection
from mixmerge.merge.block import At, Block, Counts, Float32, Float64, Mask, Measured, Over

Low = npt.NDArray[np.uint16]
INFINITE = 0x7F800000
CROWDED = 1 << 22  # elements of a bin that are not listed any more

# The task vectors, or other vectors, of a block one after the other.
Vectors = Callable[[Block], Iterator[Float32]]
# Writes into `mask` which of `values` (a task vector in this block) are kept.
Keep = Callable[[Block, Float32, Mask], None]


class Rank(NamedTuple):
    """The k-th largest magnitude: its bits, and the flat index before which equal ones are among the k largest."""

    bits: int
    end: int


NONE, ALL = Rank(INFINITE, 0), Rank(0, 1 << 62)


@dataclass(frozen=True, slots=True)
class Thinned:
    """Each input's mask, and the factor that gives back the length it lost; `masks` are kept for a tensor that is not large.

    windows: int64 (k, 4), one for each input, where a mask is but a window of magnitudes (kernels.keep_window), and `keeps`
    is empty; else (0, 4).
    """

    keeps: tuple[Keep, ...]
    scales: Float64
    masks: Mask | None = None
    windows: Counts = field(default_factory=lambda: np.empty((0, 4), np.int64))


def combine(elect: bool) -> Callable[[Block, At, object], Float64]:
    """b + lambda mix of the thinned, weighed task vectors; with `elect`, of those that agree with the elected sign."""

    def agreed(block: Block, at: At, thinned: object) -> Float64:
        assert isinstance(thinned, Thinned)
        mask, weights, windows = block.mask, np.array(at.each("weight")), thinned.windows
        if thinned.masks is not None:
            mask = thinned.masks[:, block.start : block.start + block.size]
        elif not len(windows):
            for i, keep in enumerate(thinned.keeps):
                keep(block, block.delta(i), mask[i])
        flags = elect, bool(at["normalize"]), at["lambda"]
        raw, start = block.packed, block.start
        strange = block.engine.consensus(
            raw.words, raw.places, raw.stored, start, mask, windows, weights, thinned.scales, *flags, block.out
        )
        block.check(strange)
        return block.out

    return agreed


def trim(over: Over, at: At) -> Measured:
    """Keep the k = max(1, int(density n)) largest |d_i| of each task vector (TIES); none at density 0."""
    counts = [max(1, int(density * at.size)) if density else 0 for density in at.each("density")]
    return _windows(over, at, [(k, 0) for k in counts])


def trim_both_ends(over: Over, at: At) -> Measured:
    """Keep k = int(density n) of each task vector, above the smallest and below the int(gamma n) largest (breadcrumbs)."""
    windows = []
    for density, gamma in zip(at.each("density"), at.each("gamma"), strict=True):
        k, top = int(density * at.size), int(gamma * at.size)
        bottom = max(0, at.size - k - top)  # dense enough, the window reaches over the top instead
        windows.append((at.size - bottom, at.size - bottom - min(k, at.size - bottom)))
    return _windows(over, at, windows)


def drop_at_random(over: Over, at: At) -> Measured:
    """Keep each element of each task vector with probability density (DARE)."""
    return _thinned(over, at, [_bernoulli(at, i, density) for i, density in enumerate(at.each("density"))])


def drop_by_rank(over: Over, at: At) -> Measured:
    """Keep an element with probability density - epsilon + 2 epsilon r / (n - 1), r its magnitude's rank in its row (DELLA).

    At density 1 everything is kept, and at 0 nothing, whatever epsilon is.
    """
    pairs = [(d, e if 0.0 < d < 1.0 else 0.0) for d, e in zip(at.each("density"), at.each("epsilon"), strict=True)]
    return _thinned(over, at, [_bernoulli_by_rank(at, i, *pair) for i, pair in enumerate(pairs)])


def stream_key(seed: int, tensor: str, index: int) -> tuple[int, int]:
    """The key of the random stream that belongs to (seed, tensor, input), its low and its high 32 bits.

    The stream is counter-based, Philox4x32-10, so any block can be drawn alone; the key is the first 8 bytes of the sha256
    of that triple as JSON, little-endian.
    """
    key = int.from_bytes(hashlib.sha256(json.dumps([seed, tensor, index]).encode()).digest()[:8], "little")
    return key & 0xFFFFFFFF, key >> 32


def select(over: Over, at: At) -> Measured:
    """Keep the share select_topk of the positions where the task vectors vary most; weigh each by its mean square (SCE).

    Of the positions that vary at all. https://arxiv.org/abs/2408.07990, section 3.2.
    """

    def spread(block: Block) -> Float32:
        variance: Float32 = block.workspace.delta[: block.size]
        block.engine.spread(block.deltas(), variance)
        return variance

    share, cut = at["select_topk"], ALL
    if share < 1.0:
        varying = sum(over(lambda block: block.engine.count(spread(block))))
        kept = int(share * varying)
        cut = _kth_largest(over, lambda block: iter([spread(block)]), [(0, kept)])[0] if kept else NONE

    def chosen(block: Block) -> Mask:
        mask: Mask = block.mask[0]
        block.engine.keep_window(spread(block), block.start, np.array([*cut, *NONE]), mask)
        return mask

    def squares(block: Block) -> tuple[Float64, int]:
        mask, sums = chosen(block), np.empty(block.inputs)
        block.engine.masked_squares(block.deltas(), mask, sums)
        return sums, block.engine.count(mask)

    sums, counts = zip(*over(squares), strict=True)
    totals = [math.fsum(column) for column in zip(*sums, strict=True)]
    whole = math.fsum(totals)
    weights = np.array([total / whole if whole else 0.0 for total in totals])
    return Measured((chosen, weights), part=sum(counts), whole=at.size)


def select_combine(block: Block, at: At, statistic: object) -> Float64:
    """b + sum w_i d_i e_i / sum w_i e_i over the chosen positions, e_i: agrees with the sign of sum d_i."""
    chosen, weights = statistic  # type: ignore[misc]
    mask = chosen(block)  # type: ignore[has-type]
    block.engine.agreeing(block.rows, block.base, mask, weights, block.out)  # type: ignore[has-type]
    return block.out


def fuse(over: Over, at: At) -> Measured:
    """Which elements matter: |d| KL(softmax(x) || softmax(b)), the divergence being that of its row, beyond the outliers' fence.

    The fence is median + 1.5 (Q3 - Q1) of these importances (a quantile is the element at floor(q (n - 1)) in rising order).
    """
    divergence = np.concatenate(over(lambda block: _divergence(block, at)))

    def importance(block: Block) -> Float32:
        of_row = divergence[block.start // at.row :][: block.size // at.row]
        found: Float32 = block.workspace.single[: block.size]
        block.engine.times_rows(block.delta(0), at.row, of_row, found)
        return found

    places = [at.size - int(q * (at.size - 1)) for q in (0.25, 0.5, 0.75)]
    ranks = _kth_largest(over, lambda block: iter([importance(block)]), [(0, place) for place in places])
    low, median, high = np.array([rank.bits for rank in ranks], np.uint32).view(np.float32).astype(np.float64)
    # in bfloat16 vectors many elements lie exactly on the fence: rounding must not drop some of them
    fence = (median + 1.5 * (high - low)) * (1.0 - 1e-6)

    def fused(block: Block) -> int:
        values = importance(block)
        return int(block.engine.take_beyond(values, fence, block.rows[0], block.base, block.out))

    return Measured(fused, part=sum(over(fused)), whole=at.size)


def fuse_combine(block: Block, _: At, fused: object) -> Float64:
    """x where it matters, else b."""
    assert callable(fused)
    fused(block)
    return block.out


def _divergence(block: Block, at: At) -> Float64:
    """KL(softmax(x) || softmax(b)) of each row, as log E[exp(-(d - E[d]))] under softmax(x): exact for tiny changes too."""
    b, x = block.engine.host(block.all).reshape(2, -1, at.row)
    some = max(1, (1 << 14) // at.row)  # rows at once: their intermediate values stay in the cache
    parts = [
        _kl(b[r : r + some].astype(np.float64), x[r : r + some].astype(np.float64)) for r in range(0, len(b), some)
    ]
    found: Float64 = np.concatenate(parts)
    return found


def _kl(b: Float64, x: Float64) -> Float64:
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    d = x - b
    d -= (p * d).sum(axis=1, keepdims=True)
    found: Float64 = np.log1p((p * (np.expm1(-d) + d)).sum(axis=1))
    return found


def _windows(over: Over, at: At, windows: list[tuple[int, int]]) -> Measured:
    """Keep from each task vector its `most` largest magnitudes without its `least` largest."""
    inputs = range(len(windows))
    asked = sorted({(i, k) for i, window in enumerate(windows) for k in window if 0 < k < at.size})
    found: dict[tuple[int, int], Rank] = {}
    if asked:  # all inputs share the passes over the tensor
        ranks = _kth_largest(over, lambda block: (block.delta(i) for i in range(1 + asked[-1][0])), asked)
        found = dict(zip(asked, ranks, strict=True))

    def rank(i: int, k: int) -> Rank:
        return NONE if k <= 0 else ALL if k >= at.size else found[i, k]

    found_windows = np.array([[*rank(i, windows[i][0]), *rank(i, windows[i][1])] for i in inputs])
    if at["rescale"]:
        return _thinned(over, at, [_window(window) for window in found_windows])
    part = sum(most - least for most, least in windows)
    return Measured(Thinned((), np.ones(len(windows)), windows=found_windows), part=part, whole=len(windows) * at.size)


def _window(window: Counts) -> Keep:
    def keep(block: Block, values: Float32, mask: Mask) -> None:
        block.engine.keep_window(values, block.start, window, mask)

    return keep


def _bernoulli(at: At, index: int, density: float) -> Keep:
    drawn, key = round(density * 2**32), stream_key(at.seed, at.tensor, index)
    # 32 bits are compared four times as fast, and do not hold density 1
    limit: np.unsignedinteger[Any] = np.uint32(drawn) if drawn < 2**32 else np.uint64(drawn)

    def keep(block: Block, _: Float32, mask: Mask) -> None:
        words = block.words
        block.engine.philox(*key, block.start, words)
        block.engine.below(words, limit, mask)

    return keep


def _bernoulli_by_rank(at: At, index: int, density: float, epsilon: float) -> Keep:
    low, span = density - epsilon, 2.0 * epsilon / max(1, at.row - 1)
    key = stream_key(at.seed, at.tensor, index)

    def keep(block: Block, values: Float32, mask: Mask) -> None:
        words = block.words
        block.engine.philox(*key, block.start, words)
        block.engine.keep_by_rank(values, at.row, low, span, words, mask)

    return keep


def _kth_largest(over: Over, vectors: Vectors, asked: list[tuple[int, int]]) -> list[Rank]:
    """For each (vector, k) its k-th largest magnitude, exactly; the vectors in rising order.

    A histogram of the high bits tells in which bin it lies, and the low bits of that bin's elements which one it is.
    """

    def count_high(block: Block, table: Counts) -> None:
        for vector, histogram in zip(vectors(block), table, strict=True):
            block.engine.count_high(vector, histogram)

    count = 1 + max(vector for vector, _ in asked)
    tables = over.count(count_high, (count, selection.HIGH_BINS))
    highs = [_bin_of_kth_largest(tables[vector], k) for vector, k in asked]

    # where very many share a bin (a task vector of zeros, say) they are counted, and not listed
    crowded = [i for i, (vector, _) in enumerate(asked) if tables[vector, highs[i][0]] > CROWDED]
    listed = [i for i in range(len(asked)) if i not in crowded]

    def each(block: Block, wanted: list[int]) -> Iterator[tuple[int, Float32]]:
        for number, vector in enumerate(vectors(block)):
            yield from ((i, vector) for i in wanted if asked[i][0] == number)

    def gather(block: Block) -> list[Low]:
        scratch, found = block.workspace.low, []
        for i, vector in each(block, listed):
            found.append(scratch[: block.engine.gather_low(vector, highs[i][0], scratch)].copy())
        return found

    def count_low(block: Block, table: Counts) -> None:
        for i, vector in each(block, crowded):
            block.engine.count_low(vector, highs[i][0], table[crowded.index(i)])

    gathered = over(gather) if listed else []
    counted = over.count(count_low, (len(crowded), selection.LOW_BINS)) if crowded else tables[:0]
    ranks = []
    for i, (high, left) in enumerate(highs):
        if i in crowded:
            low, left = _bin_of_kth_largest(counted[crowded.index(i)], left)
        else:
            blocks = [found[listed.index(i)] for found in gathered]
            low, left = _bin_of_kth_largest(np.bincount(np.concatenate(blocks), minlength=selection.LOW_BINS), left)
        bits = high << 16 | low

        def places(block: Block, i: int = i, bits: int = bits) -> int:
            vector = next(islice(vectors(block), asked[i][0], None))
            return int(block.engine.places_of(vector, bits, block.workspace.places))

        # of the magnitudes equal to this one, the first `left` in the order of their places
        equal = over(places) if i in crowded else [np.count_nonzero(found == low) for found in blocks]
        before = np.cumsum(equal)
        if left == before[-1]:
            ranks.append(Rank(bits, ALL.end))
            continue
        at = int(np.searchsorted(before, left))
        within = left - (int(before[at - 1]) if at else 0)

        def place(block: Block, places: Callable[[Block], int] = places, within: int = within) -> int:
            places(block)
            return block.start + int(block.workspace.places[within - 1])

        ranks.append(Rank(bits, over.one(at, place) + 1))
    return ranks


def _bin_of_kth_largest(histogram: Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest element, and how many must still be taken from that bin."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def _thinned(over: Over, at: At, keeps: list[Keep]) -> Measured:
    """The masks with the factors sum|d| / sum|kept d| (1 without rescale), and the share that was kept."""

    kept = over.masks()

    def sums(block: Block) -> Float64:
        out = np.zeros((len(keeps), 3))
        for i, keep in enumerate(keeps):
            mask: Mask = block.mask[i] if kept is None else kept[i, block.start : block.start + block.size]
            values = block.delta(i)
            keep(block, values, mask)
            block.engine.masked_sums(values, mask, out[i])
        return out

    parts = np.array(over(sums))
    total, thinned, count = ([math.fsum(parts[:, i, column]) for i in range(len(keeps))] for column in range(3))
    rescale = bool(at["rescale"])
    scales = [whole / part if rescale and part else 1.0 for whole, part in zip(total, thinned, strict=True)]
    found = Thinned(tuple(keeps), np.array(scales), kept)
    return Measured(found, part=math.fsum(count), whole=len(keeps) * at.size)
