"""The merge methods: one declarative spec each, and combine functions that read like their formulas.

The one idea: a method first *measures* (one small statistic per tensor, gathered block by block) and then *combines*
each block on its own. So no method needs a whole tensor, and blocks may run in any order on any number of threads.
Numerics: inputs are decoded to float32 exactly, combined in float64 (in float32 `b + (x - b)` is not `x`), and
rounded at the store. Magnitudes are compared in float32, which orders like the exact differences do.
Invariant: a result depends on the inputs, the parameters, the seed and the tensor's name, never on the order of work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Keep = Callable[["Block", Float32], Mask]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method: per input or shared by all, its default (None: must be given) and its range."""

    scope: Literal["input", "shared"]
    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_flag(self) -> bool:
        return isinstance(self.default, bool)


@dataclass(frozen=True, slots=True)
class At:
    """Where a combination happens: one tensor, and the value of every parameter there."""

    tensor: str
    size: int
    seed: int
    shared: Mapping[str, float]
    per_input: tuple[Mapping[str, float], ...]

    def __getitem__(self, name: str) -> float:
        return self.shared[name]

    def each(self, name: str) -> list[float]:
        return [values[name] for values in self.per_input]


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of one tensor, the same in every model; `read(i)` gives input i flat, `read(None)` the base."""

    start: int
    size: int
    read: Callable[[int | None], Float32]

    def wide(self, index: int | None) -> Float64:
        return self.read(index).astype(np.float64)

    def delta(self, index: int) -> Float32:
        """x_i - b, rounded to float32."""
        return np.subtract(self.read(index), self.read(None))


class Over(Protocol):
    """Applies a function to every block of a tensor; results come in the order of the blocks."""

    def __call__(self, function: Callable[[Block], T], /) -> Iterator[T]: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` found: the statistic for `combine`, and its part of the method's reported share."""

    statistic: Any = None
    part: float = 0
    whole: float = 0


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    `base`: "required" (it stands apart: task vectors are taken from it) or "none" (a base is an input like the others).
    `inputs`: fewest and most models besides the base. `share`: the name of the measured share it reports.
    """

    summary: str
    base: Literal["required", "none"]
    inputs: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    combine: Callable[[Block, At, Any], Float64]
    measure: Callable[[Over, At], Measured] | None = None
    share: str | None = None


def linear(block: Block, at: At, _: None) -> Float64:
    """sum w_i x_i, divided by sum w_i when normalize."""
    return _weighted_sum([block.wide(i) for i in range(len(at.per_input))], _weights(at))


def task_arithmetic(block: Block, at: At, _: None) -> Float64:
    """b + lambda sum w_i (x_i - b), as fixed coefficients: one model at weight 1 then is exactly that model."""
    scaled = [at["lambda"] * w for w in _weights(at)]
    inputs = [block.wide(i) for i in (None, *range(len(scaled)))]
    return _weighted_sum(inputs, [1.0 - math.fsum(scaled), *scaled])


def slerp(block: Block, at: At, coefficients: list[float]) -> Float64:
    """A b + B x, with the coefficients that `arc` took from the angle between b and x."""
    return _weighted_sum([block.wide(None), block.wide(0)], coefficients)


def arc(over: Over, at: At) -> Measured:
    """[sin((1-t) theta), sin(t theta)] / sin(theta); [1-t, t] where the two are parallel, |cos| > 0.9995."""

    def dots(block: Block) -> tuple[float, float, float]:
        b, x = block.wide(None), block.wide(0)
        return float((b * b).sum()), float((x * x).sum()), float((b * x).sum())

    bb, xx, bx = (math.fsum(column) for column in zip(*over(dots), strict=True))
    norm_b, norm_x = (norm if (norm := math.sqrt(square)) > 1e-8 else 1.0 for square in (bb, xx))
    cosine = min(1.0, max(-1.0, bx / (norm_b * norm_x)))
    t = at["t"]
    if abs(cosine) > 0.9995:
        return Measured([1.0 - t, t], part=1, whole=1)
    theta = math.acos(cosine)
    return Measured([math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)], whole=1)


def ties(block: Block, at: At, kept: list[tuple[Keep, float]]) -> Float64:
    """b + lambda mix: each sparse task vector weighed, the sign elected per element, those that agree averaged."""
    base, weights = block.wide(None), at.each("weight")
    D = []
    for i, (w, (keep, scale)) in enumerate(zip(weights, kept, strict=True)):
        d = block.wide(i) - base
        D.append(w * scale * d * keep(block, d.astype(np.float32)))
    positive = reduce(np.add, D) >= 0
    # zeros never agree, so neither a dropped element nor a weight of 0 takes part in the average
    agree = [((d > 0) == positive) & (d != 0) for d in D]
    mix: Float64 = reduce(np.add, (d * a for d, a in zip(D, agree, strict=True)))
    if at["normalize"]:
        agreed = reduce(np.add, (w * a for w, a in zip(weights, agree, strict=True)))
        # weights of both signs can cancel: such an element keeps its plain sum, as in mergekit
        agreed[np.abs(agreed) < 1e-8] = 1.0
        mix /= agreed
    mix *= at["lambda"]
    return base + mix


def trim(over: Over, at: At) -> Measured:
    """Keep the k = max(1, int(density n)) largest |d_i| of each task vector, of equal ones the lowest index first."""
    counts = [max(1, int(density * at.size)) for density in at.each("density")]
    keeps = [_largest(over, i, k) if k < at.size else _everything for i, k in enumerate(counts)]
    if at["rescale"]:
        return _measured(over, at, keeps)
    return Measured([(keep, 1.0) for keep in keeps], part=sum(counts), whole=len(counts) * at.size)


def drop_at_random(over: Over, at: At) -> Measured:
    """Keep each element of each task vector with probability density (DARE)."""
    return _measured(over, at, [_bernoulli(at, i, density) for i, density in enumerate(at.each("density"))])


def random_words(seed: int, tensor: str, index: int, start: int, size: int) -> npt.NDArray[np.uint32]:
    """Words start .. start+size of the random stream that belongs to (seed, tensor, input): counter-based, Philox.

    `start` is a multiple of 8 (one count of the generator gives eight words), so any block can be drawn alone.
    """
    counter, odd = divmod(start, 8)
    assert odd == 0, f"a block starts at {start}, not at a multiple of 8"
    key = hashlib.sha256(json.dumps([seed, tensor, index]).encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
    raw = generator.random_raw(-(-size // 8) * 4)
    return raw.astype("<u8", copy=False).view("<u4")[:size]


def _weights(at: At) -> list[float]:
    """The weights, divided by their sum when normalize; all zero stay zero (the base is left as it is)."""
    weights = at.each("weight")
    total = math.fsum(weights) if at["normalize"] else 1.0
    return [w / total for w in weights] if any(weights) else weights


def _weighted_sum(inputs: list[Float64], coefficients: list[float]) -> Float64:
    """Sum of c x; a coefficient of 0 adds nothing, not even the sign of its zero, so 1 x + 0 y is x bit for bit."""
    terms = [c * x for x, c in zip(inputs, coefficients, strict=True) if c != 0]
    return reduce(np.add, terms) if terms else np.zeros_like(inputs[0])


def _everything(_: Block, delta: Float32) -> Mask:
    return np.ones(delta.shape, np.bool_)


def _bernoulli(at: At, index: int, density: float) -> Keep:
    limit = round(density * 2**32)
    return lambda block, _: random_words(at.seed, at.tensor, index, block.start, block.size) < limit


def _largest(over: Over, index: int, k: int) -> Keep:
    """The mask of the k largest |d|, exactly, by two histograms of the float32 bit patterns (they order alike)."""

    def bits(block: Block) -> npt.NDArray[np.int32]:
        return np.abs(block.delta(index)).view(np.int32)

    def low_bits(block: Block) -> npt.NDArray[np.int32]:
        magnitude = bits(block)
        low: npt.NDArray[np.int32] = magnitude[magnitude >> 16 == high] & 0xFFFF
        return low

    highs = reduce(np.add, over(lambda block: np.bincount(bits(block) >> 16, minlength=1 << 15)))
    high, left = _bin_of_kth_largest(highs, k)
    lows = reduce(np.add, over(lambda block: np.bincount(low_bits(block), minlength=1 << 16)))
    low, left = _bin_of_kth_largest(lows, left)
    threshold = np.int32(high << 16 | low)
    end = 0  # elements equal to the threshold are kept before this flat index
    for places in over(lambda block: block.start + np.flatnonzero(bits(block) == threshold)):
        if left <= len(places):
            end = int(places[left - 1]) + 1
            break
        left -= len(places)

    def keep(block: Block, delta: Float32) -> Mask:
        magnitude, limit = np.abs(delta), threshold.view(np.float32)
        mask = magnitude >= limit
        after = min(max(end - block.start, 0), block.size)
        np.greater(magnitude[after:], limit, out=mask[after:])
        return mask

    return keep


def _bin_of_kth_largest(histogram: npt.NDArray[np.intp], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest element, and how many must still be taken from that bin."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def _measured(over: Over, at: At, keeps: list[Keep]) -> Measured:
    """Each mask with the factor sum|d| / sum|kept d| (1 without rescale), and the share that was kept."""

    def sums(block: Block) -> list[tuple[float, float, int]]:
        rows = []
        for i, keep in enumerate(keeps):
            delta = block.delta(i)
            mask = keep(block, delta)
            size = np.abs(delta).astype(np.float64)
            rows.append((float(size.sum()), float((size * mask).sum()), int(np.count_nonzero(mask))))
        return rows

    statistic, part = [], 0.0
    for keep, rows in zip(keeps, zip(*over(sums), strict=True), strict=True):
        total, kept, count = (math.fsum(column) for column in zip(*rows, strict=True))
        statistic.append((keep, total / kept if at["rescale"] and kept else 1.0))
        part += count
    return Measured(statistic, part=part, whole=len(keeps) * at.size)


_WEIGHT = Parameter("input")
_DENSITY = Parameter("input", default=1.0, low=0.0, high=1.0)
_LAMBDA = Parameter("shared", default=1.0)


def _flag(default: bool) -> Parameter:
    return Parameter("shared", default=default)


METHODS: dict[str, Method] = {
    "linear": Method(
        "weighted average of the models",
        base="none",
        inputs=(1, None),
        parameters={"weight": _WEIGHT, "normalize": _flag(True)},
        combine=linear,
    ),
    "slerp": Method(
        "point on the arc between the base and one other model",
        base="required",
        inputs=(1, 1),
        parameters={"t": Parameter("shared", low=0.0, high=1.0)},
        combine=slerp,
        measure=arc,
        share="parallel_share",
    ),
    "task_arithmetic": Method(
        "the base plus the weighted task vectors",
        base="required",
        inputs=(1, None),
        parameters={"weight": _WEIGHT, "normalize": _flag(False), "lambda": _LAMBDA},
        combine=task_arithmetic,
    ),
    "ties": Method(
        "the base plus trimmed task vectors that agree on a sign (https://arxiv.org/abs/2306.01708)",
        base="required",
        inputs=(1, None),
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "normalize": _flag(True),
            "rescale": _flag(False),
            "lambda": _LAMBDA,
        },
        combine=ties,
        measure=trim,
        share="kept_share",
    ),
    "dare_ties": Method(
        "the base plus randomly thinned task vectors that agree on a sign (https://arxiv.org/abs/2311.03099)",
        base="required",
        inputs=(1, None),
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "normalize": _flag(False),
            "rescale": _flag(True),
            "lambda": _LAMBDA,
        },
        combine=ties,
        measure=drop_at_random,
        share="kept_share",
    ),
}
