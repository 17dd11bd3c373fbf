"""What commands that carry out steps share: live progress, an end on request, and an account of what failed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from mixmerge.terminal import visible

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan
    from mixmerge.run.progress import Progress
    from mixmerge.run.runner import Outcome, Study

TOGETHER_S = 0.05  # signals within so long are one request
NAMED = 10  # failures that are told in full, and steps that a line names, before they are counted


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress to give to a run; the terminal is left as it was, and an interruption is a line and exit status 130."""
    from mixmerge.run.progress import Progress

    progress, heard = Progress(), list[int]()
    try:
        with _ended_by_signals(heard):
            yield progress
    except KeyboardInterrupt:
        progress.stop()
        _tell("interrupted; run the same command again to carry on")
        raise typer.Exit(128 + [*heard, signal.SIGINT][0]) from None
    finally:
        progress.stop()


@contextmanager
def _ended_by_signals(heard: list[int]) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP end it as Ctrl-C does, and are `heard`; one that is ignored (`nohup`) stays so.

    Those that come together are one, and so are SIGTERM and SIGHUP: a service manager sends both, and an exception that is raised
    while another one leaves a lock breaks the lock. Where one of them has ended the block they are ignored from then on: a
    terminal that closes says so more than once.
    """
    asked = {signal.SIGTERM, signal.SIGHUP}
    last = -TOGETHER_S

    def end(number: int, frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        same = number in asked and number not in heard and bool(asked.intersection(heard))
        heard.append(number)
        if last - before >= TOGETHER_S and not same:
            raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    mine = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in mine:
            signal.signal(number, end)
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_IGN if number in asked and asked.intersection(heard) else before[number])


def _tell(text: str) -> None:
    """A line on standard error; none where nobody reads any more."""
    with suppress(OSError):
        print(visible(text, keep="\n"), file=sys.stderr, flush=True)


def report_failures(outcome: Outcome, plan: Plan, study: Study) -> None:
    """Name each failed step with its log and what it keeps from starting, and end with the exit status of a failure.

    Nothing where all went well. Steps that lack the same budget are told together.
    """
    told = 0
    for step_id, error in outcome.failed.items():
        step = plan.by_id[step_id]
        whose = outcome.short.get(step_id, {}).get("whose")
        alike = {i: short for i, short in outcome.short.items() if short["whose"] == whose}
        together = whose is not None and len(alike) > 1
        if together and step_id != next(iter(alike)):
            continue
        told += 1
        if told > NAMED:
            continue
        if together:
            _tell(f"error: {whose}: {lacking(list(alike.values()))}")
        else:
            log = study.log(step)  # none of a step that no machine could start
            _tell(f"error: {step.title}: {error}" + (f" (log: {log})" if log.is_file() else ""))
    if told > NAMED:
        _tell(f"error: and {told - NAMED} more like these, each with its log in {study.folder / 'logs'}")
    for line in blocked_lines(outcome, plan):
        _tell(line)
    outcome.check()


def blocked_lines(outcome: Outcome, plan: Plan) -> Iterator[str]:
    """What could not start, by the failures that it waits for."""
    because: dict[tuple[str, ...], list[str]] = {}
    blockers: dict[str, tuple[str, ...]] = {}
    blocked = set(outcome.blocked)
    for step in plan.steps:
        if step.id in blocked:
            found: dict[str, None] = {}
            for wanted in step.inputs.values():
                if wanted in outcome.failed:
                    found[plan.by_id[wanted].title] = None
                found |= dict.fromkeys(blockers.get(wanted, ()))
            blockers[step.id] = tuple(found)
            because.setdefault(blockers[step.id], []).append(step.title)
    for reasons, titles in list(because.items())[:NAMED]:
        why = f"because of {_names(reasons)}" if reasons else _other_reason(outcome)
        yield f"not started: {_names(titles)}, {why}"
    if len(because) > NAMED:
        yield f"not started: {sum(map(len, list(because.values())[NAMED:]))} more"


def _other_reason(outcome: Outcome) -> str:
    """Why a step was not started that waits for no failed one."""
    if not outcome.ended:
        return "as the server that they ask failed others"
    if outcome.full:
        return "as the disk is full"
    return "as the recipe or its data has to change; --keep-going goes on with what does not need that"


def _names(titles: Sequence[str]) -> str:
    more = f" and {len(titles) - NAMED} more" if len(titles) > NAMED else ""
    return ", ".join(titles[:NAMED]) + more


def lacking(short: Sequence[Mapping[str, Any]]) -> str:
    """What all steps together lack whose budget is spent; answers that would have served two of them count twice."""
    from mixmerge.evaluate.limits import Shortage

    total = Shortage(
        short[0]["over"],
        sum(one["done"] for one in short),
        sum(one["missing"] for one in short),
        *(sum(told) if None not in (told := [one[key] for one in short]) else None for key in ("tokens", "money")),
    )
    missing = f"up to {total.missing} requests of {len(short)} steps are missing{total.cost}"
    return f"{total.over} is spent: {missing}; raise the budget and run again to carry on"
