"""Processes that share a generation as tasks of Ray, one each; one that dies is started again, a few times at most."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from queue import Queue
from typing import Any

from mixmerge.run.local import worker_environment
from mixmerge.run.ray.address import joined
from mixmerge.run.ray.task import TRIES, heard, heed_cancelling
from mixmerge.train.team import Event, Process


def shares(commands: Sequence[Sequence[str]], address: str, *, threads: int, gpu: bool) -> Iterator[Event]:
    """Run the commands on the cluster; gives their events, each with the number of its command, and `exit` at last."""
    with joined(address) as ray:
        gpus = int(gpu and ray.cluster_resources().get("GPU", 0) >= 1)
        task = ray.remote(max_retries=0, num_returns="streaming")(run_share).options(
            num_cpus=threads, num_gpus=gpus, scheduling_strategy="SPREAD"
        )
        working: dict[Any, tuple[int, int]] = {}
        for number, command in enumerate(commands):
            working[task.remote(command, number, threads, not gpus)] = number, 1
        while working:
            ready, _ = ray.wait(list(working), num_returns=1)
            number, tries = working[ready[0]]
            try:
                event: Event = ray.get(next(ready[0]))
            except StopIteration:
                del working[ready[0]]
                continue
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:
                event = {"rank": number, "event": "exit", "status": -signal.SIGKILL}
            if event["event"] != "exit" or event["status"] >= 0 or tries == TRIES:
                yield event
            else:
                again = f"process {number + 1} of {len(commands)} died; tried again ({tries + 1} of {TRIES})"
                yield {"rank": number, "event": "note", "text": again}
                working[task.remote(commands[number], number, threads, not gpus)] = number, tries + 1
            if event["event"] == "exit":
                del working[ready[0]]


def run_share(command: Sequence[str], number: int, threads: int, hide_gpus: bool) -> Iterator[Event]:
    """In a process of Ray: the command, and what it says."""
    heed_cancelling()
    environment = worker_environment(threads) | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})
    queue: Queue[Event] = Queue()
    process = Process(command, environment, number, queue)
    try:
        yield from heard(queue)
    finally:
        process.stop()
