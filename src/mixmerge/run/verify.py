"""Whether finished steps are what they were when they were finished, to the byte.

Every file of a step's folder is read and compared with the step's record, and the record with its seal and its id. A
record of an older mixmerge has sizes only: what could not be compared is said, and is no damage.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from mixmerge.errors import CheckpointError, reason
from mixmerge.evaluate.answers import Answers, changed_answers
from mixmerge.hashes import each_sha256, sha256_or_error
from mixmerge.plan.identity import step_id
from mixmerge.run.record import RECORD, as_written, shape_fault, step_files
from mixmerge.run.store import is_file, read_record

Progress = Callable[[int, int], None]


class _File(NamedTuple):
    """A file whose bytes are to be compared: what its record says of them, its size in bytes, and how many names it has."""

    name: str
    path: Path
    expected: str
    size: int
    names: int


@dataclass(slots=True)
class Checked:
    """What was found of one step; whole where there are no problems. `hashed`: its record has hashes to compare with.

    `changed`: bytes have changed that nobody may have noticed as they were read. `roots`: the ids of such steps that it may be made
    from, `generation`: through how many. `doubtful`: that is all that is wrong with it. `partial`: it is not finished.
    """

    step: str
    title: str
    folder: Path
    problems: list[str] = field(default_factory=list)
    hashed: bool = True
    mended: bool = False
    mend: str | None = None
    changed: bool = False
    generation: int = 0
    doubtful: bool = False
    roots: Collection[str] = ()
    partial: bool = False

    def to_json(self) -> dict[str, Any]:
        bad = "doubtful" if self.doubtful else "damaged"
        state = "mended" if self.mended else bad if self.problems else "whole"
        told = {"step": self.title, "id": self.step, "folder": str(self.folder), "state": state}
        return told | {"partial": self.partial, "hashed": self.hashed, "problems": self.problems, "mend": self.mend}


def verify_steps(folders: Mapping[str, Path], progress: Progress | None = None) -> list[Checked]:
    """Compare the steps in these folders, by id, with their records; `progress` is told bytes."""
    checked = {step: _checked(step, folder) for step, folder in folders.items()}
    to_read = [(found, file) for found, files in checked.values() for file in files]
    total, done = sum(file.size for _, file in to_read), 0
    hashes = each_sha256((file.path for _, file in to_read), sha256_or_error)
    for (found, file), got in zip(to_read, hashes, strict=True):
        if isinstance(got, OSError):
            found.problems.append(f"{file.name} cannot be read: {got.strerror or got}")
        elif got != file.expected:
            others = " (and so has each of its other names: hard links)" if file.names > 1 else ""
            told = f"sha256 {got[:12]}, its record says {file.expected[:12]}"
            found.problems.append(f"{file.name} has changed{others}: {told}")
            found.changed = True
        done += file.size
        if progress is not None:
            progress(done, total)
    for found, _ in checked.values():
        if found.problems:
            found.mend = how_to_mend(found)
    return [found for found, _ in checked.values()]


class DamagedAnswers(NamedTuple):
    """What is wrong with the file of servers' answers, and what mends it, or has."""

    problem: str
    mend: str
    mended: bool = False


def verify_answers(path: Path, *, mending: bool = False) -> DamagedAnswers | None:
    """Look at the file of servers' answers, by SQLite's own integrity check and by each answer's digest; None where it is whole.

    Where nobody has it open it is read as a file that nobody changes: nothing is left beside it, and it may be read-only. A
    run that begins meanwhile makes that wrong, so only damage that is seen twice is told. `mending` removes answers that have
    changed, which are no answers any more; a file that is damaged as a whole is left.
    """
    if not path.exists():
        return None
    found: str | int | None = None
    for _ in range(2):
        idle = not path.with_name(f"{path.name}-wal").exists()
        found = _look(path, "mode=ro&immutable=1" if idle else "mode=ro")
        if not found:
            return None
    if isinstance(found, str):
        mend = "save what can be read with `sqlite3 FILE .recover` (or `.dump`); removed, all is asked and paid anew"
        return DamagedAnswers(found, mend)
    problem = f"answers that have changed since they were kept: {found}"
    if not mending:
        return DamagedAnswers(
            problem, "run `mixmerge verify --store --mend`: where one is needed again, it is asked for again"
        )
    try:
        with closing(Answers(path)) as answers:
            answers.remove_changed()
    except CheckpointError as error:
        return DamagedAnswers(problem, f"they cannot be removed: {error}")
    return DamagedAnswers(problem, "removed: where one is needed again, it is asked for again", mended=True)


