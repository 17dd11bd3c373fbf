"""Training in several processes, a device each, on one machine or several: they learn what one learns, up to rounding.

One idea: a step reads the same rows however many processes share it, and its loss is a mean over all of them; so how many
there are is no part of what was trained. This process trains nothing: it starts them (on several machines, it has the
launcher do so), hears them, and when one dies ends the others and says which it was and why. Light to import: the processes
bring torch.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple
from uuid import uuid4

from mixmerge.errors import MixmergeError, StepError, UserError, retold
from mixmerge.train.command import how_it_ended
from mixmerge.train.memory import memory_advice
from mixmerge.train.settings import Devices, settings_from
from mixmerge.train.team import GRACE_S, Event, Process, ranks, running

MEETING = "meeting-"
BEAT_S = 5.0  # how often machines are told that they are heard
PRINTED = "printed-"
PRINT_S = 1.0  # how often to look for what was printed
COME_S = 300.0  # for all machines to come, once one has
MIXED = ("aot", "aot_unpaired")  # losses that compare the pairs of a part with each other


class Starter(NamedTuple):
    """A command that starts the processes in the place of this one; `name` and `key` (of the recipe) are for errors.

    The file that tells of the training is appended. It writes the events of the processes, each with its `rank`, and their
    exits. Where they cannot print to its standard error, they print to files of the meeting folder, PRINTED*.
    """

    name: str
    command: Sequence[str]
    key: str | None = None


class KilledError(StepError):
    """A signal ended what starts the processes."""


def shares_refused(what: Mapping[str, Any], devices: Devices) -> str | None:
    """Why a training with this `what` cannot be shared among so many processes, or None."""
    settings = settings_from(what)
    parts = settings.gradient_accumulation
    if settings.batch_size % (devices.size * parts):
        among = f"{devices.size} processes" + (f" in {parts} parts" if parts > 1 else "")
        return f"batch_size {settings.batch_size} does not divide among {among}"
    if getattr(settings, "loss", None) in MIXED:
        return f"loss {what['loss']} compares all pairs of a batch with each other, which processes cannot share"
    if devices.fsdp and settings.adapter is not None and settings.adapter.type == "qlora":
        return "qlora holds weights in 4 bits, which how.fsdp cannot share out"
    return None


def train_together(
    given: Devices,
    what: Mapping[str, Any],
    model: Path,
    mixture: Path,
    out: Path,
    *,
    work: Path,
    threads: int,
    device: str,
    launcher: str = "",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    starter: Starter | None = None,
    tell: Callable[[str], None] | None = None,
    **place: Any,
) -> dict[str, Any]:
    """Train as `train_sft` or `train_dpo` does, which `what` tells, in the processes of `given`.

    Those of a machine share `threads`. `launcher` is a command that runs what follows it once on each of the machines, all
    of which see the folders; with one machine it is not used. A `starter` starts them another way, and `tell` hears what it has
    to say besides. `place` holds what else the methods take. Killed at any moment and called again, it carries on from the
    last whole checkpoint, also with another number of processes.

    Raises:
        UserError, ModelError, DataError, StepError: as they raise in any of the processes.
        UserError: there is no such launcher.
        KilledError: the launcher or the starter was ended by a signal.
        StepError: a process, the launcher or the starter ended without a word, or with a bug; names it and its last error.
    """
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(f"{MEETING}*"):  # machines that a kill has left alone see by it that they are
        shutil.rmtree(left)
    meeting = work / f"{MEETING}{uuid4().hex[:8]}"
    meeting.mkdir()
    folders = {"model": model, "mixture": mixture, "out": out, "work": work, "meeting": meeting, "cache": cache}
    told = {
        **{name: None if folder is None else str(folder.absolute()) for name, folder in folders.items()},
        "devices": asdict(given),
        "what": dict(what),
        "device": device,
        "place": place,
        "cores": threads,
        "threads": max(1, threads // given.processes),
    }
    spec = meeting.absolute() / "spec.json"
    spec.write_text(json.dumps(told), encoding="utf-8")
    queue: Queue[Event] = Queue()
    watch, printed = _Watch(given if starter is None else Devices(), spec), _Printed(meeting)
    if starter is None and given.nodes > 1:
        command = [*shlex.split(launcher), sys.executable, "-m", "mixmerge.train.node"]
        starter = Starter("the launcher", command, "how.launcher")

    def look() -> None:
        watch.look()
        printed.look()

    try:
        with running(ranks(spec, 0, queue) if starter is None else _started(starter, spec, queue)):
            try:
                return _hear(given.size, starter, queue, progress, tell, look)
            finally:
                spec.unlink(missing_ok=True)  # by it machines see that it is over, whatever becomes of their launcher
    except _DeathError as death:
        who = starter.name if starter is not None and death.told["rank"] is None else None
        raise _named(death.told, who, model, what, bool(place.get("gradient_checkpointing")), given) from None
    finally:
        printed.bring()
        shutil.rmtree(meeting, ignore_errors=True)


class _DeathError(Exception):
    """How a process failed: what it said, or else the status that it ended with."""

    def __init__(self, told: Event) -> None:
        self.told = told


def _started(starter: Starter, spec: Path, queue: Queue[Event]) -> Iterator[Process]:
    try:
        yield Process([*starter.command, str(spec)], {}, None, queue)
    except OSError as error:
        if starter.key is None:
            raise
        what = f"'{starter.command[0]}' cannot be started: {error.strerror}"
        raise UserError(what, where=starter.key, do="give a command that runs another on each machine") from error


class _Watch:
    """Touches a file, by which machines know that they are heard, and misses those that do not come once one has."""

    def __init__(self, given: Devices, spec: Path) -> None:
        self.nodes, self.spec = given.nodes, spec
        self.last = time.monotonic()
        self.since: float | None = None

    def look(self) -> None:
        """To be called often; does something every few seconds."""
        now = time.monotonic()
        if now - self.last < BEAT_S or self.nodes == 1:
            return
        self.last = now
        self.spec.touch()
        come = len(list(self.spec.parent.glob("node-*")))
        self.since = self.since or (now if come else None)
        if come < self.nodes and self.since is not None and now - self.since > COME_S:
            what = f"{come} of {self.nodes} machines have come within {COME_S:.0f} s of each other"
            raise StepError(what, where="how.launcher", do="have it run the command that follows it once on each")


class _Printed:
    """Brings to this process's log what others print to files of the meeting folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.read, self.last = folder, dict[Path, int](), time.monotonic()

    def look(self) -> None:
        """To be called often; does something every second."""
        if time.monotonic() - self.last > PRINT_S:
            self.bring()

    def bring(self) -> None:
        """Bring what is there and was not there the last time."""
        self.last = time.monotonic()
        for file in sorted(self.folder.glob(f"{PRINTED}*")):
            with suppress(OSError), file.open("rb") as stream:
                stream.seek(self.read.get(file, 0))
                sys.stderr.write(stream.read().decode(errors="replace"))
                self.read[file] = stream.tell()
                sys.stderr.flush()


