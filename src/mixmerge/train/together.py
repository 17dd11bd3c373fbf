"""Training in several processes of one machine, a device each (DDP): they learn what one process learns, up to rounding.

One idea: a step reads the same rows however many processes share it, and its loss is a mean over all of them; so how many
there are is no part of what was trained. This process trains nothing: it starts them, hears them, and when one dies ends
the others and says which it was and why. Light to import: the processes bring torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from mixmerge import errors
from mixmerge.errors import MixmergeError, StepError
from mixmerge.events import read_events
from mixmerge.train.command import end_with_parent, how_it_ended
from mixmerge.train.memory import memory_advice
from mixmerge.train.settings import settings_from

GRACE_S = 5.0  # for the cause to be heard of: the others notice that a process is gone as soon as we do
MIXED = ("aot", "aot_unpaired")  # losses that compare the pairs of a part with each other


def shares_refused(what: Mapping[str, Any], processes: int) -> str | None:
    """Why a training with this `what` cannot be shared among so many processes, or None."""
    settings = settings_from(what)
    parts = settings.gradient_accumulation
    if settings.batch_size % (processes * parts):
        among = f"{processes} processes" + (f" in {parts} parts" if parts > 1 else "")
        return f"batch_size {settings.batch_size} does not divide among {among}"
    if getattr(settings, "loss", None) in MIXED:
        return f"loss {what['loss']} compares all pairs of a batch with each other, which processes cannot share"
    if settings.adapter is not None and settings.adapter.type == "qlora":
        return "qlora trains in one process"
    return None


def train_together(
    processes: int,
    what: Mapping[str, Any],
    model: Path,
    mixture: Path,
    out: Path,
    *,
    work: Path,
    threads: int,
    device: str,
    progress: Callable[[int, int], None] | None = None,
    **place: Any,
) -> dict[str, Any]:
    """Train as `train_sft` or `train_dpo` does, which `what` tells, in `processes` processes that share `threads`.

    `place` holds what else these take. Killed at any moment and called again, it carries on from the last whole checkpoint,
    also with another number of processes.

    Raises:
        UserError, ModelError, DataError, StepError: as they raise in any of the processes.
        StepError: a process ended without a word, or with a bug; names it and its last error.
    """
    work.mkdir(parents=True, exist_ok=True)
    meeting, spec = work / "meeting", work / "processes.json"
    meeting.unlink(missing_ok=True)
    folders = {"model": model, "mixture": mixture, "out": out, "work": work, "meeting": meeting}
    told = {name: str(folder.absolute()) for name, folder in folders.items()}
    own = max(1, threads // processes)
    rest = {"processes": processes, "what": dict(what), "threads": own, "device": device, "place": place}
    spec.write_text(json.dumps(told | rest), encoding="utf-8")
    team: list[_Process] = []
    queue: Queue[tuple[int, dict[str, Any]]] = Queue()
    try:
        team += (_Process(spec, rank, own, queue) for rank in range(processes))
        return _hear(team, queue, progress)
    except _DeathError as death:
        raise _named(death, model, what, bool(place.get("gradient_checkpointing")), processes) from None
    finally:
        for member in team:
            member.stop()
        meeting.unlink(missing_ok=True)


class _DeathError(Exception):
    """How a process failed: what it said, or else the status that it ended with."""

    def __init__(self, rank: int, told: Mapping[str, Any]) -> None:
        self.rank, self.told = rank, told


class _Process:
    """A running process of the group; its events and, at last, its exit status go to a queue."""

    def __init__(self, spec: Path, rank: int, threads: int, queue: Queue[tuple[int, dict[str, Any]]]) -> None:
        self.rank = rank
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mixmerge.train.rank", str(spec), str(rank)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent,
            text=True,
            encoding="utf-8",
        )
        self._reader = Thread(target=self._read, args=(queue,), daemon=True)
        self._reader.start()

    def _read(self, queue: Queue[tuple[int, dict[str, Any]]]) -> None:
        assert self.process.stdout is not None
        for event in read_events(self.process.stdout):
            queue.put((self.rank, event))
        queue.put((self.rank, {"event": "exit", "status": self.process.wait()}))

    def stop(self) -> None:
        """End the process, if it has not ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _hear(
    team: list[_Process], queue: Queue[tuple[int, dict[str, Any]]], progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """What the first process measured, once all have ended well; _DeathError with the cause where one has not."""
    measured: dict[str, Any] | None = None
    running, silent = {member.rank for member in team}, {member.rank for member in team}
    lost: _DeathError | None = None
    until: float | None = None
    while running:
        try:
            rank, told = queue.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except Empty:
            break
        if told["event"] == "progress":
            if progress is not None:
                progress(told["done"], told["total"])
        elif told["event"] == "done":
            silent.discard(rank)
            measured = told["measured"] if rank == 0 else measured
        elif told["event"] == "failed":
            silent.discard(rank)
            if not told["lost"]:
                raise _DeathError(rank, told)
            lost, until = lost or _DeathError(rank, told), until or time.monotonic() + GRACE_S
        else:
            running.discard(rank)
            if rank in silent:
                raise _DeathError(rank, told)
    if lost is not None:
        raise lost
    assert measured is not None
    return measured


def _named(
    death: _DeathError, model: Path, what: Mapping[str, Any], checkpointing: bool, processes: int
) -> MixmergeError:
    """The error to tell: that of the process, where a person can mend it, else one that names the process."""
    told, where = death.told, f"training process {death.rank} of {processes}"
    if told["event"] == "failed":
        if told["kind"] is None:
            return StepError(told["what"], where=where, do="see the log")
        kind: type[MixmergeError] = getattr(errors, told["kind"])
        error = kind(told["what"], where=told["where"], do=told["do"])
        return error.within(where) if isinstance(error, StepError) else error
    status = told["status"]
    if status == -signal.SIGKILL:
        advice = memory_advice(model, settings_from(what), checkpointing=checkpointing, processes=processes)
        return StepError("it was ended by SIGKILL", where=where, do=f"was there memory enough? {advice}")
    return StepError(f"it {how_it_ended(status)} without a word", where=where, do="see the log")
