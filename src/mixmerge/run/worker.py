"""The process that carries out steps: `python -m mixmerge.run.worker ROOT PLAN ID...`.

Steps of one group come to one process, one after another, so that they can share what they load. What the runner needs
to know goes to standard output as JSON lines; everything that libraries print goes to standard error (the log).
A step that another runner is at is put off until nothing else is left, so that two of them share the steps of a group.
The process ends itself when its runner is gone.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mixmerge.errors import CheckpointError, FullDiskError, MixmergeError, UserError
from mixmerge.events import Emit, take_stdout
from mixmerge.leaving import leave
from mixmerge.machine import named_gpus
from mixmerge.plan.graph import REVISIONS, Plan, Step
from mixmerge.run.local import log_file
from mixmerge.run.provenance import Meter, machine, seeds
from mixmerge.run.record import files_of, sealed
from mixmerge.run.runner import Study
from mixmerge.run.servers import servers_of, told_of
from mixmerge.run.steps import CARRY_OUT, StepContext, let_go
from mixmerge.run.store import Store, named_os_error, remove, taken_over

WAIT_S = 1.0
FULL_BYTES = 1 << 20
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust (safetensors, tokenizers) end theirs


def main(argv: list[str]) -> int:
    """Carry out the steps named by id; the exit status says whether all are there."""
    root, plan_file, *ids = argv
    emit = take_stdout()
    signal.signal(signal.SIGTERM, _asked_to_end)
    threading.Thread(target=_follow_runner, daemon=True).start()
    plan = Plan.from_json(json.loads(Path(plan_file).read_text(encoding="utf-8")))
    store, shared, lost = Store(Path(root)), dict[Any, Any](), set[str]()
    left, held, told, failed = list(ids), 0, set[str](), False
    try:
        while left:
            step = plan.by_id[left.pop(0)]
            log_to(log_file(Path(plan_file), step))
            came_to = _attempt(step, plan, store, shared, emit, lost, after=left)
            if came_to is not None:
                held, failed = 0, failed or not came_to
                continue
            left.append(step.id)
            held += 1
            if held >= len(left):  # all of them are held by others
                if step.id not in told:
                    emit("waiting", step=step.id)
                    told.add(step.id)
                time.sleep(WAIT_S)
    except FullDiskError:  # it was told; the steps that are left would only meet it again
        failed = True
    except _AskedToEnd:  # by now the step's lease is given back: end as one that asked nothing, and say no more
        with suppress(Exception):
            let_go(shared)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        let_go(shared)
    return int(failed)


class _AskedToEnd(BaseException):
    """SIGTERM came; raised wherever the process is, so that what it holds is let go."""


def _asked_to_end(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # once more: at once
    raise _AskedToEnd


def _attempt(
    step: Step,
    plan: Plan,
    store: Store,
    shared: dict[Any, Any],
    emit: Emit,
    lost: set[str],
    after: Sequence[str] = (),
) -> bool | None:
    """Carry out one step and tell how it went; FullDiskError where that was the reason. None: another runner is at it.

    One that asks a server which was of no use to an earlier step is left alone; `lost` has these servers. Once the step is
    taken over by another runner nothing more may be written: the process ends, and leaves the steps `after` it.
    """

    def taken() -> None:
        emit("failed", step=step.id, error=str(taken_over()), bug=False, full=False)
        for left in after:
            emit("skipped", step=left)
        os._exit(1)

    if lost.intersection(servers_of(step)):
        emit("skipped", step=step.id)
        return False
    try:
        return carry_out(step, plan, store, shared, emit, taken) or None
    except Exception as error:
        known = _advised(_named(error, store.partial(step)), step, store)
        named, bug = (f"{type(error).__name__}: {error}", True) if known is None else (str(known), False)
        with suppress(OSError):  # the disk that the log is on may be the one that is full
            _log(error, step, named if not bug else None)
        full = isinstance(known, FullDiskError)
        told = told_of(step, known)
        lost |= {told["server"]} if "server" in told else set()
        recipe = isinstance(known, UserError)
        emit("failed", step=step.id, error=named, bug=bug, full=full, recipe=recipe, **told)
        if isinstance(known, FullDiskError):
            raise known from error
        return False


def _log(error: Exception, step: Step, named: str | None) -> None:
    """Let the log end with the line that names the error, where it has one.

    The traceback of one that we raised for no other is left out: it would show our own code alone, and bury what a program
    said before.
    """
    other = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if named is None or other is not None or not isinstance(error, MixmergeError):
        traceback.print_exception(error)
    if named is not None:
        sys.stderr.write(f"error: {step.title}: {named}\n")
        sys.stderr.flush()


def _named(error: Exception, folder: Path) -> MixmergeError | None:
    """The error as one that a person can mend, or None: a bug."""
    if isinstance(error, MixmergeError):
        return error
    # torch and safetensors put a full disk into errors of their own, torch without a word about it.
    full = shutil.disk_usage(folder.parent).free < FULL_BYTES if folder.parent.is_dir() else False
    if full or os.strerror(errno.ENOSPC) in str(error):
        return named_os_error(OSError(errno.ENOSPC, ""), folder)
    if (told := OS_ERROR.search(str(error))) is not None and not isinstance(error, OSError):
        return named_os_error(OSError(number := int(told[1]), os.strerror(number)), folder)
    return named_os_error(error, folder) if isinstance(error, OSError) else None


def _advised(error: MixmergeError | None, step: Step, store: Store) -> MixmergeError | None:
    """The error; one about a damaged file of the step's inputs says what mends it: making that input again.

    A base may be unfit as it came, and a merge finds inputs that do not go together: only a file that cannot be read is
    damaged there. Everything else that is read was written by an earlier step.
    """
    for step_id in step.inputs.values():
        folder = store.find(step_id)
        if error is not None and folder is not None and folder.name in str(error):
            ours = isinstance(error, UserError) and folder.parent.name != "base" and step.kind != "merge"
            return error.again(do=remove(folder)) if ours or isinstance(error, CheckpointError) else error
    return error


def carry_out(
    step: Step,
    plan: Plan,
    store: Store,
    shared: dict[Any, Any],
    emit: Emit,
    taken: Callable[[], object] | None = None,
) -> bool:
    """Do one step under its lease, unless it is done; False where another live runner is at it.

    Its `done` tells `by` whom, where that was not this process: each step is made once, and told so by its maker alone.
    """
    with store.lease(step, taken) as ours:
        if not ours:
            return False
        store.refresh()
        if store.find(step.id) is not None:
            done = {"seconds": 0.0, "measurements": {}, "by": "another runner"}
        elif store.rescue(step):
            done = {"seconds": 0.0, "measurements": {}, "by": "an earlier run"}
        else:
            done = _work(step, plan, store, shared, emit)
    emit("done", step=step.id, **done)
    return True


def _work(step: Step, plan: Plan, store: Store, shared: dict[Any, Any], emit: Emit) -> dict[str, Any]:
    emit("start", step=step.id, host=platform.node(), pid=os.getpid(), gpus=named_gpus() or [])
    folders = store.begin(step)
    meter = Meter()
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 0.2 or done == total:
            last = now
            emit("progress", step=step.id, done=done, total=total)

    def tell(text: str) -> None:
        emit("note", step=step.id, text=text)

    place = folders.out, folders.work, store, shared
    context = StepContext(step, *place, progress, tell, Study(store.root, plan.study).log(step), plan=plan)
    try:
        measurements = CARRY_OUT[step.kind](context)
    except MixmergeError as error:  # a server that has died is no use to the next step either
        let_go(shared, error)
        raise
    took = meter.read()
    files = files_of(folders.out, {store.path(i) for i in step.inputs.values()})
    for check in context.checks:
        check(files["sha256"])
    inputs = {role: {"id": i, "name": plan.by_id[i].name} for role, i in step.inputs.items()}
    record = {
        "id": step.id,
        "kind": step.kind,
        "name": step.name,
        "revision": REVISIONS[step.kind],
        "what": dict(step.what),
        "inputs": inputs,
        "how": dict(step.how),
        "measurements": measurements,
        "provenance": dict(plan.called) | took | {"seeds": seeds(step.what)} | machine(),
        **files,
    }
    store.commit(step, sealed(record))
    return {"seconds": round(took["seconds"], 2), "measurements": measurements}


def log_to(path: Path) -> None:
    """Send what is printed from here on to a step's own log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)


def _follow_runner() -> None:
    """End with the runner, which holds the other end of standard input: an orphan would hold leases and the machine."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
