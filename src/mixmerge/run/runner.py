"""The runner: a ready queue over the plan.

Whatever is done is left alone; a step whose inputs are done is ready; ready steps of one group go to one process. A step
that fails stops only what depends on it. Nothing is remembered outside the store, so the same command carries on.
"""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from mixmerge.errors import StepError, UserError
from mixmerge.plan.graph import KINDS, Plan, Step
from mixmerge.run.backend import Backend, Event
from mixmerge.run.expected import expected_seconds, length_by
from mixmerge.run.journal import Journal, add_line
from mixmerge.run.local import LocalBackend, log_file
from mixmerge.run.plans import PLAN, PLANS, name_of
from mixmerge.run.progress import Progress
from mixmerge.run.provenance import invocation
from mixmerge.run.resources import free_here, jobs_at_once, usual_jobs
from mixmerge.run.schedule import Schedule, chosen
from mixmerge.run.store import SCRATCH, Store, named_os_error, read_json, write_json
from mixmerge.train.memory import memory_advice
from mixmerge.train.settings import Devices, settings_from


@dataclass(slots=True)
class Outcome:
    """What a run came to: ids of steps done now, errors by id, and ids that could not start because of them.

    `by_others`: those of the steps done that another runner made meanwhile, or an earlier one had.

    `ended`: nothing more was started, since the disk is full (`full`), or since the recipe has to change first.
    `short`: what steps lack by id, where a budget is spent.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    bug: bool = False
    by_others: list[str] = field(default_factory=list)
    ended: bool = False
    full: bool = False
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
        self.name = name
        self.folder = root / "runs" / name
        self.plan_file = self.folder / PLAN
        self.events = self.folder / "events.jsonl"
        self.report = self.folder / "report.html"

    def file_of(self, plan: Plan) -> Path:
        """The file that processes read the plan from: a run with other settings beside this one has another."""
        return self.folder / name_of(plan)

    def open(self, plan: Plan) -> Plan:
        """Make the folder and write the plan there; gives the plan with how this process was called."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise named_os_error(error, self.folder) from error
        plan = replace(plan, called=invocation(plan.called.get("recipe", "")))
        for file in (self.plan_file, self.file_of(plan)):
            write_json(file, plan.to_json())
        return plan

    def tidy(self, store: Store) -> None:
        """Remove the files that processes read plans from, and half links, where no other run of this study has some; ours is held."""
        hidden = [*self.folder.glob(".*"), *self.folder.glob("models/.*")]
        old = [file for file in hidden if file.match(PLANS) or SCRATCH.fullmatch(file.name)]
        if len(store.runs(self.name)) == 1:
            for file in old:
                file.unlink(missing_ok=True)

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
        """Link every finished model by candidate name, and copy the report and its scores.csv beside them.

        Two runners may do so at once. A folder that is only read stays as it is.
        """
        try:
            self._link(plan, store)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise named_os_error(error, self.folder) from error

    def _link(self, plan: Plan, store: Store) -> None:
        links = self.folder / "models"
        links.mkdir(parents=True, exist_ok=True)
        found = {name: target for name, step_id in plan.models.items() if (target := store.find(step_id)) is not None}
        for old in links.iterdir():
            if old.is_symlink() and old.name not in found and not SCRATCH.fullmatch(old.name):  # of another runner
                old.unlink(missing_ok=True)
        for name, target in found.items():
            scratch = links / _scratch(name)
            scratch.symlink_to(target.resolve(), target_is_directory=True)
            scratch.replace(links / name)
        step = next((step for step in plan.steps if step.kind == "report"), None)
        if step is not None and (report := store.find(step.id)) is not None:
            for name in ("scores.csv", self.report.name):
                scratch = self.folder / _scratch(name)
                shutil.copyfile(report / name, scratch)
                scratch.replace(self.folder / name)


def _scratch(name: str) -> str:
    """What a file is called that becomes `name` when it is whole; two runners have two."""
    return f".{name}.{uuid4().hex[:8]}"


