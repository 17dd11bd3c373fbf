"""One output tensor at work: its inputs read and decoded in blocks on all threads, measured, combined and written.

The one idea: two passes over blocks. Where the raw inputs of a tensor fit the buffer they are read once, in the first
pass, and later passes find them in memory; larger tensors are read again. Memory is the buffer and a few blocks a thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge.block import At, Block, Counts, Mask, Measured, Packed, T, Workspace
from mixmerge.merge.checkpoint import ITEM_BYTES
from mixmerge.merge.engines import CPU
from mixmerge.merge.methods import Method
from mixmerge.merge.sources import STORED, Raw, Source, refuse

BLOCK = 1 << 18  # elements: large enough that calls cost little, small enough for a core's cache
BUFFER = 256 << 20  # bytes of raw inputs that are kept between the passes over a tensor
MASKS = 64 << 20  # bytes of masks that are kept from measuring to combining

Write = Callable[[int, Raw], None]


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor that is merged. `sources` are its inputs in the order of the configuration; `dtype` is the stored one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: Method
    at: At
    sources: tuple[Source, ...]
    base: Source | None

    @property
    def size(self) -> int:
        return self.at.size

    @property
    def read(self) -> tuple[Source, ...]:
        """All that is read: the base first."""
        return self.sources if self.base is None else (self.base, *self.sources)


class _Memory:
    """Elements that grow to what is wanted and are used again: fresh ones cost more than what is done with them."""

    def __init__(self, limit: int, dtype: Any, empty: Callable[[int, Any], Any]) -> None:
        self._limit, self._dtype, self._empty, self._held = limit, dtype, empty, empty(0, dtype)

    def of(self, wanted: int) -> Any:
        if wanted > self._limit:
            return None
        if wanted > len(self._held):
            self._held = self._empty(0, self._dtype)  # the old ones go before the new ones come
            self._held = self._empty(wanted, self._dtype)
        return self._held


class Crew:
    """Threads with their scratch memory, shared by all tensors of a merge. Use as a context manager."""

    def __init__(self, threads: int, models: int, row: int, *, buffer: int = BUFFER, engine: Any = CPU) -> None:
        self.threads, self.bytes_read, self.engine = threads, 0, engine
        self._models, self._size = models, max(BLOCK, row)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._kept, self._masks = _Memory(buffer, np.uint8, np.empty), _Memory(MASKS, np.bool_, engine.empty)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, count: int, function: Callable[[int, Workspace], T]) -> list[T]:
        """function(0) .. function(count - 1) on all threads; the results in order, the first error raised."""
        if count == 1:
            return [function(0, self._workspace())]
        found: dict[int, T] = {}
        numbers = itertools.count()
        broken = threading.Event()

        def drain() -> None:
            workspace = self._workspace()
            try:
                while not broken.is_set() and (at := next(numbers)) < count:
                    found[at] = function(at, workspace)
            except BaseException:
                broken.set()
                raise

        under_way = [self._pool.submit(drain) for _ in range(min(self.threads, count))]
        try:
            for future in under_way:
                future.result()
        except BaseException:
            broken.set()
            raise
        return [found[at] for at in range(count)]

    def buffer(self, wanted: int) -> Raw | None:
        """Memory for the raw inputs of one tensor, the same for all; None where they do not fit."""
        found: Raw | None = self._kept.of(wanted)
        return found

    def masks(self, wanted: int) -> Mask | None:
        """Memory for the masks of one tensor, where its blocks are worked on, likewise."""
        found: Mask | None = self._masks.of(wanted)
        return found

    def count_read(self, count: int) -> None:
        with self._lock:
            self.bytes_read += count

    def _workspace(self) -> Workspace:
        found: Workspace | None = getattr(self._local, "workspace", None)
        if found is None:
            found = self._local.workspace = Workspace(self._models, self._size, self.engine)
        return found


class Visits:
    """All blocks of one target, visited as often as its method asks (`Over`)."""

    def __init__(self, target: Target, crew: Crew) -> None:
        self.target, self.crew = target, crew
        row = target.at.row if target.method.rows else 1
        self.step = max(1, BLOCK // row) * row
        self.blocks = -(-target.size // self.step)
        self._stored = np.array([STORED[source.dtype] for source in target.read], np.uint8)
        self._items = np.array([ITEM_BYTES[source.dtype] for source in target.read])
        ends = np.cumsum(-(-target.size * self._items // 64) * 64)
        self._offsets = np.concatenate([[0], ends[:-1]])
        self._kept = crew.buffer(int(ends[-1])) if target.method.measure is not None else None
        self._filled = np.zeros(self.blocks, np.bool_)

    def __call__(self, function: Callable[[Block], T], /) -> list[T]:
        return self.crew.each(self.blocks, lambda at, workspace: self._visit(at, workspace, function))

    def count(self, function: Callable[[Block, Counts], None], shape: tuple[int, ...], /) -> Counts:
        tables: dict[int, Counts] = {}

        def add(block: Block) -> None:
            table = tables.get(threading.get_ident())
            if table is None:
                table = tables[threading.get_ident()] = np.zeros(shape, np.int64)
            function(block, table)

        self(add)
        total: Counts = np.sum(list(tables.values()), axis=0)
        return total

    def one(self, at: int, function: Callable[[Block], T], /) -> T:
        return self.crew.each(1, lambda _, workspace: self._visit(at, workspace, function))[0]

    def masks(self) -> Mask | None:
        shape = len(self.target.sources), self.target.size
        memory = self.crew.masks(shape[0] * shape[1])
        return None if memory is None else memory[: shape[0] * shape[1]].reshape(shape)

    def _visit(self, at: int, workspace: Workspace, function: Callable[[Block], T]) -> T:
        start = at * self.step
        size = min(self.step, self.target.size - start)
        packed = self._kept_block(at, start, size) if self._kept is not None else self._read(start, size, workspace)
        inputs, has_base = len(self.target.sources), self.target.base is not None
        block = Block(start, size, inputs, has_base, packed, workspace, self._refuse)
        # what overflows is infinite where it is stored, and refused there
        with np.errstate(over="ignore"):
            return function(block)

    def _kept_block(self, at: int, start: int, size: int) -> Packed:
        """The block in the buffer, where it is read to on the first visit."""
        assert self._kept is not None
        places = self._offsets + start * self._items
        if not self._filled[at]:
            for source, place, item in zip(self.target.read, places, self._items, strict=True):
                self.crew.count_read(source.read(start, self._kept[place : place + size * item]))
            self._filled[at] = True
        return self._packed(self._kept, places, size)

    def _read(self, start: int, size: int, workspace: Workspace) -> Packed:
        for source, item, into in zip(self.target.read, self._items, workspace.read, strict=False):
            self.crew.count_read(source.read(start, into[: size * item]))
        places = np.arange(len(self._items)) * workspace.read.shape[1]
        return self._packed(workspace.read.reshape(-1), places, size)

    def _packed(self, raw: Raw, places: Counts, size: int) -> Packed:
        words, begins = self.crew.engine.raw(raw.view(np.uint16), places // 2, self._stored, size)
        return Packed(words, begins, self._stored)

    def _refuse(self, row: int) -> NoReturn:
        refuse(self.target.read[row])


def merge_tensor(target: Target, crew: Crew, write: Write) -> Measured:
    """Measure, then combine: `write` gets the flat index and raw bytes of each stretch, in any order, from any thread.

    Raises:
        ModelError: NaN or infinity in an input, or a result that does not fit the stored dtype.
    """
    visits, at, method = Visits(target, crew), target.at, target.method
    measured = method.measure(visits, at) if method.measure is not None else Measured()
    item = ITEM_BYTES[target.dtype]

    def combine(block: Block) -> None:
        values = method.combine(block, at, measured.statistic)
        workspace = block.workspace
        raw = workspace.raw[: block.size * item]
        if not workspace.engine.encode(values, target.dtype, workspace.single[: block.size], raw):
            do = "store a wider dtype (out_dtype: bfloat16 or float32), or use smaller weights"
            raise ModelError(f"the merged tensor '{target.name}' does not fit {target.dtype}", do=do)
        write(block.start, raw)

    visits(combine)
    return measured
