"""Processes that this one starts, hears and ends: the events of all come by one queue, each with the rank that it is of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from mixmerge.events import read_events
from mixmerge.keeper import ends_with_us

GRACE_S = 5.0  # to end in good order
Event = dict[str, Any]


class Process:
    """A running process whose standard output is events; they go to `queue`, and at last its exit status.

    With a `rank` every event is of that; without one, those that it relays say it themselves, and its exit is of None.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], rank: int | None, queue: Queue[Event]
    ) -> None:
        self.rank, self._queue = rank, queue
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=ends_with_us(signal.SIGTERM),
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        # what a launcher says beside the events goes to the log
        for event in read_events(self.process.stdout, beside=sys.stderr.write):
            self._queue.put({"rank": self.rank, **event})
        self._queue.put({"rank": self.rank, "event": "exit", "status": self.process.wait()})

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


@contextmanager
def running(processes: Iterator[Process]) -> Iterator[None]:
    """Start them one by one; none is left when this is left, however that comes."""
    started: list[Process] = []
    try:
        started += processes
        yield
    finally:
        for process in started:
            process.stop()


def ranks(spec: Path, node: int, queue: Queue[Event]) -> Iterator[Process]:
    """The processes of a machine, which is number `node` of the training that `spec` tells of."""
    told = json.loads(spec.read_text(encoding="utf-8"))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(told["threads"]))
    if told["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux" and told["devices"]["nodes"] == 1:
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    own = told["devices"]["processes"]
    for rank in range(node * own, (node + 1) * own):
        yield Process([sys.executable, "-m", "mixmerge.train.rank", str(spec), str(rank)], environment, rank, queue)