def _look(path: Path, how: str) -> str | int | None:
    """What is wrong with the file in words, or how many of its answers have changed."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?{how}", uri=True, timeout=60)) as connection:
            rows = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
            return (
                len(changed_answers(connection)) if rows == ["ok"] else "; ".join(" ".join(row.split()) for row in rows)
            )
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the last where SQLite quotes what is damaged
        return reason(error)


def _checked(step: str, folder: Path) -> tuple[Checked, list[_File]]:
    """What names, sizes and the record tell of a step, and the files whose bytes are still to be compared."""
    found = Checked(step, title_of(folder), folder)
    if not is_file(folder / RECORD):
        found.problems.append(f"{RECORD} is missing")
        return found, []
    try:
        record = read_record(folder)
        found.problems += record_problems(step, record)
    except CheckpointError:
        found.problems.append(f"{RECORD} cannot be read: it was cut short, or changed")
        return found, []
    if shape_fault(record, step) is not None:
        return found, []
    sizes, hashes = record.get("files", {}), record.get("sha256", {})
    found.hashed = bool(hashes) or not sizes
    there, to_read = step_files(folder), list[_File]()
    for name, size in sizes.items():
        try:
            stat = there[name].stat()
        except (KeyError, FileNotFoundError):
            found.problems.append(f"{name} is missing")
            continue
        except OSError as error:
            found.problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if stat.st_size != size:
            found.problems.append(f"{name} has {stat.st_size:,} bytes, its record says {size:,}")
        elif isinstance(hashes.get(name), str):
            to_read.append(_File(name, there[name], hashes[name], size, stat.st_nlink))
    extra = [name for name in there if name not in sizes]
    found.problems += [f"{name} is extra: its record does not name it" for name in extra]
    found.changed |= bool(extra)  # a model's folder is read by what is in it
    return found, to_read


def title_of(folder: Path) -> str:
    """`kind/name` of a step's folder."""
    return f"{folder.parent.name}/{folder.name.rpartition('--')[0]}"


def record_problems(step: str, record: Mapping[str, Any]) -> list[str]:
    """What tells that a record is not as this step left it: its shape, its seal, or the id that what it says would give."""
    if (fault := shape_fault(record, step)) is not None:
        return [fault]
    if not as_written(record):
        return [f"{RECORD} has changed since it was written: its seal does not fit"]
    if "what" in record:
        told = {key: record.get(key) for key in ("kind", "revision", "what")}
        inputs = {role: entry["id"] for role, entry in record.get("inputs", {}).items()}
        try:
            own = step_id(told | {"inputs": inputs})
        except (TypeError, ValueError):  # numbers and types that no identity has
            return [f"{RECORD} is no record of a step"]
        if own != step:
            return [f"{RECORD} is that of step {own}"]
    return []


def link_of(folder: Path) -> Path | None:
    """The link by which a step's folder is in another place: itself, or the folder of its kind."""
    return next((place for place in (folder, folder.parent) if place.is_symlink()), None)


def how_to_mend(found: Checked) -> str:
    """What a person can do about it."""
    if (link := link_of(found.folder)) is not None:
        return f"{link} is a link to {link.readlink()}: look there, or remove the link"
    readers = " and what was made from it" if found.changed else ""
    return f"remove the folder {found.folder}{readers} (--mend does) and run the same command again"
