"""sha256 of files, several at once, for whoever tells files by what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
AT_ONCE = 8  # files; more than that and a disk only seeks


def file_sha256(path: Path) -> str:
    """The sha256 of a file as hex digits; read in pieces, so that its size does not matter."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_or_error(path: Path) -> str | OSError:
    """As `file_sha256`, with the error in its place where the file cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        return error


def each_sha256(paths: Iterable[Path], hashed: Callable[[Path], Result]) -> Iterator[Result]:
    """`hashed` of every file, in order, several at once: hashing holds no lock of the interpreter."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        yield from pool.map(hashed, paths)
