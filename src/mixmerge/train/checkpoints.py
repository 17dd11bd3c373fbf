"""Which trainer checkpoints of a work folder can be carried on from.

One idea: a checkpoint counts only once a marker stands in it, written last, that lists every file with its size and
says which training it belongs to; whatever a kill left without one is removed. The one before is removed only after
the marker is on disk, so a kill at any moment leaves a whole checkpoint or none was due yet.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from mixmerge.errors import StepError

MARKER = "whole.json"
PREFIX = "checkpoint-"


def mark_whole(checkpoint: Path, training: str) -> None:
    """Mark a finished checkpoint of the training with the identity `training`, then remove all others beside it."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in sorted(checkpoint.rglob("*")) if f.is_file()}
    partial = checkpoint / f"{MARKER}.part"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump({"training": training, "files": sizes}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(checkpoint / MARKER)
    for other in checkpoint.parent.glob(f"{PREFIX}*"):
        if other != checkpoint:
            shutil.rmtree(other)


def last_whole(work: Path, training: str) -> Path | None:
    """The newest whole checkpoint in `work`, or None; those that are not whole are removed.

    Raises:
        StepError: the newest belongs to another training (other data, settings or model).
    """
    whole: list[tuple[int, str, Path]] = []
    for folder in work.glob(f"{PREFIX}*"):
        owner = _owner(folder)
        if owner is None:
            shutil.rmtree(folder)
        else:
            whole.append((int(folder.name.removeprefix(PREFIX)), owner, folder))
    if not whole:
        return None
    _, owner, newest = max(whole)
    if owner != training:
        raise StepError(
            "the checkpoint is of another training: other model, mixture or settings",
            where=str(newest),
            do=f"remove {work} to start anew",
        )
    return newest


def _owner(folder: Path) -> str | None:
    """The training that a whole checkpoint belongs to; None where anything is missing or has another size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in marker["files"].items()):
            return None
        return str(marker["training"])
    except (OSError, ValueError, KeyError):
        return None
