"""Which trainer checkpoints of a work folder can be carried on from.

One idea: a checkpoint counts only once a marker stands in it, written last, that lists every file with its size and its
digest and says which training it belongs to; whatever a kill left without one is removed, and so is one whose bytes have
changed since. The one before is removed only after the marker is on disk, so a kill at any moment leaves a whole checkpoint
or none was due yet.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.errors import StepError
from mixmerge.kept import LOST, file_digest, sealed, unsealed

MARKER = "whole.json"
PREFIX = "checkpoint-"

log = logging.getLogger(__name__)


def mark_whole(checkpoint: Path, training: str, *, fsdp: bool = False) -> None:
    """Mark a finished checkpoint of the training with the identity `training`, then remove all others beside it.

    `fsdp`: its weights are shared out among files, which other machines may have written; so no process reads them all.
    """
    files = {str(f.relative_to(checkpoint)): f for f in sorted(checkpoint.rglob("*")) if f.is_file()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    digests = {} if fsdp else {name: file_digest(file) for name, file in files.items()}
    partial = checkpoint / f"{MARKER}.part"
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(sealed({"training": training, "fsdp": fsdp, "files": sizes, "xxh3": digests}))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(checkpoint / MARKER)
    for other in checkpoint.parent.glob(f"{PREFIX}*"):
        if other != checkpoint:
            shutil.rmtree(other)


def last_whole(work: Path, training: str, *, fsdp: bool = False, read: bool = True) -> Path | None:
    """The newest whole checkpoint in `work`, or None; those that are not whole are removed.

    `read`: also those whose bytes have changed, which the log tells; of a group, one process reads them all.

    Raises:
        OSError: one cannot be read now, for a reason that may pass.
        StepError: the newest belongs to another training (other data, settings or model), or its weights are shared out
            where they are not now, or the other way round.
    """
    whole: list[tuple[int, tuple[str, bool], Path]] = []
    for folder in work.glob(f"{PREFIX}*"):
        found = _owner(folder, read=read)
        if found is None:
            shutil.rmtree(folder)
        else:
            whole.append((int(folder.name.removeprefix(PREFIX)), found, folder))
    if not whole:
        return None
    _, (owner, shared), newest = max(whole)
    do = f"remove {work} to start anew"
    if owner == training and shared != fsdp:
        raise StepError(
            f"the checkpoint was written with how.fsdp: {str(shared).lower()}",
            where=str(newest),
            do=f"set it so again, or {do}",
        )
    if owner != training:
        raise StepError(
            "the checkpoint is of another training: other model, mixture or settings",
            where=str(newest),
            do=do,
        )
    return newest


def _owner(folder: Path, *, read: bool) -> tuple[str, bool] | None:
    """The training that a whole checkpoint belongs to, and whether it is shared out; None where anything is missing or has changed."""
    if not (folder / MARKER).exists():
        return None  # a kill left it half
    try:
        marker = unsealed((folder / MARKER).read_bytes())
        wrong = MARKER if marker is None else _changed(folder, marker, read=read)
        told = f"{folder / wrong} has changed since it was written" if wrong is not None else None
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno not in LOST:
            raise
        told = f"{folder} cannot be read: {error.strerror}"
    if told is not None:
        log.warning("%s: not carried on from", told)
        return None
    return marker["training"], marker["fsdp"]


def _changed(folder: Path, marker: Mapping[str, dict[str, Any]], *, read: bool) -> str | None:
    """The first file of a checkpoint that has other bytes than were written, or another size."""
    for name, size in marker["files"].items():
        if (folder / name).stat().st_size != size:
            return name
    digests = marker["xxh3"].items() if read else ()
    return next((name for name, digest in digests if file_digest(folder / name) != digest), None)