def _hear(
    size: int,
    starter: Starter | None,
    queue: Queue[Event],
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None] | None,
    look: Callable[[], None],
) -> dict[str, Any]:
    """What the first process measured, once all have ended well; _DeathError with the cause where one has not."""
    measured: dict[str, Any] | None = None
    alive: set[int | None] = {*range(size), *([] if starter is None else [None])}  # None is the starter
    silent = set(alive)
    lost: _DeathError | None = None
    until: float | None = None
    while alive:
        look()
        try:
            told = queue.get(timeout=BEAT_S if until is None else max(0.0, until - time.monotonic()))
        except Empty:
            if until is None:
                continue
            break
        rank = told["rank"]
        if told["event"] == "progress":
            if progress is not None:
                progress(told["done"], told["total"])
        elif told["event"] == "note":
            if tell is not None:
                tell(told["text"])
        elif told["event"] == "done":
            silent.discard(rank)
            measured = told["measured"] if rank == 0 else measured
        elif told["event"] == "failed":
            silent.discard(rank)
            if not told["lost"]:
                raise _DeathError(told)
            lost, until = lost or _DeathError(told), until or time.monotonic() + GRACE_S
        else:
            alive.discard(rank)
            if rank in silent and (alive or rank is not None):
                raise _DeathError(told)
            if alive == {None}:  # it may take a moment to see that it has nothing to do
                until = time.monotonic() + GRACE_S
    if lost is not None:
        raise lost
    assert measured is not None
    return measured


def _named(
    told: Event, starter: str | None, model: Path, what: Mapping[str, Any], checkpointing: bool, devices: Devices
) -> MixmergeError:
    """The error to tell: that of the process, where a person can mend it, else one that names the process."""
    who = starter or f"training process {told['rank']} of {devices.size}"
    if told["event"] == "failed":
        return retold(told, who)
    status = told["status"]
    if status == -signal.SIGKILL and told["rank"] is not None:
        advice = memory_advice(model, settings_from(what), checkpointing=checkpointing, devices=devices)
        return StepError("it was ended by SIGKILL", where=who, do=f"was there memory enough? {advice}")
    kind = KilledError if status < 0 and told["rank"] is None else StepError
    return kind(f"it {how_it_ended(status)} without a word", where=who, do="see the log")
