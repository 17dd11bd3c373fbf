"""What runs in a process of Ray, on any node: the worker process of a batch, and what it says, passed on as it comes.

Light to import: the node's process is Ray's, and the step's is its child, which ends when it does.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from queue import Empty, Queue
from typing import NamedTuple, TypeVar

from mixmerge.run.backend import Event
from mixmerge.run.forks import ForkServer, usable
from mixmerge.run.local import STOP_S, Worker, worker_environment
from mixmerge.run.plans import read_plan
from mixmerge.run.ray.address import for_a_step

Said = TypeVar("Said", bound=Event)
_servers: dict[str, ForkServer] = {}  # at most one: Ray's processes carry out one task after another

TRIES = 3  # of what dies with its process or its node
LISTEN_S = 0.2  # between chances to be cancelled
SIGHT_S = 10.0  # a network's file system may show a new file some seconds late


class Seen(NamedTuple):
    """What a node sees of the study: a digest of its plan (None: no such file), and which mixmerge it has."""

    digest: str | None
    version: str


class Batch(NamedTuple):
    """What a task has to do: the store's root, the plan's file and its digest, ids of steps, threads.

    `hide_gpus`: there are GPUs, and none is for this batch. `address`: of the cluster, for what the steps start there.
    """

    root: Path
    plan_file: Path
    seen: Seen
    ids: Sequence[str]
    threads: int
    hide_gpus: bool
    address: str


def look(file: Path, patience: float, wanted: str | None = None) -> Seen:
    """What this machine sees of a plan's file, once it is there (and has the digest `wanted`)."""
    from mixmerge import __version__

    until = time.monotonic() + patience
    while True:
        try:
            digest = _digest(file.read_bytes())
        except OSError:
            digest = None
        if (digest is not None and wanted in (None, digest)) or time.monotonic() > until:
            return Seen(digest, __version__)
        time.sleep(0.2)


def heed_cancelling() -> None:
    """Let Ray cancel what this process does: it interrupts Python, which is deaf where a shell began Ray in its background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def heard(events: Queue[Said]) -> Iterator[Said]:
    """What comes by a queue, `exit` at last; Ray can cancel only between two looks."""
    event: Said | None = None
    while event is None or event["event"] != "exit":
        with suppress(Empty):
            event = events.get(timeout=LISTEN_S)
            yield event


def _digest(data: bytes) -> str:
    """Of a plan, whoever wrote it: its study and its steps; two runners of one study say different things beside these."""
    with suppress(ValueError, KeyError, TypeError):
        plan = json.loads(data)
        data = json.dumps([plan["study"], sorted(step["id"] for step in plan["steps"])]).encode()
    return sha256(data).hexdigest()


def carry_out(batch: Batch) -> Iterator[Event]:
    """Carry out the steps in a process; gives its events, `exit` with its status at last; or `unlike`, where it cannot be.

    Cancelled, it ends the process.
    """
    import ray

    heed_cancelling()
    address = ray.util.get_node_ip_address()
    theirs = look(batch.plan_file, SIGHT_S, wanted=batch.seen.digest)
    if theirs != batch.seen:
        yield {"event": "unlike", "seen": tuple(theirs), "node": address}
        return
    node = {"node": ray.get_runtime_context().get_node_id(), "address": address}
    plan = read_plan(batch.plan_file)
    environment = for_a_step(worker_environment(batch.threads), batch.address)
    if batch.hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    events: Queue[Event] = Queue()
    worker = Worker(
        [plan.by_id[step_id] for step_id in batch.ids],
        root=batch.root,
        plan_file=batch.plan_file,
        environment=environment,
        events=events,
        server=_fork_server(environment, batch.plan_file),
    )
    try:
        for event in heard(events):
            if event["event"] == "exit":
                yield {"event": "exit", "code": event["code"]}
            else:
                yield {**event, **node} if event["event"] == "start" else event
    finally:
        worker.signal(signal.SIGTERM)
        if not worker.wait(STOP_S):
            worker.signal(signal.SIGKILL)
            worker.wait(STOP_S)


def _fork_server(environment: dict[str, str], plan_file: Path) -> ForkServer | None:
    """One that serves the tasks of this process, one after another, as long as their environment is the same."""
    key = repr(sorted(environment.items()))
    if key not in _servers and usable():
        for old in _servers.values():
            old.close()
        _servers.clear()
        _servers[key] = ForkServer(environment, plan_file.parent / "logs" / "fork-server.log")
    return _servers.get(key)
