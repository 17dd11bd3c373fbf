"""How a plan is told: a line a step with its state, its estimate and why, then what all that is left will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixmerge.amounts import duration, in_bytes
from mixmerge.machine import this_machine
from mixmerge.plan.effect import effect_lines
from mixmerge.plan.estimate import Estimate, Total, estimate, free_bytes, total
from mixmerge.plan.explain import Explanation
from mixmerge.plan.graph import Plan
from mixmerge.plan.learnt import Amount
from mixmerge.plan.memory import memory_lines, plan_memory
from mixmerge.run.history import History
from mixmerge.terminal import visible

NAMED = 3  # titles that a line names before it counts
UNKNOWN_WORDS = {"seconds": "time", "disk_bytes": "disk", "requests": "requests", "money": "money"}


def plan_json(plan: Plan, explained: Sequence[Explanation], history: History, out: Path) -> dict[str, Any]:
    """Everything: steps with states, reasons and estimates, and the total."""
    found, memory = _estimates(plan, explained, history), _memory(plan, explained, history)
    steps = []
    for entry in explained:
        told = entry.step.to_json() | entry.to_json()
        if entry.step.id in found:
            told["estimate"] = found[entry.step.id].to_json()
        if entry.step.id in memory:
            told["memory_bytes"] = asdict(memory[entry.step.id])
        steps.append(told)
    notes = [*plan.notes, *effect_lines(plan, set(found))]
    whole = total(plan, found).to_json() | {"free_bytes": free_bytes(out)}
    return {"study": plan.study, "notes": notes, "machine": asdict(this_machine()), "total": whole, "steps": steps}


def plan_lines(
    plan: Plan, explained: Sequence[Explanation], history: History, out: Path, *, whole: bool
) -> Iterator[str]:
    """The plan for a person; `whole`: every reason and not the first."""
    found, memory = _estimates(plan, explained, history), _memory(plan, explained, history)
    width = max(len(entry.step.title) for entry in explained)
    for entry in explained:
        own = found.get(entry.step.id)
        cost = "" if own is None else f"{_time(own.seconds):>9}  {_disk(own.disk_bytes):>9}"
        why = "; ".join(reasons(entry, whole=whole))
        yield f"{entry.step.id}  {entry.step.title:<{width}}  {entry.state:<11}  {cost:<20}  {why}".rstrip()
    for step in plan.steps:
        if rule := step.how.get("budget_rule"):
            yield f"budget of {step.name}: {step.what['budget']:,} {step.what['unit']}, {rule}"
    yield from memory_lines(plan, memory)
    yield from effect_lines(plan, set(found))
    if found:
        yield from total_lines(total(plan, found), free_bytes(out))
    yield f"{len(explained)} steps: {len(explained) - len(found)} done, {len(found)} to run"


def total_lines(found: Total, free: int | None) -> Iterator[str]:
    """What all steps left will take, where that is known from, and what is not known."""
    if found.sources:
        begun = (
            f", {duration(found.starting.value)} more to start {found.processes} process{'es' * (found.processes > 1)}"
        )
        chain = f", {duration(found.longest)} if all that can runs at once"
        yield f"time left: {_known(found, 'seconds', duration)} one step after another{_left_out(found, 'seconds')}{begun}{chain}"
    elif "seconds" in found.missing:
        yield f"time left: {_known(found, 'seconds', duration)}"
    if found.gpu_seconds.value or "gpu_seconds" in found.missing:
        hours = _known(found, "gpu_seconds", lambda s: f"{s / 3600:.2g}")
        yield f"GPU hours: {hours}{_left_out(found, 'gpu_seconds')}"
    elif found.sources:
        yield "GPU hours: 0, no GPU is used"
    for source, (count, seconds) in found.sources.items():
        yield f"  {duration(seconds)} of the time for {count} step{'s' * (count > 1)}: {source}"
    disk = found.disk_bytes
    if disk.value or "disk_bytes" in found.missing:
        short = "; that is too little" if free is not None and free < disk.value else ""
        room = "" if free is None else f", {in_bytes(free)} are free{short}"
        known = _known(found, "disk_bytes", in_bytes, ranged=False)
        yield f"disk: {known}{_left_out(found, 'disk_bytes')}{room}"
    if found.requests or "requests" in found.missing:
        tokens = f", about {found.tokens_in.value:,.0f} tokens read and {found.tokens_out.value:,.0f} written"
        asked = _known(found, "requests", lambda n: f"{n:,} requests", ranged=False).replace("about", "up to")
        told = f"{tokens} ({found.tokens_in.source})" if found.requests else ""
        yield f"judges: {asked}{_left_out(found, 'requests')}{told}"
    if found.money is not None or "money" in found.missing:
        prices = ", by the recipe's prices where no answer is there already" if found.money else ""
        yield f"money: {_known(found, 'money', lambda m: f'{m:,.2f}')}{_left_out(found, 'money')}{prices}"
    for name, reasons in found.unknown.items():
        for reason, titles in reasons.items():
            more = f" and {len(titles) - NAMED} more" if len(titles) > NAMED else ""
            yield f"not estimated, {UNKNOWN_WORDS.get(name, name)} of {', '.join(titles[:NAMED])}{more}: {reason}"


def _estimates(plan: Plan, explained: Sequence[Explanation], history: History) -> Mapping[str, Estimate]:
    left = [entry.step for entry in explained if entry.state != "done"]
    return estimate(plan, left, history, this_machine())


def _memory(plan: Plan, explained: Sequence[Explanation], history: History) -> Mapping[str, Any]:
    left = {entry.step.id for entry in explained if entry.state != "done"}
    return {step: need for step, need in plan_memory(plan, history.find).items() if step in left}


def reasons(entry: Explanation, *, whole: bool) -> Iterator[str]:
    """Why a step is to run, and what it waits for; `whole`: all of it."""
    if entry.why:
        yield "; ".join(map(visible, entry.why)) if whole else _brief(entry.why)
    if entry.blocked_by:
        blockers = tuple(visible(str(blocker)) for blocker in entry.blocked_by)
        yield "blocked by " + (", ".join(blockers) if whole else _brief(blockers))


def _brief(told: Sequence[str]) -> str:
    more = f" (and {len(told) - 1} more; --why)" if len(told) > 1 else ""
    return visible(told[0]) + more


def _time(amount: Amount | None) -> str:
    return "?" if amount is None else _mark(amount) + duration(amount.value).replace("under ", "<")


def _disk(amount: Amount | None) -> str:
    return "?" if amount is None else _mark(amount) + in_bytes(amount.value)


def _mark(amount: Amount) -> str:
    return "~" if amount.source.startswith("rough") else ""


def _known(found: Total, name: str, words: Any, *, ranged: bool = True) -> str:
    """A sum in words: what is not known is no part of it and not nothing."""
    amount, (value, missing) = getattr(found, name), _sum_of(found, name)
    if missing and not value:
        return f"not known of {missing} step{'s' * (missing > 1)}"
    told = _range(amount, words) if ranged else words(value)
    return f"{'at least' if missing else 'about'} {told}".replace("about under", "under").replace(
        "at least under", "under"
    )


def _left_out(found: Total, name: str) -> str:
    """After a sum of which parts are not known: how many."""
    value, missing = _sum_of(found, name)
    return f", {missing} step{'s' * (missing > 1)} unknown" if missing and value else ""


def _sum_of(found: Total, name: str) -> tuple[float | None, int]:
    """The number of a sum, and how many steps it has not in it."""
    amount = getattr(found, name)
    return amount.value if isinstance(amount, Amount) else amount, found.missing.get(name, 0)


def _range(amount: Amount, words: Any) -> str:
    low, high, value = words(amount.low), words(amount.high), words(amount.value)
    return value if low == high else f"{value} ({low} to {high})"
