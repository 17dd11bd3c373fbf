"""Where the elements of a tensor come from: `Stored` in a checkpoint, or anything else that can give a stretch of raw floats.

The one idea: a merge reads through this seam only, so a tensor that has to be put together (rows in another order, a
folded adapter) is one more source, and no method knows of it. Reads are positioned and share no state but open files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from mixmerge.errors import CheckpointError, ModelError
from mixmerge.merge import kernels
from mixmerge.merge.checkpoint import AGAIN, ITEM_BYTES, Checkpoint, Tensor

Raw = npt.NDArray[np.uint8]
STORED = {"BF16": kernels.BF16, "F16": kernels.F16, "F32": kernels.F32}


class Source(Protocol):
    """A tensor of one model: `model` and `name` are for messages, `dtype` is one of FLOATS."""

    @property
    def model(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, into: Raw) -> int:
        """Fill `into` with the raw elements from flat index `start` on; gives the bytes read from disk."""
        ...

    def ahead(self) -> None:
        """Ask the system to read the tensor soon."""
        ...


class Files:
    """Files kept open for reading, from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = Lock()

    def descriptor(self, path: Path) -> int:
        found = self._open.get(path)
        if found is not None:
            return found
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"cannot read: {error.strerror}", where=str(path)) from error
            return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a checkpoint."""

    model: str
    name: str
    tensor: Tensor
    files: Files

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, start: int, into: Raw) -> int:
        place, at, view = self.tensor.offset + start * ITEM_BYTES[self.dtype], 0, into.data
        descriptor = self.files.descriptor(self.tensor.file)
        while at < len(view):
            try:
                got = os.preadv(descriptor, [view[at:]], place + at)
            except OSError as error:
                what = f"cannot read tensor '{self.name}': {error.strerror}"
                raise CheckpointError(what, where=str(self.tensor.file)) from error
            if got == 0:
                what = f"the file ends inside tensor '{self.name}'"
                raise CheckpointError(what, where=str(self.tensor.file), do=AGAIN)
            at += got
        return at

    def ahead(self) -> None:
        if hasattr(os, "posix_fadvise"):
            descriptor = self.files.descriptor(self.tensor.file)
            os.posix_fadvise(descriptor, self.tensor.offset, self.tensor.bytes, os.POSIX_FADV_WILLNEED)


def stored(checkpoint: Checkpoint, files: Files) -> Mapping[str, Stored]:
    """Every tensor of a checkpoint as a source."""
    return {name: Stored(checkpoint.name, name, tensor, files) for name, tensor in checkpoint.tensors.items()}


def decode(raw: Raw, source: Source, into: npt.NDArray[np.float32]) -> None:
    """Raw elements of a source as float32, exactly.

    Raises:
        ModelError: one of them is NaN or infinite.
    """
    if not kernels.decode(raw.view(np.uint16), 0, STORED[source.dtype], into):
        refuse(source)


def read_decoded(source: Source, start: int, size: int) -> tuple[npt.NDArray[np.float32], int]:
    """A stretch of a source as float32, and the bytes read for it."""
    raw, values = np.empty(size * ITEM_BYTES[source.dtype], np.uint8), np.empty(size, np.float32)
    read = source.read(start, raw)
    decode(raw, source, values)
    return values, read


def refuse(source: Source) -> NoReturn:
    """Raise for a source that holds a NaN or infinity."""
    what = f"tensor '{source.name}' holds NaN or infinity"
    raise ModelError(what, where=source.model, do="take another checkpoint of it")


def encode(values: npt.NDArray[np.float64], dtype: str, single: npt.NDArray[np.float32], into: Raw) -> bool:
    """float64 rounded once to nearest even, as stored, into `into`; whether all of them are finite there."""
    if dtype == "BF16":
        return bool(kernels.encode_bf16(values, single, into.view(np.uint16)))
    stored = into.view(np.float16 if dtype == "F16" else np.float32)
    with np.errstate(over="ignore"):
        stored[:] = values
    single[:] = stored
    return bool(kernels.all_finite(single))
