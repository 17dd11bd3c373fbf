"""What a record says of its step's files, and the seal that tells whether the record itself is as it was written.

The seal is the sha256 of everything else in the record, so that a changed byte in the record is seen as well as one in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixmerge.hashes import each_sha256, file_sha256
from mixmerge.linking import link_equal, stamps

RECORD = "record.json"
PARTS = ("what", "how", "inputs", "measurements", "provenance", "files", "sha256")  # mappings, where a record has them
LEFT_BY_NFS = ".nfs"  # a file that was removed while a process had it open


def step_files(folder: Path) -> dict[str, Path]:
    """The files that a step made, by their names in its folder, in order; its record is none of them."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not name.startswith(LEFT_BY_NFS) and path != folder / RECORD:
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def files_of(folder: Path, inputs: Iterable[Path] = ()) -> dict[str, dict[str, Any]]:
    """The part of a record that says which files there are: `files` their sizes in bytes, `sha256` their contents.

    Large ones that a step in `inputs` has too become links to these. `linked`: the mtimes of files with other names.
    """
    files = step_files(folder)
    hashes = dict(zip(files, each_sha256(files.values(), file_sha256), strict=True))
    link_equal(folder, hashes, ((place, _hashes(place)) for place in inputs))
    linked = stamps(folder, files)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    told: dict[str, dict[str, Any]] = {"files": sizes, "sha256": hashes}
    return told | ({"linked": linked} if linked else {})


def _hashes(folder: Path) -> dict[str, str]:
    """What the record of a finished step says; nothing where it cannot be read, or was changed."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return dict(record["sha256"]) if record["seal"] == _seal(record) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def fault_of(record: Mapping[str, Any], step_id: str) -> str | None:
    """What tells that what was read is not the record that this step left, in a few words; None where nothing does."""
    return shape_fault(record, step_id) or (
        None if as_written(record) else f"{RECORD} has changed since it was written"
    )


def shape_fault(record: Mapping[str, Any], step_id: str) -> str | None:
    """As `fault_of`, but for what a record says: whether it is one, and of this step."""
    said = record.get("id")
    if said != step_id:
        return f"{RECORD} is that of step {said}" if isinstance(said, str) else f"{RECORD} is no record of a step"
    inputs, files = record.get("inputs", {}), record.get("files", {})
    if not all(isinstance(record.get(part, {}), dict) for part in (*PARTS, "linked")):
        return f"{RECORD} is no record of a step"
    whole = all(isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in inputs.values())
    if not whole or not all(isinstance(size, int) for size in files.values()):
        return f"{RECORD} is no record of a step"
    return None


def as_written(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read fits its seal; one of an older mixmerge has none."""
    try:
        return ("seal" not in record and "sha256" not in record) or record.get("seal") == _seal(record)
    except RecursionError:  # what we write is not nested so deeply
        return False


def whole_record(record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A record with every part that readers look for, empty where it has none."""
    return {"kind": kind, "revision": None, **{part: {} for part in PARTS}, **record}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its seal."""
    return {**record, "seal": seal_of(record)}


def seal_of(record: Mapping[str, Any]) -> str:
    """The seal of a record: the same before it is written and after it is read."""
    return _seal(json.loads(json.dumps(record)))


def _seal(read: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in read.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
