"""The runner: a ready queue over the plan.

Whatever is done is left alone; a step whose inputs are done is ready; ready steps of one group go to one process. A step
that fails stops only what depends on it. Nothing is remembered outside the store, so the same command carries on.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from mixmerge.errors import StepError, UserError
from mixmerge.plan.graph import KINDS, Plan, Step
from mixmerge.run.forks import ForkServer, usable
from mixmerge.run.local import Event, Worker, log_file, usable_threads, worker_environment
from mixmerge.run.progress import Progress
from mixmerge.run.servers import servers_of
from mixmerge.run.store import Store, named_os_error, read_json, write_json
from mixmerge.train.memory import memory_advice
from mixmerge.train.settings import Devices, settings_from

# Seconds of work that show whether base and recipe are sound: nothing else is started before they are done.
FIRST = ("base", "mixture")


@dataclass(slots=True)
class Outcome:
    """What a run came to: ids of steps done now, errors by id, and ids that could not start because of them.

    `ended`: nothing more is started, since the disk is full, or since the recipe has to change before the study can end.
    `lost`: servers that were of no use to a step, as in `servers_of`; no more of their steps are started. `short`: what steps
    lack by id, where a budget is spent.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    bug: bool = False
    ended: bool = False
    lost: set[str] = field(default_factory=set)
    short: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise a StepError if anything failed."""
        if self.failed:
            error = StepError(
                f"{len(self.failed)} step(s) failed, {len(self.blocked)} could not start, the rest is kept",
                do="mend the cause and run the same command again",
            )
            error.exit_code = 70 if self.bug else error.exit_code
            raise error


class Study:
    """The study's folder `<root>/runs/<name>`: its plan, logs, events, and links to results by name."""

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root / "runs" / name
        self.plan_file = self.folder / "plan.json"
        self.events = self.folder / "events.jsonl"
        self.report = self.folder / "report.html"

    def open(self, plan: Plan) -> None:
        """Make the folder and write the plan there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise named_os_error(error, self.folder) from error
        write_json(self.plan_file, plan.to_json())

    def log(self, step: Step) -> Path:
        return log_file(self.plan_file, step)

    def scores(self, plan: Plan, store: Store) -> dict[str, Any]:
        """The scores of the finished study.

        Raises:
            UserError: it is not finished.
        """
        for step in plan.steps:
            if step.kind in ("score", "report") and store.find(step.id) is None:
                damage = store.damage(step.id)
                what = "the study is not finished" if damage is None else f"{step.title} is damaged: {damage}"
                raise UserError(what, where=plan.study, do="mixmerge run RECIPE")
        score = next(step for step in plan.steps if step.kind == "score")
        return read_json(store.path(score.id) / "scores.json")

    def link(self, plan: Plan, store: Store) -> None:
        """Link every finished model by candidate name, and copy the report and its scores.csv beside them."""
        links = self.folder / "models"
        links.mkdir(parents=True, exist_ok=True)
        for old in links.iterdir():
            if old.is_symlink():
                old.unlink()
        for name, step_id in plan.models.items():
            if (target := store.find(step_id)) is not None:
                (links / name).symlink_to(target.resolve(), target_is_directory=True)
        step = next((step for step in plan.steps if step.kind == "report"), None)
        if step is not None and (report := store.find(step.id)) is not None:
            for name in ("scores.csv", self.report.name):
                scratch = self.folder / f".{name}"
                shutil.copyfile(report / name, scratch)
                scratch.replace(self.folder / name)


def run_plan(
    plan: Plan, root: Path, *, jobs: int, threads: int | None, progress: Progress, kinds: Collection[str] = KINDS
) -> Outcome:
    """Carry out every step of these kinds that is not done; returns what happened.

    Raises:
        KeyboardInterrupt: after the running processes were ended; what was finished is kept.
    """
    study, store = Study(root, plan.study), Store(root)
    study.open(plan)
    queue: Queue[Event] = Queue()
    outcome = Outcome()
    todo = {step.id: step for step in plan.steps if step.kind in kinds and store.find(step.id) is None}
    progress.begin(plan, [step for step in plan.steps if step.id not in todo])
    for step in todo.values():
        if (damage := store.damage(step.id)) is not None:
            progress.damaged(step, damage)
    workers: list[Worker] = []
    threads = threads or usable_threads(jobs)
    with _fork_server(threads, study.folder / "logs") as server, _ending(workers):
        running: set[str] = set()
        while todo or workers:
            while len(workers) < jobs and (batch := _next_batch(todo, running, outcome, jobs)):
                worker = Worker(
                    batch, root=root, plan_file=study.plan_file, threads=threads, events=queue, server=server()
                )
                workers.append(worker)
                running.update(step.id for step in batch)
            if not workers:
                break
            event: Event | None = queue.get()
            if event is not None and event["event"] == "exit":
                workers.remove(event["worker"])
                event = _silent_end(event["worker"], event["code"], running, store, ended=outcome.ended)
            if event is not None:
                _note(study.events, event)
                _take(event, plan, todo, running, outcome, progress)
    outcome.blocked = list(todo)
    store.refresh()
    for step in plan.steps:
        store.tidy(step)
    if not outcome.failed:
        shutil.rmtree(store.tokens, ignore_errors=True)
    study.link(plan, store)
    progress.end(outcome)
    return outcome


def _next_batch(todo: dict[str, Step], running: set[str], outcome: Outcome, jobs: int) -> Sequence[Step]:
    """The first ready step, by kind and plan order, with the ready steps of its group.

    Where one process runs at a time, groups of one family (the first word) go together: the libraries load only once.
    """
    if outcome.ended:
        return ()
    ready = [s for s in todo.values() if s.id not in running and not any(i in todo for i in s.inputs.values())]
    if any(s.kind in FIRST for s in todo.values()):
        ready = [s for s in ready if s.kind in FIRST]
    ready = [s for s in ready if not any(i in outcome.failed for i in s.inputs.values())]
    ready = [s for s in ready if not outcome.lost.intersection(servers_of(s))]
    if not ready:
        return ()
    first = min(ready, key=lambda step: KINDS.index(step.kind))
    groups = {step.id: step.group.partition(" ")[0] if jobs == 1 else step.group for step in ready}
    together = [s for s in ready if s is first or (first.group and groups[s.id] == groups[first.id])]
    # a process holds one large thing at a time (a model, a server): the steps that share it follow one another
    order = list(dict.fromkeys(s.group for s in together))
    return sorted(together, key=lambda step: order.index(step.group))


def _take(
    event: Event, plan: Plan, todo: dict[str, Step], running: set[str], outcome: Outcome, progress: Progress
) -> None:
    step = plan.by_id[event["step"]]
    if event["event"] == "done":
        todo.pop(step.id, None)
        running.discard(step.id)
        outcome.done.append(step.id)
    elif event["event"] == "failed":
        running.discard(step.id)
        event = _shared_failure(step, event, todo, outcome)
        _fail(step, str(event["error"]), todo, outcome)
        outcome.bug |= bool(event["bug"])
        outcome.ended |= step.kind in FIRST or bool(event.get("full"))
    elif event["event"] == "skipped":
        running.discard(step.id)
    progress.take(step, event)


def _shared_failure(step: Step, event: Event, todo: dict[str, Step], outcome: Outcome) -> Event:
    """Note what a failure means for other steps; the event, which says how many of them are left alone."""
    if "budget" in event:
        outcome.short[step.id] = dict(event["budget"])
    if (server := event.get("server")) is None:
        return event
    outcome.lost.add(server)
    others = sum(server in servers_of(other) for other in todo.values() if other is not step)
    left = f"; {others} more step(s) that ask this server are not tried in this run" if others else ""
    return {**event, "error": f"{event['error']}{left}"}


def _fail(step: Step, error: str, todo: dict[str, Step], outcome: Outcome) -> None:
    # What depends on a failed step stays in `todo` and is never ready: it is reported as blocked.
    outcome.failed[step.id] = error
    todo.pop(step.id, None)


def _silent_end(worker: Worker, code: int, running: set[str], store: Store, *, ended: bool) -> Event | None:
    """A process that ended without a word for some of its steps (killed, out of memory) failed the first of them.

    Where the run has ended, they were given up.
    """
    silent = [step for step in worker.steps if step.id in running]
    running.difference_update(step.id for step in silent)
    if not silent or ended:
        return None
    reason = f"its process was ended by signal {-code}" if code < 0 else f"its process exited with {code}"
    error = StepError(reason, do=was_there_memory(silent[0], store) if code == -signal.SIGKILL else None)
    return {"event": "failed", "step": silent[0].id, "error": str(error), "bug": code > 0}


def was_there_memory(step: Step, store: Store) -> str:
    """What to ask of a process that was killed: Linux does so to the one that holds most when memory runs out."""
    question = "was there memory enough?"
    model = store.find(step.inputs["model"]) if step.kind == "train" else None
    if model is None or step.what.get("engine") == "command":
        return question
    asked, devices = bool(step.how.get("gradient_checkpointing")), Devices.of(step.how)
    return f"{question} {memory_advice(model, settings_from(step.what), checkpointing=asked, devices=devices)}"


@contextmanager
def _fork_server(threads: int, logs: Path) -> Iterator[Callable[[], ForkServer | None]]:
    """Gives the server that processes come from, made when the first one is wanted; none where a fork is not safe."""
    made: list[ForkServer] = []

    def server() -> ForkServer | None:
        if not made and usable():
            logs.mkdir(parents=True, exist_ok=True)
            made.append(ForkServer(worker_environment(threads), logs / "fork-server.log"))
        return made[0] if made else None

    try:
        yield server
    finally:
        for one in made:
            one.close()


@contextmanager
def _ending(workers: list[Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()


def _note(path: Path, event: Event) -> None:
    if event["event"] != "progress":
        line = json.dumps({"at": round(time.time(), 3), **event}, ensure_ascii=False) + "\n"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise named_os_error(error, path) from error
