"""The store: a folder per finished step, a partial folder per unfinished one, a lease per running one.

`<root>/store/<kind>/<name>--<id>/` is whole if and only if it is there: a step writes into a partial folder, its record
goes in last, then one rename. A step is found by its id alone, so a renamed candidate finds its old work. The record has
the size of every file: a step that lost one, or a part of one, since then is damaged, counts as not done and is made again.
It has their sha256 too, which `run.verify` compares.
A lease is a file with a heartbeat; it stands in nobody's way once its process is gone or it has not beaten for a minute.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, FullDiskError, StepError, reason
from mixmerge.plan.graph import Step
from mixmerge.run.record import RECORD
from mixmerge.whole import write_whole

HEARTBEAT_S = 5.0
LEASE_EXPIRES_S = 60.0
GONE = "gone-"  # what the folder of a removed step is called while its files go


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

        self._damage: dict[str, str | None] = {}

    @cached_property
    def _finished(self) -> dict[str, Path]:
        """Id -> folder of every step with a record; read once, kept up by `commit` and `refresh`."""
        return {p.name.rpartition("--")[2]: p for p in self.folder.glob("*/*--*") if (p / RECORD).is_file()}

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
            self._damage[step_id] = _damage(folder)
        return self._damage[step_id]

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

    def latest(self, kind: str, name: str) -> dict[str, Any] | None:
        """The record of the newest finished step of that kind and name, whatever its id."""
        named = (p for p in self.folder.glob(f"{kind}/{name}--*") if p.name.rpartition("--")[0] == name)
        folders = [p for p in named if (p / RECORD).is_file() and self.find(p.name.rpartition("--")[2])]
        return read_record(max(folders, key=lambda p: (p / RECORD).stat().st_mtime)) if folders else None

    def folders(self) -> dict[str, Path]:
        """Id -> folder of every step that has one, also without a record, in order of kind and name."""
        found = sorted(p for p in self.folder.glob("[!.]*/*--*") if p.is_dir())
        return {p.name.rpartition("--")[2]: p for p in found}

    def remove(self, folder: Path) -> None:
        """Remove a step's folder whose lease is held: gone from its place at once, however long its files take."""
        gone = self.folder / ".partial" / f"{GONE}{folder.name}"
        gone.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        self.refresh()
        shutil.rmtree(gone)

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

    def begin(self, step: Step) -> StepFolders:
        """Partial folders of a step, with what an interrupted run left in them."""
        folders = StepFolders(self.partial(step) / "out", self.partial(step) / "work")
        folders.out.mkdir(parents=True, exist_ok=True)
        folders.work.mkdir(parents=True, exist_ok=True)
        return folders

    def commit(self, step: Step, record: Mapping[str, Any]) -> Path:
        """Write the record, move the folder into its place, throw the work away."""
        write_json(self.partial(step) / "out" / RECORD, record)
        return self._publish(step)

    def rescue(self, step: Step) -> bool:
        """Finish a step that was killed between its record and its place; says whether there was one."""
        whole = (self.partial(step) / "out" / RECORD).is_file()
        if whole:
            self._publish(step)
        return whole

    def tidy(self, step: Step) -> None:
        """Throw away what a kill left of a step after it was in its place."""
        if self.find(step.id) is not None:
            shutil.rmtree(self.partial(step), ignore_errors=True)

    def _publish(self, step: Step) -> Path:
        partial = self.partial(step)
        final = self.folder / step.kind / f"{step.name}--{step.id}"
        final.parent.mkdir(parents=True, exist_ok=True)
        for old in final.parent.glob(f"*--{step.id}"):  # damaged, or without its record: it counts as absent
            shutil.rmtree(old)
        (partial / "out").rename(final)
        fsync_folder(final.parent)
        shutil.rmtree(partial, ignore_errors=True)
        self._finished[step.id] = final
        self._damage.pop(step.id, None)
        return final

    def running(self, step: Step) -> dict[str, Any] | None:
        """Who holds the step's lease, if that runner is alive."""
        return self.holder(step.id)

    def holder(self, step_id: str) -> dict[str, Any] | None:
        """As `running`, of the step with that id; empty where a young lease does not say who."""
        lease = self._lease_of(step_id)
        return None if _stale(lease) else _read_lease(lease) or {}

    def _lease(self, step: Step) -> Path:
        return self._lease_of(step.id)

    def _lease_of(self, step_id: str) -> Path:
        return self.folder / ".leases" / f"{step_id}.json"

    def lease(self, step: Step) -> AbstractContextManager[bool]:
        """Hold the step while the block runs; gives False, and holds nothing, if a live runner has it."""
        return self.hold(step.id)

    @contextmanager
    def hold(self, step_id: str) -> Iterator[bool]:
        """As `lease`, of the step with that id."""
        path = self._lease_of(step_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _acquire(path):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_heartbeat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            path.unlink(missing_ok=True)


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
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the file is damaged: {reason(error)}", where=str(path), do=remove(path.parent)
        ) from error


def remove(folder: Path) -> str:
    """The advice that mends a finished step whose files are damaged."""
    return f"remove the folder {folder} and run the same command again"


def _damage(folder: Path) -> str | None:
    """How the files of a finished step differ from its record; a look at names and sizes only."""
    try:
        files = read_record(folder).get("files", {})
    except CheckpointError:
        return f"{RECORD} cannot be read"
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, its record says {size}"
    return None


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
    place = str(error.filename or path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullDiskError("no space left on the disk", where=place, do="free some and run the same command again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return CheckpointError("no permission to write", where=place, do="choose another --out folder")
    return CheckpointError(error.strerror or str(error), where=place)


def _acquire(path: Path) -> bool:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "at": time.time()}
    # Looking and taking are one act: of two that find a dead lease, the second must see the first one's new lease.
    with path.with_name(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _stale(path):
            return False
        write_json(path, owner)
        return True


def _heartbeat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def _read_lease(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _stale(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    owner = _read_lease(path)
    if owner is not None and owner.get("host") == socket.gethostname():
        return _born(int(owner.get("pid", -1))) != owner.get("born")
    return age > LEASE_EXPIRES_S


def _born(pid: int) -> float | None:
    """When a process of this host started; None if it is gone. A pid alone may have been given to another process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError):
        return None