def run_plan(
    plan: Plan,
    root: Path,
    *,
    jobs: int | None,
    threads: int | None,
    progress: Progress,
    kinds: Collection[str] = KINDS,
    only: Sequence[str] = (),
    keep_going: bool = False,
    backend: Backend | None = None,
) -> Outcome:
    """Carry out every step of these kinds that is not done; returns what happened.

    `only`: patterns of `kind/name`; just these steps and what they need. `keep_going`: also past a base or a mixture for
    which the recipe has to change. `jobs`: processes at once at most; None: two for each GPU, else one.

    Raises:
        UserError: a pattern that no step has.
        KeyboardInterrupt: after the running processes were ended; what was finished is kept.
    """
    wanted = chosen(plan, only) if only else plan.by_id.keys()
    study, store = Study(root, plan.study), Store(root)
    study.open(plan)  # before the lease: a removal that sees that looks here for the steps which it has to keep
    with store.at_work(plan.study, progress.removal):
        plan = study.open(plan)  # and again: another run that ended meanwhile may have tidied
        outcome = Outcome()
        asked = [step for step in plan.steps if step.id in wanted]
        todo = [step for step in asked if step.kind in kinds and store.find(step.id) is None]
        here = free_here()
        jobs = jobs_at_once(jobs, here) if backend is None else jobs or usual_jobs(here)
        seconds = expected_seconds(plan, todo, store)
        progress.begin(plan.study, total=len(asked), todo=todo, seconds=seconds, jobs=jobs)
        for step in todo:
            if (damage := store.damage(step.id)) is not None:
                progress.damaged(step, damage)
        families, length = jobs == 1 and backend is None, length_by(seconds, todo)
        schedule = Schedule(plan, todo, families=families, keep_going=keep_going, length=length)
        backend = backend or LocalBackend(store, study.file_of(plan), jobs=jobs, threads=threads, machine=here)
        _carry_out(plan, schedule, backend, study, store, outcome, progress)
        outcome.blocked, outcome.ended = schedule.blocked, schedule.ended
        store.refresh()
        for step in plan.steps:
            store.tidy(step)
        store.leases.sweep()
        store.sweep()
        if not outcome.failed:
            shutil.rmtree(store.tokens, ignore_errors=True)
        study.link(plan, store)
        study.tidy(store)
    progress.end(outcome)
    return outcome


def run_step(plan: Plan, step: Step, root: Path, *, threads: int | None, progress: Progress) -> Outcome:
    """Carry out one step whose inputs are done, as another launcher asks for it; nothing where it is done.

    Raises:
        UserError: an input is not done.
    """
    study, store = Study(root, plan.study), Store(root)
    for wanted in step.inputs.values():
        if store.find(wanted) is None:
            needed = plan.by_id[wanted].title
            what = f"it needs {needed}, which is {'damaged' if store.damage(wanted) else 'not done'}"
            raise UserError(what, where=step.title, do=f"carry out {needed} first")
    study.open(plan)
    with store.at_work(plan.study, progress.removal):
        plan = study.open(plan)
        outcome = Outcome()
        todo = [step] if store.find(step.id) is None else []
        progress.begin(plan.study, total=1, todo=todo, seconds=expected_seconds(plan, todo, store))
        backend = LocalBackend(store, study.file_of(plan), jobs=1, threads=threads)
        _carry_out(plan, Schedule(plan, todo), backend, study, store, outcome, progress)
        store.refresh()
        study.link(plan, store)
        study.tidy(store)
    progress.end(outcome)
    return outcome


def _carry_out(
    plan: Plan,
    schedule: Schedule,
    backend: Backend,
    study: Study,
    store: Store,
    outcome: Outcome,
    progress: Progress,
) -> None:
    journal = Journal(study.events)

    def came_to() -> dict[str, Any]:
        made = len(outcome.done) - len(outcome.by_others)
        return {
            "done": made,
            "by_others": len(outcome.by_others),
            "failed": [*outcome.failed],
            "left": len(schedule.todo),
        }

    with journal.run(plan, left=len(schedule.todo), came_to=came_to), _ending(backend, progress):
        for event in drive(schedule, backend, store):
            step = schedule.steps[event["step"]]
            journal.note(event, title=step.title)
            if event.get("silent"):
                _say_in(study.log(step), str(event["error"]))
            _take(event, step, outcome, progress)


