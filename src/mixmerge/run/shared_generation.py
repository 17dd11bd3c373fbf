"""A generation that several processes share, seen from the one that starts and hears them: here, or on a Ray cluster.

It holds no model itself. What they answer is on disk batch by batch, so that whatever ends one of them costs a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING

from mixmerge.errors import StepError, UserError, retold
from mixmerge.machine import named_gpus
from mixmerge.run.ray.address import ray_address
from mixmerge.run.runner import Study
from mixmerge.train.command import how_it_ended
from mixmerge.train.team import Event, Process, running

if TYPE_CHECKING:
    from mixmerge.run.steps import Measurements, StepContext


def generate_shared(context: StepContext, processes: int, prompts: int) -> Measurements:
    """Have so many processes answer the prompts of a generate step, and join what they wrote.

    Raises:
        UserError, StepError: as they raise in any of the processes; names the process.
    """
    from mixmerge.evaluate.shared import begin_shares, join_shares

    begin_shares(context.work)
    done = dict.fromkeys(range(processes), 0)
    ended: set[int] = set()
    address = ray_address()
    for event in _on_ray(context, processes, address) if address else _here(context, processes):
        rank = event["rank"]
        if event["event"] == "progress":
            done[rank] = event["done"]
            context.progress(sum(done.values()), prompts)
        elif event["event"] == "note":
            context.tell(event["text"])
        elif event["event"] == "done":
            ended.add(rank)
        elif event["event"] == "failed":
            raise retold(event, f"process {rank + 1} of {processes}")
        elif rank not in ended:
            what = f"it {how_it_ended(event['status'])} without a word"
            raise StepError(what, where=f"process {rank + 1} of {processes}", do="see the log")
    return join_shares(context.work, context.out / "responses.jsonl")


def command_of(context: StepContext, number: int, of: int) -> list[str]:
    """The command of a process that answers a part."""
    assert context.plan is not None
    root = context.store.root.absolute()
    place = [str(root), str(Study(root, context.plan.study).file_of(context.plan)), context.step.id]
    return [sys.executable, "-m", "mixmerge.run.share", *place, str(number), str(of)]


def _here(context: StepContext, processes: int) -> Iterator[Event]:
    devices = named_gpus() or []
    if 0 < len(devices) < processes and context.how["device"] != "cpu":
        what = f"{processes} processes, and {len(devices)} CUDA device(s) here"
        raise UserError(what, where="how.generate_processes", do="a process needs a device of its own")
    threads = str(max(1, context.threads // processes))
    queue: Queue[Event] = Queue()

    def started() -> Iterator[Process]:
        for number in range(processes):
            environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = devices[number] if context.how["device"] != "cpu" else ""
            yield Process(command_of(context, number, processes), environment, number, queue)

    left = processes
    with running(started()):
        while left:
            event = queue.get()
            left -= event["event"] == "exit"
            yield event


def _on_ray(context: StepContext, processes: int, address: str) -> Iterator[Event]:
    from mixmerge.run.ray.shares import shares

    commands = [command_of(context, number, processes) for number in range(processes)]
    return shares(commands, address, threads=context.threads, gpu=context.how["device"] != "cpu")
