"""Small finished steps, and the ways in which their bytes change."""

from __future__ import annotations

import os
from pathlib import Path

from mixmerge.plan.graph import Step
from mixmerge.run.record import files_of, sealed
from mixmerge.run.store import Store

STEP = Step("merge", "ties", {"density": 0.5})
READER = Step("generate", "ties.general", {"seed": 0}, {"model": STEP.id})
LAST = Step("judge", "ties.general.harm", {"seed": 0}, {"responses": READER.id})


def rewrite(path: Path, data: bytes) -> None:
    """Other bytes under the same name; a hard link's other names keep theirs."""
    path.unlink()
    path.write_bytes(data)


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    rewrite(path, bytes(data))


def made(store: Store, step: Step = STEP, **files: str) -> Path:
    """A finished step with these files, recorded as a worker does."""
    folders = store.begin(step)
    for name, text in files.items():
        (folders.out / name).write_text(text)
    inputs = {role: {"id": id_} for role, id_ in step.inputs.items()}
    record = {"id": step.id, **step.payload, "inputs": inputs, **files_of(folders.out)}
    return store.commit(step, sealed(record))


def in_silence(path: Path) -> None:
    """Change a bit and let the file look as old as it was, as a disk does."""
    seen = path.stat()
    flip(path)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
