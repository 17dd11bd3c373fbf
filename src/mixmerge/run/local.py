"""The local backend: one process per group of steps, its events read as they come, its output kept in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

from mixmerge.events import read_events
from mixmerge.plan.graph import Step
from mixmerge.run.forks import ForkServer, Request

Event = Mapping[str, Any]


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
        threads: int,
        events: Queue[Event],
        server: ForkServer | None = None,
    ) -> None:
        self.steps, self._events = tuple(steps), events
        log = log_file(plan_file, steps[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        argv = [str(root), str(plan_file), *[s.id for s in steps]]
        heard, told = os.pipe()
        self.process = (server and server.fork(Request(argv, list({s.kind for s in steps}), str(log), told))) or spawn(
            argv, log, told, threads
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
        self._events.put({"event": "exit", "worker": self, "code": code})

    def stop(self) -> None:
        """End the process and everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self._reader.join()


def spawn(argv: Sequence[str], log: Path, events: int, threads: int) -> subprocess.Popen[bytes]:
    """A worker process from nothing; `events`: a descriptor for its events."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mixmerge.run.worker", *argv],
            stdin=subprocess.PIPE,
            stdout=events,
            stderr=stream,
            env=worker_environment(threads),
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)
