"""Work that is carried on from, kept with a digest of its bytes: what has changed since it was written is not there.

A file is named by what it is and by the digest of its bytes, `NAME-DIGEST.SUFFIX`; a small one that needs a fixed name holds the
digest itself, and a folder has a marker, written last, with those of its files. The digest is XXH3, which reads nearly four times
as fast as a sha256: a training waits for it at every checkpoint. It finds what disks and crashes do, and no forger.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

MARKER = "whole.json"
PIECE = 4 << 20  # bytes read at once
LOST = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)  # a disk that does not give back what was written

log = logging.getLogger(__name__)


def digest(data: bytes) -> str:
    """128 bits of all bytes, as hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def file_digest(file: Path) -> str:
    """As `digest`, of a file's bytes, which need not fit into memory.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        return stretch_digest(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)


def stretch_digest(descriptor: int, start: int, size: int) -> str:
    """As `digest`, of `size` bytes of an open file from `start` on, or of those that there are.

    Raises:
        OSError: they cannot be read.
    """
    found, end = xxhash.xxh3_128(), start + size
    while piece := os.pread(descriptor, min(PIECE, end - start), start):
        found.update(piece)
        start += len(piece)
    return found.hexdigest()


def keep(folder: Path, name: str, suffix: str, write: Callable[[Path], object]) -> None:
    """Have `write` write a file, which appears whole under its name and its digest.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{name}.{uuid4().hex}"  # other machines write here too
    try:
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(folder / f"{name}-{file_digest(scratch)}{suffix}")
    finally:
        scratch.unlink(missing_ok=True)


def kept(folder: Path, name: str, suffix: str) -> Path | None:
    """The file of this name; None where there is none. One that has changed, or is lost, is told of in the log, and removed.

    Raises:
        OSError: it cannot be read for another reason, which may pass.
    """
    for file in folder.glob(f"{name}-*{suffix}"):
        try:
            if file.name == f"{name}-{file_digest(file)}{suffix}":
                return file
            what = "has changed since it was written"
        except FileNotFoundError:  # removed since it was listed
            continue
        except OSError as error:
            if error.errno not in LOST:
                raise
            what = f"cannot be read: {error.strerror}"
        log.warning("%s %s: it is made again", file, what)
        file.unlink(missing_ok=True)
    return None


def sealed(value: Any) -> str:
    """JSON, on one line, of a value with its digest."""
    return json.dumps({"value": value, "xxh3": digest(json.dumps(value).encode())})


def unsealed(text: str | bytes) -> Any:
    """The value, which is not None itself; None where this is not as `sealed` gave it."""
    try:
        read = json.loads(text)
        if isinstance(read, dict) and read.get("xxh3") == digest(json.dumps(read.get("value")).encode()):
            return read["value"]
    except (ValueError, KeyError, RecursionError):
        pass
    return None


def mark_whole(folder: Path, told: Mapping[str, Any], *, digests: bool = True) -> None:
    """Write the marker of a finished folder, with what is `told` of it; without `digests`, only its files' sizes are in it.

    Raises:
        OSError: a file cannot be read, or the marker cannot be written.
    """
    marker, partial = folder / MARKER, folder / f"{MARKER}.part"  # which a kill may have left
    ours = [file for file in sorted(folder.rglob("*")) if file.is_file() and file not in (marker, partial)]
    files = {str(file.relative_to(folder)): file for file in ours}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    found = {name: file_digest(file) for name, file in files.items()} if digests else {}
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(sealed({**told, "files": sizes, "xxh3": found}))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(marker)


def marked(folder: Path, *, read: bool = True) -> dict[str, Any] | None:
    """What is told of a folder that is as it was marked; None of another one: the log tells what has changed in it, or is lost.

    `read`: its bytes too, not only their number.

    Raises:
        OSError: it cannot be read for another reason, which may pass.
    """
    if not (folder / MARKER).exists():
        return None  # a kill left it half
    try:
        marker: dict[str, Any] | None = unsealed((folder / MARKER).read_bytes())
        wrong = MARKER if marker is None else _changed(folder, marker, read=read)
        what = f"{folder / wrong} has changed since it was written" if wrong is not None else None
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno not in LOST:
            raise
        what = f"{folder} cannot be read: {error.strerror}"
    if what is not None:
        log.warning("%s: not carried on from", what)
        return None
    return marker


def _changed(folder: Path, marker: Mapping[str, dict[str, Any]], *, read: bool) -> str | None:
    """The first file of a folder that has other bytes than were written, or another size."""
    for name, size in marker["files"].items():
        if (folder / name).stat().st_size != size:
            return name
    digests = marker["xxh3"].items() if read else ()
    return next((name for name, digest in digests if file_digest(folder / name) != digest), None)
