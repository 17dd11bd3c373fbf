"""Which trainer checkpoints of a work folder can be carried on from.

One idea: a checkpoint counts only once a marker stands in it, written last, that lists every file with its size and its
digest and says which training it belongs to; whatever a kill left without one is removed, and so is one whose bytes have
changed since. The one before is removed only after the marker is on disk, so a kill at any moment leaves a whole checkpoint
or none was due yet.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mixmerge import kept
from mixmerge.errors import StepError

PREFIX = "checkpoint-"


def mark_whole(checkpoint: Path, training: str, *, fsdp: bool = False) -> None:
    """Mark a finished checkpoint of the training with the identity `training`, then remove all others beside it.

    `fsdp`: its weights are shared out among files, which other machines may have written; so no process reads them all.
    """
    kept.mark_whole(checkpoint, {"training": training, "fsdp": fsdp}, digests=not fsdp)
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
        marker = kept.marked(folder, read=read)
        if marker is None:
            shutil.rmtree(folder)
        else:
            whole.append((int(folder.name.removeprefix(PREFIX)), (marker["training"], marker["fsdp"]), folder))
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
