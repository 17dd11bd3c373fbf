"""The store: a folder per finished step, a partial folder per unfinished one, a lease per running one (`run.lease`).

`<root>/store/<kind>/<name>--<id>/` is whole if and only if it is there: a step writes into a partial folder, its record
goes in last, then one rename. A step is found by its id alone, so a renamed candidate finds its old work. The record has
the size of every file: a step that lost one, or a part of one, since then is damaged, counts as not done and is made again.
It has their sha256 too, which `run.verify` compares. Of two that made the same step the first is kept, and a runner from which
a step was taken, since it stood still for long, does not finish it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from mixmerge.errors import FREE_SOME, FULL, CheckpointError, FullDiskError, StepError, reason
from mixmerge.hashes import FileHashes, cache_folder, each_sha256, sha256_or_error
from mixmerge.plan.graph import Step
from mixmerge.run.lease import Lease, Leases
from mixmerge.run.record import RECORD, fault_of, step_files
from mixmerge.whole import write_whole

SCRATCH = re.compile(r"\..+\.[0-9a-f]+")  # the name of a file that gets its own once it is whole
STEP_ID = re.compile(r"[0-9a-f]{12}")
RUN = "run-"  # how the leases of runs begin
GC = "gc"  # the lease of the one that removes what no recipe reaches
BEGUN = "step.json"  # in a partial folder: what it is of, and what that is made from
GONE = "gone-"  # what the folder of a removed step is called while its files go

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepFolders:
    """Where a step writes: `out` becomes its folder, `work` survives a kill and is thrown away at the end."""

    out: Path
    work: Path


class Store:
    """Finished, unfinished and running steps under `<root>/store`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "store"
        self.leases = Leases(self.folder / ".leases")
        self._held: dict[str, Lease] = {}
        self._damage: dict[str, str | None] = {}

    @cached_property
    def _finished(self) -> dict[str, Path]:
        """Id -> folder of every step with a record; read once, kept up by `commit` and `refresh`."""
        return {step: place for step, place in self.places() if is_file(place / RECORD)}

    def places(self) -> list[tuple[str, Path]]:
        """Ids and places of finished steps in order of kind and name, whatever is there: also links that lead nowhere now."""
        return [(place.name.rpartition("--")[2], place) for place in sorted(self.folder.glob("[!.]*/*--*"))]

    def refresh(self) -> None:
        """Forget what was seen: other processes finish steps too."""
        self.__dict__.pop("_finished", None)
        self._damage.clear()

    def find(self, step_id: str) -> Path | None:
        """The folder of a finished step whose files are as its record says, or None."""
        return None if self.damage(step_id) else self._finished.get(step_id)

    def damage(self, step_id: str) -> str | None:
        """What is wrong with the files of a step that was finished once, in a few words; None where nothing is."""
        folder = self._finished.get(step_id)
        if folder is None:
            return None
        if step_id not in self._damage:
            self._damage[step_id] = _damage(folder, step_id)
        return self._damage[step_id]

    def whole(self, step_id: str) -> dict[str, Any] | None:
        """The record of a finished step whose files are as it says, or None; read once for both."""
        folder = self._finished.get(step_id)
        if folder is None or self._damage.get(step_id) is not None:
            return None
        try:
            record = read_record(folder)
        except CheckpointError:  # gone since it was looked for
            return None
        if step_id not in self._damage:
            self._damage[step_id] = _fault(folder, step_id, record)
        return record if self._damage[step_id] is None else None

    def path(self, step_id: str) -> Path:
        """The folder of a step that must be finished.

        Raises:
            StepError: it is not there (deleted while in use).
        """
        found = self.find(step_id)
        if found is None:
            raise StepError(f"the output of step {step_id} is not in {self.folder}", do="run the same command again")
        return found

    def record(self, step_id: str) -> dict[str, Any]:
        """The record of a finished step.

        Raises:
            CheckpointError: the record cannot be read.
        """
        return read_record(self.path(step_id))

    def folders(self) -> dict[str, Path]:
        """Id -> folder of every step that has one, also without a record, in order of kind and name.

        A folder of another name, as somebody's copy of a step beside it, is none.
        """
        return {step: place for step, place in self.places() if STEP_ID.fullmatch(step) and is_folder(place)}

    def remove(self, folder: Path) -> None:
        """Remove a step's folder whose lease is held: gone from its place at once, however long its files take.

        Raises:
            CheckpointError: it may not be removed, or is a mount point.
        """
        gone = self.folder / ".partial" / f"{GONE}{uuid4().hex[:8]}-{folder.name}"
        try:
            gone.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(gone)
        except OSError as error:
            raise named_os_error(error, folder) from error
        self.refresh()
        shutil.rmtree(gone, ignore_errors=True)  # a run that ends meanwhile removes it too

    def sweep(self) -> None:
        """Remove what is left of removals that were killed."""
        for gone in (self.folder / ".partial").glob(f"{GONE}*"):
            shutil.rmtree(gone, ignore_errors=True)

    @property
    def tokens(self) -> Path:
        """Where trainings keep tokenised rows for each other, as long as a run has trainings."""
        return self.folder / ".tokens"

    @property
    def answers(self) -> Path:
        """The file of all answers that servers gave, for every study of this store: paid for, so never removed."""
        return self.folder / "answers.sqlite"

    def partial(self, step: Step) -> Path:
        return self.folder / ".partial" / f"{step.kind}-{step.id}"

    def interrupted(self, step: Step) -> bool:
        """Whether an earlier run began this step and left work to carry on from."""
        return self.partial(step).is_dir()

    def begun(self) -> set[str]:
        """The ids of steps that have partial folders: those at work, and those that were interrupted."""
        return {folder.name.rpartition("-")[2] for folder in (self.folder / ".partial").glob("*-*")}

    def begin(self, step: Step) -> StepFolders:
        """Partial folders of a step, with what an interrupted run left in them, less what was being written.

        And less links to what an input of it has: who wrote into them would write into that.
        """
        folders = StepFolders(self.partial(step) / "out", self.partial(step) / "work")
        folders.out.mkdir(parents=True, exist_ok=True)
        for scratch in folders.out.glob(".*"):
            if scratch.is_file():
                scratch.unlink()
        for file in step_files(folders.out).values():
            if file.lstat().st_nlink > 1:
                file.unlink()
        for half in self.partial(step).glob(".out.*"):
            if half.name != ".out.partial":  # a merge carries on from it; a model that was being copied is copied anew
                shutil.rmtree(half)
        folders.work.mkdir(parents=True, exist_ok=True)
        if not (begun := self.partial(step) / BEGUN).exists():
            write_json(begun, {"title": step.title, "inputs": [*step.inputs.values()]})
        return folders

    def commit(self, step: Step, record: Mapping[str, Any]) -> Path:
        """Write the record, move the folder into its place, throw the work away.

        Raises:
            StepError: the step was taken from this process, which stood still for too long.
        """
        lease = self._held.get(step.id)
        if lease is not None and not lease.ours():
            raise taken_over()
        write_json(self.partial(step) / "out" / RECORD, {"id": step.id, **record})
        return self._publish(step)

    def rescue(self, step: Step) -> bool:
        """Finish a step that was killed between its record and its place; says whether there was one.

        One that has changed since is told of in the log, and is made again.
        """
        out = self.partial(step) / "out"
        if not (out / RECORD).is_file():
            return False
        if (wrong := _damage(out, step.id) or _changed(out)) is not None:
            log.warning("%s: %s: the step is made again", out, wrong)
            (out / RECORD).unlink()
            return False
        self._publish(step)
        return True

    def tidy(self, step: Step) -> None:
        """Throw away what a kill left of a step after it was in its place."""
        if self.find(step.id) is not None:
            shutil.rmtree(self.partial(step), ignore_errors=True)

    def _publish(self, step: Step) -> Path:
        partial = self.partial(step)
        final = self.folder / step.kind / f"{step.name}--{step.id}"
        final.parent.mkdir(parents=True, exist_ok=True)
        placed = self._made_elsewhere(final.parent, step.id)
        while placed is None:
            try:
                (partial / "out").rename(final)
                placed = final
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                placed = self._made_elsewhere(final.parent, step.id)
        fsync_folder(final.parent)
        shutil.rmtree(partial, ignore_errors=True)
        self._finished[step.id] = placed
        self._damage.pop(step.id, None)
        return placed

    def _made_elsewhere(self, kind: Path, step_id: str) -> Path | None:
        """The whole folder of a step that another runner finished first; a damaged one counts as absent and is moved away."""
        for old in kind.glob(f"*--{step_id}"):
            if is_file(old / RECORD) and _damage(old, step_id) is None:
                return old
            self.remove(old)
        return None

    def running(self, step: Step) -> dict[str, Any] | None:
        """Who holds the step's lease, if that runner is alive."""
        return self.leases.holder(step.id)

    def lease(self, step: Step, lost: Callable[[], object] | None = None) -> AbstractContextManager[bool]:
        """Hold the step while the block runs; gives False, and holds nothing, if a live runner has it."""
        return self.hold(step.id, lost)

    @contextmanager
    def hold(self, step_id: str, lost: Callable[[], object] | None = None, *, roomless: bool = False) -> Iterator[bool]:
        """As `lease`, of the step with that id; `lost` is called if it is taken from this process meanwhile.

        `roomless`: on a full disk too, for those that make room.
        """
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(self.leases.hold(step_id, lost, roomless=roomless))
            except OSError as error:
                raise named_os_error(OSError(error.errno, error.strerror), self.leases.folder) from error
            if lease is not None:
                self._held[step_id] = lease
                stack.callback(self._held.pop, step_id, None)
            yield lease is not None

    def runs(self, study: str) -> set[str]:
        """The leases of a study's runners, also of dead ones."""
        return {name for name in self.leases.names() if name.startswith(run_lease(study))}

    @contextmanager
    def at_work(self, study: str, waits: Callable[[str], object] = lambda who: None) -> Iterator[None]:
        """Keep all of a study's steps from `gc` while a runner is at it; waits for one that is removing now.

        `waits` is told once for whom; the lease of one that is dead is removed. A runner that stood still, and was thought
        dead, says anew that it is there.
        """
        with ExitStack() as stack:

            def here() -> None:
                stack.enter_context(self.hold(f"{run_lease(study)}{uuid4().hex[:8]}", here))

            here()
            told = False
            while self.leases.path(GC).exists():
                if not told:
                    waits(holder_words(self.leases.holder(GC) or {}))
                    told = True
                with self.hold(GC):  # taken, and let go, once it is seen to be dead
                    pass
                time.sleep(0.1)
            yield


