"""The event log of a study, `runs/<name>/events.jsonl`: what every run of it began, did and came to, a JSON object a line.

Lines are added and never changed. Each is written at once and whole; what a kill or a full disk has left of one is closed
with the next, so that only that line is none. Runs that work at once write to one log: `run` tells them apart.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from mixmerge.plan.graph import Plan
from mixmerge.run.backend import Event
from mixmerge.run.store import named_os_error


class Journal:
    """One run's way to write into the log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._run = f"{platform.node()}-{os.getpid()}-{uuid4().hex[:8]}"

    def note(self, event: Event, **more: Any) -> None:
        """Add what happened; how far a step is comes too often to be kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        if event["event"] == "progress":
            return
        told = {"at": round(time.time(), 3), "run": self._run, **event, **more}
        line = json.dumps(told, ensure_ascii=False, default=str) + "\n"
        try:
            add_line(self._path, line.encode("utf-8", errors="backslashreplace"))
        except OSError as error:
            raise named_os_error(error, self._path) from error

    @contextmanager
    def run(self, plan: Plan, *, left: int, came_to: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Note how a run began and, however it ends, what it came to."""
        argv = {"argv": plan.called.get("argv"), "folder": plan.called.get("folder")}
        place = {"host": platform.node(), "pid": os.getpid()}
        self.note({"event": "begin", "study": plan.study, **argv, **place, "steps": len(plan.steps), "left": left})
        began = time.monotonic()

        def end(outcome: str, **more: Any) -> None:
            took = round(time.monotonic() - began, 2)
            self.note({"event": "end", "outcome": outcome, "seconds": took, **came_to(), **more})

        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # the disk may be what ended it
                interrupted = isinstance(error, KeyboardInterrupt)
                end("interrupted" if interrupted else "error", error=f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        end("failed" if came_to()["failed"] else "done")


def add_line(path: Path, line: bytes) -> None:
    """Add a line to a file that others may add to as well; on a line of its own, whatever the last one was left as."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if _cut_short(file):
            line = b"\n" + line
        while line:
            line = line[os.write(file, line) :]
    finally:
        os.close(file)


def _cut_short(file: int) -> bool:
    """Whether a file ends in half a line; where that grows, somebody is writing it, since a file grows page by page."""
    before = 0
    while (size := os.fstat(file).st_size) and os.pread(file, 1, size - 1) != b"\n":
        if size == before:
            return True
        before = size
        time.sleep(0.01)
    return False
