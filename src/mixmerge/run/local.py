"""The local backend: one process per group of steps, its events read as they come, its output kept in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from mixmerge.events import read_events
from mixmerge.machine import usable_cores
from mixmerge.plan.graph import Step
from mixmerge.run.backend import Event
from mixmerge.run.forks import ForkServer, Request, usable
from mixmerge.run.resources import Pool, Resources, Share, demand_of, demand_of_all, free_here
from mixmerge.run.store import Store

STOP_S = 5.0
LOOK_S = 1.0


class Worker:
    """A running worker process; every event goes to `events`, at last `{"event": "exit", ...}`.

    Its standard input is a pipe that nothing is written to: it closes when this process is gone, however it went. The
    process comes from the fork server, where there is one.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        root: Path,
        plan_file: Path,
        environment: Mapping[str, str],
        events: Queue[Event],
        server: ForkServer | None = None,
    ) -> None:
        self.steps, self._events = tuple(steps), events
        log = log_file(plan_file, steps[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        argv = [str(root), str(plan_file), *[s.id for s in steps]]
        heard, told = os.pipe()
        self.process = (server and server.fork(Request(argv, list({s.kind for s in steps}), str(log), told))) or spawn(
            argv, log, told, environment
        )
        os.close(told)
        self._reader = threading.Thread(target=self._read, args=(heard,), daemon=True)
        self._reader.start()

    def _read(self, heard: int) -> None:
        with os.fdopen(heard, encoding="utf-8") as stream:
            for event in read_events(stream):
                self._events.put(event)
        code = self.process.wait()
        if isinstance(self.process, subprocess.Popen) and self.process.stdin is not None:
            self.process.stdin.close()
        self._events.put({"event": "exit", "steps": self.steps, "code": code, "worker": self})

    def has(self, step_id: str) -> bool:
        """Whether a step is one of its own."""
        return any(step.id == step_id for step in self.steps)

    def signal(self, number: int) -> None:
        """Send a signal to the process and everything it started."""
        if self._reader.is_alive():  # how a process ends is not known where the fork server is gone
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so long, with all that it said taken in."""
        self._reader.join(seconds)
        return not self._reader.is_alive()


class LocalBackend:
    """Processes on this machine: `jobs` at once at most, as many as its GPUs and memory hold."""

    def __init__(
        self, store: Store, plan_file: Path, *, jobs: int, threads: int | None, machine: Resources | None = None
    ) -> None:
        self._store, self._plan_file, self._jobs = store, plan_file, jobs
        self._threads = threads or usable_threads(jobs)
        self._pool = Pool(machine or free_here())
        self._events: Queue[Event] = Queue()
        self._working: dict[Worker, Share] = {}
        self._waiting: set[Worker] = set()  # for steps that other runners are at
        self._server: ForkServer | None = None

    def start(self, batch: Sequence[Step]) -> bool:
        if not self.room:
            return False
        share = self._pool.take(demand_of_all(batch, lambda step: demand_of(step, self._store, self._pool.machine)))
        if share is None:
            return False
        environment = worker_environment(self._threads) | (
            {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if self._pool.machine.gpus else {}
        )
        worker = Worker(
            batch,
            root=self._store.root,
            plan_file=self._plan_file,
            environment=environment,
            events=self._events,
            server=self._fork_server(),
        )
        self._working[worker] = share
        return True

    def next(self) -> Event:
        event = None
        while event is None:  # a signal that another thread took is heeded between two looks
            with suppress(Empty):
                event = self._events.get(timeout=LOOK_S)
        if event["event"] == "exit":
            self._waiting.discard(event["worker"])
            self._pool.give(self._working.pop(event["worker"]))
        else:
            worker = next(worker for worker in self._working if worker.has(event["step"]))
            (self._waiting.add if event["event"] == "waiting" else self._waiting.discard)(worker)
        return event

    @property
    def room(self) -> int:
        return self._jobs - len(self._working) + len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._working)

    def stop(self) -> None:
        for worker in self._working:
            worker.signal(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        if not all(worker.wait(max(0.0, end - time.monotonic())) for worker in self._working):
            self.kill()

    def kill(self) -> None:
        for worker in self._working:
            worker.signal(signal.SIGKILL)
        for worker in self._working:
            worker.wait(STOP_S)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _fork_server(self) -> ForkServer | None:
        """Made when the first process is wanted; none where a fork is not safe."""
        if self._server is None and not self._pool.machine.gpus and usable():
            log = self._plan_file.parent / "logs" / "fork-server.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            self._server = ForkServer(worker_environment(self._threads), log)
        return self._server


def spawn(argv: Sequence[str], log: Path, events: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A worker process from nothing; `events`: a descriptor for its events."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mixmerge.run.worker", *argv],
            stdin=subprocess.PIPE,
            stdout=events,
            stderr=stream,
            env=dict(environment),
            start_new_session=True,
        )


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a step: this one's, its threads bounded, and libraries that would call home told not to.

    glibc gives large arrays back to the kernel and gets them zeroed again: training spent a third of its time on that.
    """
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def log_file(plan_file: Path, step: Step) -> Path:
    """Where everything that a step's process prints goes."""
    return plan_file.parent / "logs" / f"{step.kind}-{step.name}.log"


def usable_threads(jobs: int = 1) -> int:
    """Threads for each of `jobs` steps: what OMP_NUM_THREADS says, else a share of the cores this process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return max(1, usable_cores() // jobs)
