"""What a record says of its step's files, and the seal that tells whether the record itself is as it was written.

The seal is the sha256 of everything else in the record, so that a changed byte in the record is seen as well as one in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.hashes import each_sha256, file_sha256

RECORD = "record.json"
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


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The part of a record that says which files there are: `files` their sizes in bytes, `sha256` their contents."""
    files = step_files(folder)
    hashes = zip(files, each_sha256(files.values(), file_sha256), strict=True)
    return {"files": {name: path.stat().st_size for name, path in files.items()}, "sha256": dict(hashes)}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its seal."""
    return {**record, "seal": seal_of(record)}


def seal_of(record: Mapping[str, Any]) -> str:
    """The seal of a record: the same before it is written and after it is read."""
    rest = json.loads(json.dumps({key: value for key, value in record.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