def is_folder(place: Path) -> bool:
    """As `Path.is_dir`, and not where the disk, or who serves it, answers with an error."""
    return os.path.isdir(place)  # noqa: PTH112


def is_file(place: Path) -> bool:
    """As `Path.is_file`, and not where the disk, or who serves it, answers with an error."""
    return os.path.isfile(place)  # noqa: PTH113


def holder_words(owner: Mapping[str, Any]) -> str:
    """A process by what its lease says of it."""
    known = isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return f"process {owner['pid']} on {owner['host']}" if known else "a process that its lease does not name"


def run_lease(study: str) -> str:
    """How the leases of a study's runners begin."""
    return f"{RUN}{hashlib.sha256(study.encode()).hexdigest()[:12]}-"


def taken_over() -> StepError:
    """Said of a step that was taken from a process which stood still: a machine asleep, a server that did not answer."""
    return StepError(
        "another runner took the step over, since this process stood still for more than a minute",
        do="run the same command again",
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a finished step's folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_json(folder / RECORD)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the store.

    Raises:
        CheckpointError: it cannot be read, or is not a mapping.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no mapping")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the file is damaged: {reason(error)}", where=str(path), do=remove(path.parent)
        ) from error


def remove(folder: Path) -> str:
    """The advice that mends a finished step whose files are damaged."""
    return f"remove the folder {folder} and run the same command again"


