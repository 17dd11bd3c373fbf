"""sha256 of files, several at once or remembered, for whoever tells files by what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mixmerge.whole import write_whole

Result = TypeVar("Result")
Entry = list[Any]  # what `_look` sees, then the sha256

REMEMBERED = "fingerprints.json"
MOST = 10_000  # files remembered, the newest
SMALL = 1 << 20  # bytes; a smaller file is read faster than it is looked up
RACY_NS = 2_000_000_000  # the coarsest time of a file system in use (FAT)
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


class FileHashes:
    """sha256 of files, those of large ones remembered in a folder by path and all that `_look` sees; None: not at all.

    One of these reads a file once at most. What is remembered stands under a seal: where it is damaged, was replaced by
    another process or cannot be written, that costs time and no more. A file that was changed within `RACY_NS` before it was
    read is not remembered, since it may have been changed again without another time.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / REMEMBERED
        self._known = _remembered(self._file)
        self._new: dict[str, Entry] = {}
        self._seen: dict[Path, str] = {}

    def __call__(self, path: Path) -> str:
        """The sha256 of a file."""
        if path not in self._seen:
            self._seen[path] = self._of(path)
        return self._seen[path]

    def _of(self, path: Path) -> str:
        before = _look(path)
        if self._file is None or before[0] < SMALL:
            return file_sha256(path)
        place = str(path.resolve())
        if (entry := self._known.get(place)) is not None and tuple(entry[:-1]) == before:
            return str(entry[-1])
        began, found = time.time_ns(), file_sha256(path)
        if _look(path) == before and began - max(before[1:3]) > RACY_NS:
            self._new[place] = [*before, found]
        return found

    def save(self) -> None:
        """Add what was learnt to what is remembered, also by other processes meanwhile."""
        if self._file is None or not self._new:
            return
        files = {**_remembered(self._file), **self._new}
        files = dict(list(files.items())[-MOST:])
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps({"seal": _seal(files), "files": files}, ensure_ascii=True))
        self._known, self._new = files, {}


def cache_folder() -> Path | None:
    """The user's folder for what only saves time: MIXMERGE_CACHE, or `mixmerge` in the system's place for such.

    None for a user without a home, as containers have.
    """
    if own := os.environ.get("MIXMERGE_CACHE"):
        return Path(own)
    place = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (place if place.is_absolute() else Path.home() / ".cache") / "mixmerge"
    except RuntimeError:
        return None


def _look(path: Path) -> tuple[int, ...]:
    """Size in bytes, mtime and ctime in ns, inode and device.

    An mtime can be given: tar, rsync and `touch -r` write other bytes under the old one. A ctime cannot.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _remembered(file: Path | None) -> dict[str, Entry]:
    try:
        told = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        files = dict(told.get("files", {}))
        return files if told and told["seal"] == _seal(files) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _seal(files: Mapping[str, Entry]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
