"""What a method sees of a tensor: blocks that decode their inputs into scratch memory, and a way over all of them.

The one idea: memory is bought once per thread (a fresh allocation costs more than the arithmetic that fills it), so a
block is a view: what it gives is valid until the next block of the same thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint16]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class At:
    """Where a combination happens: one tensor, and the value of every parameter there."""

    tensor: str
    shape: tuple[int, ...]
    seed: int
    shared: Mapping[str, float]
    per_input: tuple[Mapping[str, float], ...]
    has_base: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def row(self) -> int:
        """Elements of a row: the last dimension; the whole of a vector or scalar."""
        return self.shape[-1] if len(self.shape) > 1 else self.size

    def __getitem__(self, name: str) -> float:
        return self.shared[name]

    def each(self, name: str) -> list[float]:
        return [values[name] for values in self.per_input]


class Workspace:
    """A thread's scratch memory for blocks of up to `size` elements of `models` inputs and a base.

    What a block's loops fill lies where the engine works; what is read, written and listed lies in the host's memory.
    """

    def __init__(self, models: int, size: int, engine: Any) -> None:
        self.engine = engine
        self.read = np.empty((models + 1, size * 4), np.uint8)
        self.raw = np.empty(size * 4, np.uint8)
        self.places = np.empty(size, np.int64)
        self.low = np.empty(size + 1, np.uint16)
        self.decoded = engine.empty((models + 1, size), np.float32)
        self.delta = engine.empty(size, np.float32)
        self.single = engine.empty(size, np.float32)
        self.mask = engine.empty((models, size), np.bool_)
        self.words = engine.empty(size, np.uint32)
        self.out = engine.empty(size, np.float64)


@dataclass(frozen=True, slots=True)
class Packed:
    """The raw elements of a block: of the base, where there is one, and of the inputs.

    words: uint16, all of them in one array; places, int64: where each begins; stored, uint8: its kernels.BF16, F16 or F32.
    """

    words: Words
    places: Counts
    stored: npt.NDArray[np.uint8]


@dataclass(slots=True)
class Block:
    """A stretch of one tensor, the same in every model. `refuse(i)` raises: row i of `all` holds a NaN or infinity."""

    start: int
    size: int
    inputs: int
    has_base: bool
    packed: Packed
    workspace: Workspace
    refuse: Callable[[int], NoReturn]
    _loaded: bool = field(default=False, init=False)

    @property
    def engine(self) -> Any:
        """The loops over this block's arrays: see engines.py."""
        return self.workspace.engine

    @property
    def all(self) -> Float32:
        """The base, where there is one, and the inputs: float32 (k + 1, n) or (k, n)."""
        decoded, packed = self._scratch, self.packed
        if not self._loaded:
            for row in range(len(decoded)):
                if not self.engine.decode(packed.words, packed.places[row], packed.stored[row], decoded[row]):
                    self.refuse(row)
            self._loaded = True
        return decoded

    @property
    def rows(self) -> Float32:
        """The inputs: float32 (k, n)."""
        inputs: Float32 = self.all[int(self.has_base) :]
        return inputs

    @property
    def base(self) -> Float32:
        """The base: float32 (n,)."""
        assert self.has_base
        base: Float32 = self.all[0]
        return base

    def delta(self, index: int, out: Float32 | None = None) -> Float32:
        """x_i - b in float32 (n,), or x_i itself where there is no base; overwritten by the next call."""
        if not self.has_base:
            row: Float32 = self.rows[index]
            return row
        out = self.workspace.delta[: self.size] if out is None else out
        packed = self.packed
        self.check(self.engine.task_vector(packed.words, packed.places, packed.stored, index + 1, out))
        return out

    def deltas(self) -> Float32:
        """x_i - b for all inputs, or the x_i where there is no base: float32 (k, n), in the memory of `all`."""
        if not self.has_base:
            return self.rows
        self._loaded = False
        rows: Float32 = self._scratch[1:]
        for index, row in enumerate(rows):
            self.delta(index, row)
        return rows

    def check(self, strange: int) -> None:
        """Refuse the row that a kernel found not to be finite: -1 for none."""
        if strange >= 0:
            self.refuse(strange)

    @property
    def _scratch(self) -> Float32:
        scratch: Float32 = self.workspace.decoded[0 if self.has_base else 1 : self.inputs + 1, : self.size]
        return scratch

    @property
    def mask(self) -> Mask:
        """Scratch for one mask per input: bool (k, n)."""
        mask: Mask = self.workspace.mask[: self.inputs, : self.size]
        return mask

    @property
    def words(self) -> npt.NDArray[np.uint32]:
        """Scratch for random words: uint32 (n,)."""
        words: npt.NDArray[np.uint32] = self.workspace.words[: self.size]
        return words

    @property
    def out(self) -> Float64:
        """Scratch for the result: float64 (n,)."""
        out: Float64 = self.workspace.out[: self.size]
        return out


class Over(Protocol):
    """Visits every block of a tensor, on all threads."""

    def __call__(self, function: Callable[[Block], T], /) -> list[T]:
        """What the function gives for each block, in the order of the blocks."""
        ...

    def count(self, function: Callable[[Block, Counts], None], shape: tuple[int, ...], /) -> Counts:
        """The sum of int64 tables of this shape, one per thread, that the function adds to."""
        ...

    def one(self, at: int, function: Callable[[Block], T], /) -> T:
        """What the function gives for block number `at`."""
        ...

    def masks(self) -> Mask | None:
        """Memory for a mask of each input, bool (k, elements of the tensor), until it is done; None for a large tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` found: the statistic for `combine`, and its part of the method's reported share."""

    statistic: object = None
    part: float = 0
    whole: float = 0
