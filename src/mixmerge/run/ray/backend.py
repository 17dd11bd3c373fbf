"""The Ray backend: a batch of steps is a task of Ray, and runs on whatever node has room for it.

Ray is asked for cores, GPUs and memory, and tells when a process or a node has died; the batch is started again then, with
the steps that are not done, a few times at most. A step that fails is not. Outputs, logs and leases are in the study's
folder, which all nodes see.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from mixmerge.amounts import in_bytes
from mixmerge.errors import UserError, reason
from mixmerge.plan.graph import Step
from mixmerge.run.backend import Event
from mixmerge.run.local import STOP_S, log_file
from mixmerge.run.ray.cluster import ALIKE, Cluster, Node, unlike
from mixmerge.run.ray.task import TRIES, Batch, Seen, carry_out, look
from mixmerge.run.resources import RUNNING, Demand, Resources, demand_of, demand_of_all, usual_jobs
from mixmerge.run.store import Store
from mixmerge.train.settings import Devices

LOOK_S = 5.0  # how often to look whether there is still a node for what waits for one
NODE_S = 600.0  # for a node to come that can take a batch, once there is none
ENDS = ("done", "failed", "skipped")


class Asked(NamedTuple):
    """What one node has to have for a batch: cores, GPUs, and memory in bytes."""

    cores: int
    gpus: int
    memory: int

    def fits(self, node: Node) -> bool:
        """Whether a node has it, when nothing else is at work there."""
        return node.cores >= self.cores and node.gpus >= self.gpus and node.memory >= self.memory

    def __str__(self) -> str:
        return f"{self.cores} core{'s' * (self.cores != 1)} and {in_bytes(self.memory)}"


NOTHING = Asked(0, 0, 0)


@dataclass(slots=True)
class Running:
    """A batch at work: its steps, what it takes, the ids of those that have not ended, and how often it was started.

    `least`: GPUs that one node has to have, of `nodes` nodes. `short`: since when there are no such. `asked`: what Ray was
    asked for last. `address`: of the node that it was begun on last.
    """

    steps: Sequence[Step]
    demand: Demand
    left: list[str] = field(default_factory=list)
    least: int = 0
    nodes: int = 1
    tries: int = 1
    short: float | None = None
    asked: Asked = NOTHING
    address: str | None = None

    @property
    def node(self) -> str:
        """Where it was, in words."""
        return "its node" if self.address is None else f"its node {self.address}"

    @property
    def spread(self) -> bool:
        """Whether it only starts other processes on the cluster, and takes nothing itself."""
        return any(map(spread, self.steps))

    def fits(self, nodes: Sequence[Node]) -> bool:
        """Whether there are nodes that have what was asked for."""
        if not self.spread:
            return any(map(self.asked.fits, nodes))
        processes = self.asked._replace(memory=0)  # they ask for none, only what starts them does
        return sum(map(processes.fits, nodes)) >= self.nodes and any(n.memory >= self.asked.memory for n in nodes)


class RayBackend:
    """Tasks on a Ray cluster: as many at once as its cores and GPUs allow, and no more than `jobs`.

    `threads` of each step, so many cores of a node; default: a node's cores shared out as on a machine alone.

    Raises:
        UserError: Ray is not installed; there is no cluster at that address.
    """

    def __init__(
        self, store: Store, plan_file: Path, *, address: str | None = None, jobs: int | None, threads: int | None
    ) -> None:
        plan_file = plan_file.absolute()  # Ray's processes work in other folders
        self.cluster = Cluster(address, plan_file.parent / "logs" / "ray.log")
        import ray

        self._ray = ray
        self._store, self._plan_file, self._jobs, self._asked_threads = store, plan_file, jobs, threads
        self._task = ray.remote(max_retries=0, num_returns="streaming")(carry_out)
        self._working: dict[Any, Running] = {}
        self._told: deque[Event] = deque()
        self._seen: Seen | None = None
        self._stopping = False
        self._looked = time.monotonic()
        self._known = self.cluster.nodes()
        if not self._known:
            self.close()
            raise UserError("no node of the Ray cluster has a core", where="--backend ray", do="start one with cores")

    def start(self, batch: Sequence[Step]) -> bool:
        if not self.room:
            return False
        if self._seen is None:
            self.cluster.check_sight(self._plan_file)
            self._seen = look(self._plan_file, 0.0)
        nodes = self._nodes()
        demand = demand_of_all(batch, lambda step: demand_of(step, self._store, _largest(nodes)))
        least, all_of_them = _of_all(batch[0], demand)
        gpus, waits = sum(node.gpus for node in nodes), batch[0].kind == "generate"
        asked = Devices.of(batch[0].how).nodes if spread(batch[0]) else 1
        if least > _most_gpus(nodes) or asked > len(nodes) or (all_of_them > gpus and not waits):
            what = f"it takes {least} GPUs, and no node of the cluster has more than {_most_gpus(nodes)}"
            if least <= _most_gpus(nodes):
                each, has = (f" with {least} GPUs", f" with {gpus} in all") if least else ("", "")
                what = f"it takes {asked} nodes{each}, and the cluster has {len(nodes)}{has}"
            error = f"{what}; lower how.{'processes' if asked == 1 else 'nodes or how.processes'}, or add a node"
            refused = {"event": "failed", "error": error, "bug": False, "silent": True}
            self._told += [refused | {"step": step.id} for step in batch]
            return True
        demand = demand._replace(gpus=min(all_of_them, gpus))
        if demand.gpus > gpus - sum(run.demand.gpus for run in self._working.values()):
            return False
        self._submit(Running(batch, demand, [step.id for step in batch], least, asked))
        return True

    def next(self) -> Event:
        while not self._told:
            ready, _ = self._ray.wait(list(self._working), num_returns=1, timeout=LOOK_S)
            for stream in ready:
                self._hear(stream)
            if time.monotonic() - self._looked > LOOK_S:
                self._miss_nodes()
                self._looked = time.monotonic()
        return self._told.popleft()

    @property
    def room(self) -> int:
        nodes = self._nodes()
        threads = self._threads(nodes)
        return (self._jobs or sum(max(1, node.cores // threads) for node in nodes)) - len(self._working)

    @property
    def busy(self) -> bool:
        return bool(self._working or self._told)

    def stop(self) -> None:
        """Have Ray end all tasks, and take in what they say until they have."""
        self._stopping = True
        if self.cluster.lost:  # Ray would wait for the head
            self._working.clear()
        for stream in self._working:
            self._ray.cancel(stream)
        end = time.monotonic() + 2 * STOP_S + 2
        while self._working and (left := end - time.monotonic()) > 0:
            ready, _ = self._ray.wait(list(self._working), num_returns=1, timeout=left)
            for stream in ready:
                self._hear(stream)
        self._working.clear()

    def kill(self) -> None:
        """Leave them to Ray, which ends what a process started that leaves the cluster; it stumbles when asked twice to cancel."""
        self._working.clear()

    def close(self) -> None:
        self.cluster.close()

    def _nodes(self) -> list[Node]:
        """The nodes of the cluster; where all are gone for the moment, those that there were."""
        self._known = self.cluster.nodes() or self._known
        return self._known

    def _threads(self, nodes: Sequence[Node]) -> int:
        most = max((node.cores for node in nodes), default=1)
        shares = (max(1, node.cores // usual_jobs(_resources(node))) for node in nodes)
        return min(self._asked_threads or min(shares, default=1), most)

    def _submit(self, run: Running) -> None:
        nodes = self._nodes()
        run.asked = ask(run, nodes, self._threads(nodes))
        assert self._seen is not None
        hide = not run.demand.gpus and any(node.gpus for node in nodes)
        place = self._store.root.absolute(), self._plan_file, self._seen
        batch = Batch(*place, run.left, run.asked.cores, hide, self.cluster.address)
        stream = self._task.options(
            num_cpus=0 if run.spread else run.asked.cores,
            num_gpus=0 if run.spread else run.demand.gpus,
            memory=run.asked.memory,
            scheduling_strategy="SPREAD",
            name=", ".join(step.title for step in run.steps[:3]),
        ).remote(batch)
        self._working[stream] = run

    def _hear(self, stream: Any) -> None:
        """Take in the next that a task says, or how it ended."""
        run, errors = self._working[stream], self._ray.exceptions
        try:
            event = self._ray.get(next(stream))
        except StopIteration:
            self._lose(stream, "its process ended without a word")
        except errors.TaskCancelledError:
            self._end(stream, -signal.SIGTERM)
        except errors.RayTaskError as error:
            self._end(stream, 1, f"its task failed on its node: {reason(error.cause)}", str(error))
        except errors.OutOfMemoryError as error:
            self._lose(stream, f"Ray ended its process, as {run.node} ran out of memory", str(error))
        except errors.NodeDiedError as error:
            self._lose(stream, f"{run.node} died", str(error))
        except errors.RayError as error:
            self._lose(stream, "its process died" + (f" on {run.node}" if run.address else ""), str(error))
        else:
            if event["event"] == "exit" and event["code"] < 0 and run.left:
                self._lose(stream, f"its process was ended by signal {-event['code']}", code=event["code"])
            elif event["event"] == "exit":
                self._end(stream, event["code"])
            elif event["event"] == "unlike":
                assert self._seen is not None
                why = unlike(Seen(*event["seen"]), self._seen, self._plan_file.parent)
                self._end(stream, 1, f"node {event['node']} {why}; {ALIKE}")
            else:
                run.address = event.get("address", run.address)
                if event["event"] in ENDS:
                    run.left = [step_id for step_id in run.left if step_id != event["step"]]
                self._told.append(event)

    def _lose(self, stream: Any, why: str, words: str = "", code: int = -signal.SIGKILL) -> None:
        """A process died: start what is left of its batch again, where it was not tried too often."""
        run = self._working[stream]
        if not run.left or self._stopping or run.tries == TRIES:
            self._end(stream, code, why + (f", {run.tries} times" if run.tries > 1 else ""), words)
            return
        del self._working[stream]
        run.tries, run.address = run.tries + 1, None
        self._log(run, f"{why}\n{words}")
        self._told.append(
            {"event": "note", "step": run.left[0], "text": f"{why}; tried again ({run.tries} of {TRIES})"}
        )
        self._submit(run)

    def _miss_nodes(self) -> None:
        """Say of a batch that waits for a node that is gone that it does; give it up after a while.

        One that would do with less is asked for anew.
        """
        nodes, now = self.cluster.nodes(), time.monotonic()
        for stream, run in list(self._working.items()):
            lost = missing(run, nodes)
            if lost is None or not run.left:
                run.short = None
                if run.left and (run.address is None or run.spread) and not run.fits(nodes):
                    self._ask_for_less(stream)
            elif run.short is None:
                run.short = now
                self._told.append({"event": "note", "step": run.left[0], "text": f"{lost}; waiting for one"})
            elif now - run.short > NODE_S:
                self._ray.cancel(stream, force=True)
                self._end(stream, 1, f"{lost}, for {NODE_S:.0f} s")

    def _ask_for_less(self, stream: Any) -> None:
        run = self._working.pop(stream)
        self._ray.cancel(stream, force=True)
        before, run.address = run.asked, None
        self._submit(run)
        which = "no node has" if run.nodes == 1 else f"no {run.nodes} nodes have"
        text = f"{which} the {before} any more that it was to have; started with {run.asked}"
        self._told.append({"event": "note", "step": run.left[0], "text": text})

    def _end(self, stream: Any, code: int, why: str | None = None, words: str = "") -> None:
        run = self._working.pop(stream)
        if why is not None and run.left:
            self._log(run, f"{why}\n{words}")
        self._told.append({"event": "exit", "steps": tuple(run.steps), "code": code, "why": why})

    def _log(self, run: Running, text: str) -> None:
        """What Ray says of a process, in the log of the step that it was at, without colours."""
        step = next(step for step in run.steps if step.id == run.left[0])
        with suppress(OSError):
            log = log_file(self._plan_file, step)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(Text.from_ansi(text).plain.rstrip() + "\n")


def spread(step: Step) -> bool:
    """Whether a step only starts others on the cluster, and takes nothing itself."""
    shared = step.kind == "generate" or (step.kind == "train" and step.what.get("engine") != "command")
    return shared and Devices.of(step.how).size > 1


def _of_all(step: Step, demand: Demand) -> tuple[int, int]:
    """The GPUs that a step takes of one node at least, and of all nodes together."""
    if step.kind == "generate" and spread(step):
        return min(demand.gpus, 1), demand.gpus
    return demand.gpus, demand.gpus * Devices.of(step.how).nodes


def ask(run: Running, nodes: Sequence[Node], threads: int) -> Asked:
    """What to ask Ray for, so that as many nodes as it takes have all of it; memory goes before cores, which only save time."""
    fit = [node for node in nodes if node.gpus >= run.least] or nodes
    if run.spread:
        cores = sorted((node.cores for node in fit), reverse=True)[: run.nodes][-1]
        return Asked(min(threads, cores), run.least, min(RUNNING, max(node.memory for node in nodes)))
    memory = min(run.demand.memory, max(node.memory for node in fit))
    return Asked(min(threads, max(node.cores for node in fit if node.memory >= memory)), run.least, memory)


def _resources(node: Node) -> Resources:
    return Resources(node.cores, node.memory, tuple(map(str, range(node.gpus))))


def missing(run: Running, nodes: Sequence[Node]) -> str | None:
    """What a batch at work has no node for any more, or None."""
    if not nodes:
        return "no node is left"
    having = f" with {run.least} GPU{'s' * (run.least > 1)}" * bool(run.least)
    left = sum(node.gpus >= run.least for node in nodes)
    if left >= run.nodes:
        return None
    return (
        f"the cluster has {left} of the {run.nodes} nodes{having} left that it takes"
        if run.nodes > 1
        else f"no node{having} is left"
    )


def _most_gpus(nodes: Sequence[Node]) -> int:
    return max((node.gpus for node in nodes), default=0)


def _largest(nodes: Sequence[Node]) -> Resources:
    """A machine that has as much of everything as any node has: what a step may take at most."""
    cores, memory = max(node.cores for node in nodes), max(node.memory for node in nodes)
    return Resources(cores, memory, tuple(map(str, range(_most_gpus(nodes)))))
