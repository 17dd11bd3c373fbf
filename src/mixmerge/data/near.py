"""Near duplicates between two lists of texts: MinHash proposes pairs, the true Jaccard similarity decides.

A text is the set of its shingles, all stretches of 5 characters (any script; a shorter text is one shingle). Its signature
is the minimum of 64 hashes over them (Broder 1997); two signatures agree in a place with probability J, so texts that agree
in a whole band of places are compared (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4). Every hash comes
from sha256, so the same texts give the same pairs on any machine; no pair below the threshold is ever returned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SHINGLE = 5  # characters
PLACES = 64  # hashes of a signature
MISSED = 1e-3  # the most probable loss of a pair that is exactly at the threshold
CHUNK = 1 << 16  # characters hashed at once, and signatures compared at once: what a core's cache holds

Words = npt.NDArray[np.uint32]


def near_duplicates(left: Sequence[str], right: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """(index in `left`, index in `right`, Jaccard similarity) of the pairs at or above `threshold` (0..1), in order.

    A pair at the threshold is missed with a probability of at most 0.001, a more similar one with less.
    """
    if not left or not right:
        return []
    return similar(left, signatures(left), right, signatures(right), threshold)


def similar(
    left: Sequence[str], left_signed: Words, right: Sequence[str], right_signed: Words, threshold: float
) -> list[tuple[int, int, float]]:
    """`near_duplicates` of texts whose signatures are known."""
    known: dict[str, frozenset[str]] = {}

    def set_of(text: str) -> frozenset[str]:
        if text not in known:
            known[text] = shingles(text)
        return known[text]

    found = []
    for i, j in _proposed(left_signed, right_signed, threshold):
        likeness = jaccard(set_of(left[i]), set_of(right[j]))
        if likeness >= threshold:
            found.append((i, j, likeness))
    return found


def shingles(text: str) -> frozenset[str]:
    """The stretches of 5 characters of a text, or the text itself if it is shorter."""
    return frozenset(text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """What two sets share of all that they hold, 0..1.

    >>> jaccard(shingles("abcdef"), shingles("abcdefg"))
    0.6666666666666666
    """
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def signatures(texts: Sequence[str]) -> Words:
    """MinHash signatures, (len(texts), 64)."""
    out = np.empty((len(texts), PLACES), np.uint32)
    for begin, end in _chunks(texts):
        hashes, starts = _hashed([text.ljust(SHINGLE, "\0") for text in texts[begin:end]])
        for place in range(PLACES):
            # An odd factor permutes the 32-bit numbers, so each place orders the shingles in its own way.
            out[begin:end, place] = np.minimum.reduceat(hashes * _FACTORS[place] + _TERMS[place], starts)
    return out


def bands_of(threshold: float) -> tuple[int, int]:
    """(bands, places in each): the longest bands that lose a pair at the threshold with a probability below 0.001."""
    for places in range(PLACES, 1, -1):
        bands = PLACES // places
        if (1 - threshold**places) ** bands <= MISSED:
            return bands, places
    return PLACES, 1


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    begin, size = 0, 0
    for end, text in enumerate(texts):
        if size and size + len(text) > CHUNK:
            yield begin, end
            begin, size = end, 0
        size += max(len(text), SHINGLE)
    if begin < len(texts):
        yield begin, len(texts)


def _hashed(texts: Sequence[str]) -> tuple[Words, npt.NDArray[np.intp]]:
    """A 32-bit hash of every shingle of some texts, text after text, and where each text's begin."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    count = len(codes) - SHINGLE + 1
    mixed = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        mixed += codes[offset : offset + count] * _WEIGHTS[offset]
    ends = np.repeat(np.cumsum(lengths), lengths)[:count]
    mixed = mixed[np.arange(count) + SHINGLE <= ends]  # no shingle reaches into the next text
    mixed ^= mixed >> np.uint64(30)  # the finaliser of splitmix64
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    starts = np.cumsum(lengths - SHINGLE + 1) - (lengths - SHINGLE + 1)
    return (mixed >> np.uint64(32)).astype(np.uint32), starts


def _proposed(left: Words, right: Words, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs that agree in a band, and in about as many places as texts at the threshold do; in order."""
    bands, places = bands_of(threshold)
    # Four standard deviations below what the threshold lets expect.
    least = threshold - 4 * (threshold * (1 - threshold) / PLACES) ** 0.5
    keys = [_band_keys(right, band, places) for band in range(bands)]
    orders = [np.argsort(key, kind="stable") for key in keys]
    block = 1024
    for begin in range(0, len(left), block):
        rows = left[begin : begin + block]
        pairs = [_equal(_band_keys(rows, band, places), keys[band], orders[band]) for band in range(bands)]
        unique = np.unique(np.concatenate(pairs))
        for at in range(0, len(unique), CHUNK):
            i, j = np.divmod(unique[at : at + CHUNK], len(right))
            alike = (rows[i] == right[j]).mean(axis=1) >= least
            yield from zip((i[alike] + begin).tolist(), j[alike].tolist(), strict=True)


def _band_keys(signed: Words, band: int, places: int) -> npt.NDArray[np.uint64]:
    key = np.zeros(len(signed), np.uint64)
    for place in range(band * places, (band + 1) * places):
        key = (key ^ signed[:, place]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _equal(left: npt.NDArray[np.uint64], right: npt.NDArray[np.uint64], order: npt.NDArray[np.intp]) -> Any:
    """i * len(right) + j of all pairs with equal keys; `order` sorts `right`."""
    ordered = right[order]
    first = np.searchsorted(ordered, left, "left")
    counts = np.searchsorted(ordered, left, "right") - first
    i = np.repeat(np.arange(len(left)), counts)
    within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i * len(right) + order[np.repeat(first, counts) + within]


def _numbers(purpose: str, count: int, bits: int) -> list[int]:
    digests = (hashlib.sha256(f"mixmerge near duplicates: {purpose} {k}".encode()).digest() for k in range(count))
    return [int.from_bytes(digest[: bits // 8]) for digest in digests]


_WEIGHTS = np.array(_numbers("weight", SHINGLE, 64), np.uint64) | np.uint64(1)
_FACTORS = np.array(_numbers("factor", PLACES, 32), np.uint32) | np.uint32(1)
_TERMS = np.array(_numbers("term", PLACES, 32), np.uint32)
