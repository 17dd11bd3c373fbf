"""Work that is carried on from, kept with a digest of its bytes: what has changed since it was written is not there.

A file is named by what it is and by the digest of its bytes, `NAME-DIGEST.SUFFIX`; a small one that needs a fixed name holds the
digest itself. The digest is XXH3, which reads ten times as fast as a sha256: a training waits for it at every checkpoint. It
finds what disks and crashes do, and no forger.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

PIECE = 16 << 20  # bytes read at once
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
    found, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        while got := stream.readinto(piece):
            found.update(piece[:got])
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
