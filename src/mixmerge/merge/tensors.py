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

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge.block import At, Block, Counts, Float32, Measured, T, Workspace
from mixmerge.merge.checkpoint import ITEM_BYTES
from mixmerge.merge.methods import Method
from mixmerge.merge.sources import Raw, Source, decode, encode

BLOCK = 1 << 16  # elements: what a few inputs take as float32 fits a core's cache
BUFFER = 256 << 20  # bytes of raw inputs that are kept between the passes over a tensor

Write = Callable[[int, Raw], None]


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor. `sources` are its inputs in the order of the configuration; None for a tensor to be copied as it is.

    `dtype` is the stored one; `copied` is the source of a tensor that is not merged.
    """

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


class Crew:
    """Threads with their scratch memory, shared by all tensors of a merge. Use as a context manager."""

    def __init__(self, threads: int, models: int, row: int, *, buffer: int = BUFFER) -> None:
        self.threads, self.bytes_read = threads, 0
        self._models, self._size = models, max(BLOCK, row)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._limit, self._buffer = buffer, np.empty(0, np.uint8)

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
        if wanted > self._limit:
            return None
        if wanted > self._buffer.size:
            self._buffer = np.empty(0, np.uint8)  # the old one goes before the new one comes
            self._buffer = np.empty(wanted, np.uint8)
        return self._buffer

    def count_read(self, count: int) -> None:
        with self._lock:
            self.bytes_read += count

    def _workspace(self) -> Workspace:
        found: Workspace | None = getattr(self._local, "workspace", None)
        if found is None:
            found = self._local.workspace = Workspace(self._models, self._size)
        return found


class Visits:
    """All blocks of one target, visited as often as its method asks (`Over`)."""

    def __init__(self, target: Target, crew: Crew) -> None:
        self.target, self.crew = target, crew
        row = target.at.row if target.method.rows else 1
        self.step = max(1, BLOCK // row) * row
        self.blocks = -(-target.size // self.step)
        offsets = itertools.accumulate(
            (-(-target.size * ITEM_BYTES[source.dtype] // 64) * 64 for source in target.read), initial=0
        )
        self._offsets = list(offsets)
        self._kept = crew.buffer(self._offsets[-1]) if target.method.measure is not None else None
        self._filled = np.zeros((len(target.read), self.blocks), np.bool_)

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

    def _visit(self, at: int, workspace: Workspace, function: Callable[[Block], T]) -> T:
        start = at * self.step
        size = min(self.step, self.target.size - start)
        first = 0 if self.target.base is None else -1

        def load(index: int, into: Float32) -> None:
            place = index - first
            source = self.target.read[place]
            item = ITEM_BYTES[source.dtype]
            if self._kept is None:
                raw = workspace.raw[: size * item]
                self.crew.count_read(source.read(start, raw))
            else:
                offset = self._offsets[place] + start * item
                raw = self._kept[offset : offset + size * item]
                if not self._filled[place, at]:
                    self.crew.count_read(source.read(start, raw))
                    self._filled[place, at] = True
            decode(raw, source, into)

        block = Block(start, size, len(self.target.sources), self.target.base is not None, load, workspace)
        # what overflows is infinite where it is stored, and refused there
        with np.errstate(over="ignore"):
            return function(block)


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
        if not encode(values, target.dtype, workspace.single[: block.size], raw):
            do = "store a wider dtype (out_dtype: bfloat16 or float32), or use smaller weights"
            raise ModelError(f"the merged tensor '{target.name}' does not fit {target.dtype}", do=do)
        write(block.start, raw)

    visits(combine)
    return measured
