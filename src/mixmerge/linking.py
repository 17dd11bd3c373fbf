"""The bytes of one file under a second name, without a copy where the file system can do that.

A reflink where there is such a thing (XFS, Btrfs): two files that share their blocks until one is changed. Else a hard link:
one file with two names, so neither is ever written in place by us, and `stamps` tells when somebody else did. Else a copy, by
the server where the folder is on one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from mixmerge.hashes import file_sha256

FICLONE = 0x40049409  # ioctl_ficlone(2), Linux
WORTH = 1 << 20  # bytes; a smaller file is sooner copied than looked for
AT_ONCE = 1 << 30


def link_or_copy(file: Path, to: Path) -> None:
    """Give the new file `to` the bytes of `file`: a reflink, else a hard link, else a copy."""
    source = file.resolve()  # a Hub cache holds links into its blobs; a link to a link would hang on that cache
    if _reflink(source, to):
        return
    try:
        os.link(source, to)
    except OSError:
        _copy(source, to)


def link_equal(folder: Path, hashes: Mapping[str, str], others: Iterable[tuple[Path, Mapping[str, str]]]) -> int:
    """Make large files of `folder` links to files of `others` with the same sha256; how many bytes that gave back.

    Hashes are by name in a folder; both sides must be files that nobody writes in place. What `others` say is not believed: a
    file that has changed since would take the place of a whole one.
    """
    large = {name: size for name in hashes if (size := (folder / name).stat().st_size) >= WORTH}
    known = {digest: place / name for place, found in others for name, digest in found.items()} if large else {}
    saved = 0
    for name, size in large.items():
        file, other = folder / name, known.get(hashes[name])
        scratch = file.with_name(f".{uuid4().hex}")
        with suppress(OSError):
            if other is None or other.samefile(file) or file_sha256(other) != hashes[name]:
                continue
            if not _reflink(other, scratch):
                os.link(other, scratch)
            scratch.replace(file)
            saved += size
    return saved


def stamps(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The mtimes, in ns, of those files that have other names: what is written under one of these changes them."""
    found = {name: (folder / name).stat() for name in names}
    return {name: stat.st_mtime_ns for name, stat in found.items() if stat.st_nlink > 1}


def _reflink(source: Path, to: Path) -> bool:
    try:
        from fcntl import ioctl
    except ImportError:
        return False
    try:
        with source.open("rb") as old, to.open("xb") as new:
            ioctl(new.fileno(), FICLONE, old.fileno())
    except FileExistsError:
        raise
    except OSError:
        to.unlink(missing_ok=True)
        return False
    return True


def _copy(source: Path, to: Path) -> None:
    try:
        with source.open("rb") as old, to.open("wb") as new:
            while os.copy_file_range(old.fileno(), new.fileno(), AT_ONCE):
                pass
    except (OSError, AttributeError):  # another file system, or no Linux
        shutil.copyfile(source, to)