def drive(schedule: Schedule, backend: Backend, store: Store | None = None) -> Iterator[Event]:
    """Keep a backend at work until the schedule has nothing more for it; gives every event that is about a step."""
    changed = True
    while True:
        for batch in _free_first(schedule.ready(backend.room), store) if changed else ():
            if backend.start(batch):
                schedule.start(batch)
        if not backend.busy:
            return
        event = backend.next()
        changed = event["event"] in ("exit", "done", "skipped", "failed", "waiting")
        if event["event"] == "exit":
            silent = [step for step in event["steps"] if step.id in schedule.running]
            schedule.let_go(silent)
            # given up where the run has ended
            if not silent or schedule.ended:
                continue
            event = _silent_end(silent[0], event["code"], store, event.get("why"))
        if event["event"] == "done":
            schedule.done(schedule.steps[event["step"]])
        elif event["event"] == "skipped":
            schedule.let_go([schedule.steps[event["step"]]])
        elif event["event"] == "failed":
            if (server := event.get("server")) is not None:
                event = {**event, "error": f"{event['error']}{_left_alone(schedule.lose(server, event['step']))}"}
            step = schedule.steps[event["step"]]
            schedule.fail(step, end=bool(event.get("full")), recipe=bool(event.get("recipe")))
        yield event


def _free_first(batches: Sequence[Sequence[Step]], store: Store | None) -> Sequence[Sequence[Step]]:
    """The batches, first those that an earlier run began, at last those that other runners are at."""
    if store is None or not batches:
        return batches
    begun = store.begun()
    held = {name for name in store.leases.names() if name not in begun or store.leases.holder(name) is not None}
    return sorted(
        batches, key=lambda batch: (held.issuperset(s.id for s in batch), begun.isdisjoint(s.id for s in batch))
    )


def _take(event: Event, step: Step, outcome: Outcome, progress: Progress) -> None:
    if event["event"] == "done":
        outcome.done.append(event["step"])
        if "by" in event:
            outcome.by_others.append(event["step"])
    elif event["event"] == "failed":
        outcome.failed[event["step"]] = str(event["error"])
        outcome.bug |= bool(event["bug"])
        outcome.full |= bool(event.get("full"))
        if "budget" in event:
            outcome.short[event["step"]] = dict(event["budget"])
    progress.take(step, event)


def _left_alone(others: int) -> str:
    return f"; {others} more step(s) that ask this server are not tried in this run" if others else ""


def _silent_end(step: Step, code: int, store: Store | None, why: str | None = None) -> Event:
    """A process that ended without a word for some of its steps (killed, out of memory) failed the first of them."""
    reason = f"its process was ended by signal {-code}" if code < 0 else f"its process exited with {code}"
    error = StepError(why or reason, do=was_there_memory(step, store) if code == -signal.SIGKILL and store else None)
    return {"event": "failed", "step": step.id, "error": str(error), "bug": code > 0 and why is None, "silent": True}


def _say_in(log: Path, error: str) -> None:
    """Let a log end with what its process could not say itself, and when that was."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):  # the failure is told elsewhere too
        log.parent.mkdir(parents=True, exist_ok=True)
        add_line(log, f"{now} mixmerge: {error}\n".encode(errors="backslashreplace"))


def was_there_memory(step: Step, store: Store) -> str:
    """What to ask of a process that was killed: Linux does so to the one that holds most when memory runs out."""
    question = "was there memory enough?"
    model = store.find(step.inputs["model"]) if step.kind == "train" else None
    if model is None or step.what.get("engine") == "command":
        return question
    asked, devices = bool(step.how.get("gradient_checkpointing")), Devices.of(step.how)
    return f"{question} {memory_advice(model, settings_from(step.what), checkpointing=asked, devices=devices)}"


@contextmanager
def _ending(backend: Backend, progress: Progress) -> Iterator[None]:
    """End what runs when the run ends, however it does; interrupted once more, kill it at once."""
    try:
        yield
    finally:
        try:
            if backend.busy:
                progress.stopping()
                backend.stop()
        except KeyboardInterrupt:
            backend.kill()
            raise
        finally:
            backend.close()