def _damage(folder: Path, step_id: str) -> str | None:
    """How the files of a finished step differ from its record."""
    try:
        return _fault(folder, step_id, read_record(folder))
    except CheckpointError:
        return f"{RECORD} cannot be read"


def _fault(folder: Path, step_id: str, record: Mapping[str, Any]) -> str | None:
    """As `_damage`, by what the record says; a look at names and sizes only.

    One that had other names (hard links) is read where its mtime has changed: somebody may have written to it under these.
    """
    if (fault := fault_of(record, step_id)) is not None:
        return fault
    files, linked, hashes = (record.get(key, {}) for key in ("files", "linked", "sha256"))
    for name, size in files.items():
        try:
            found = (folder / name).stat()
        except (OSError, ValueError):  # or no name that a file can have
            return f"{name} is missing"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes, its record says {size}"
        if linked.get(name, found.st_mtime_ns) != found.st_mtime_ns and _sha256(folder / name) != hashes.get(name):
            return f"{name} has changed under another name that it had (a hard link)"
    return None


def _changed(folder: Path) -> str | None:
    """The first file of a step that is not what its record says, by reading them all."""
    said = read_record(folder).get("sha256", {})
    for name, found in zip(said, each_sha256((folder / name for name in said), sha256_or_error), strict=True):
        if found != said[name]:
            return f"{name} {'cannot be read' if isinstance(found, OSError) else 'has changed since it was written'}"
    return None


def _sha256(file: Path) -> str:
    hashes = FileHashes(cache_folder())
    found = hashes(file)
    hashes.save()
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    try:
        write_whole(path, json.dumps(value, ensure_ascii=False, indent=1))
    except OSError as error:
        raise named_os_error(error, path) from error


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def named_os_error(error: OSError, path: Path | str) -> CheckpointError:
    """An operating-system error as one line that names the file and what to do."""
    found = Path(error.filename or path)
    place = str(found.parent if SCRATCH.fullmatch(found.name) else found)
    if error.errno in FULL:
        return FullDiskError("no space left on the disk", where=place, do=FREE_SOME)
    if error.errno == errno.EROFS:
        do = "mount it writable to go on; `show`, `report` and `verify` read what is there"
        return CheckpointError("the file system is read-only", where=place, do=do)
    if error.errno in (errno.EACCES, errno.EPERM):
        do = "let this user write there to go on, or start anew in another --out folder"
        return CheckpointError("no permission to write", where=place, do=do)
    return CheckpointError(error.strerror or str(error), where=place)
