"""How a plan is told: a line a step with its state, its estimate and why, then what all that is left will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixmerge.machine import this_machine
from mixmerge.plan.effect import effect_lines
from mixmerge.plan.estimate import Estimate, Total, estimate, free_bytes, total
from mixmerge.plan.explain import Explanation
from mixmerge.plan.graph import Plan
from mixmerge.plan.learnt import Amount
from mixmerge.plan.memory import memory_lines, plan_memory
from mixmerge.plan.mermaid import mermaid
from mixmerge.run.history import History
from mixmerge.terminal import visible

NAMED = 3  # titles that a line names before it counts
UNKNOWN_WORDS = {"seconds": "time", "disk_bytes": "disk", "requests": "requests", "money": "money"}


def graph_text(explained: Sequence[Explanation]) -> str:
    return mermaid(explained)


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
        reasons = "; ".join(_reasons(entry, whole=whole))
        yield f"{entry.step.id}  {entry.step.title:<{width}}  {entry.state:<11}  {cost:<20}  {reasons}".rstrip()
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
        chain = f", {duration(found.longest)} at least if all that can runs at once"
        yield f"time left: about {_range(found.seconds, duration)} one step after another{chain}"
        gpu = found.gpu_seconds
        yield f"GPU hours: {_range(gpu, lambda s: f'{s / 3600:.2g}')}" if gpu.value else "GPU hours: 0, no GPU is used"
        for source, (count, seconds) in found.sources.items():
            yield f"  {duration(seconds)} of the time for {count} step{'s' * (count > 1)}: {source}"
    disk = found.disk_bytes
    if disk.value:
        short = "; that is too little" if free is not None and free < disk.value else ""
        yield f"disk: about {size(disk.value)}" + ("" if free is None else f", {size(free)} are free{short}")
    if found.requests:
        tokens = f"about {found.tokens_in.value:,.0f} tokens read and {found.tokens_out.value:,.0f} written"
        yield f"judges: up to {found.requests:,} requests, {tokens} ({found.tokens_in.source})"
    if found.money is not None:
        yield f"money: up to about {_range(found.money, lambda m: f'{m:,.2f}')}, by the recipe's prices"
    for name, reasons in found.unknown.items():
        for reason, titles in reasons.items():
            more = f" and {len(titles) - NAMED} more" if len(titles) > NAMED else ""
            yield f"not estimated, {UNKNOWN_WORDS.get(name, name)} of {', '.join(titles[:NAMED])}{more}: {reason}"


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(0.2), duration(8.4), duration(150), duration(5400), duration(200_000)
    ('under 1 s', '8 s', '2.5 min', '1.5 h', '2.3 days')
    """
    if seconds < 1:
        return "under 1 s"
    for least, unit, name in ((86_400, 86_400, "days"), (3_600, 3_600, "h"), (60, 60, "min")):
        if seconds >= least * 1.5 or (name != "days" and seconds >= least):
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}".replace(".0 ", " ")
    return f"{seconds:.0f} s"


def size(amount: float) -> str:
    """Bytes as a person says them.

    >>> size(900), size(45_000), size(3_070_000_000)
    ('900 B', '45 kB', '3.1 GB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= unit:
            return f"{amount / unit:.0f} {name}" if amount >= 10 * unit else f"{amount / unit:.1f} {name}"
    return f"{amount:.0f} B"


def _estimates(plan: Plan, explained: Sequence[Explanation], history: History) -> Mapping[str, Estimate]:
    left = [entry.step for entry in explained if entry.state != "done"]
    return estimate(plan, left, history, this_machine())


def _memory(plan: Plan, explained: Sequence[Explanation], history: History) -> Mapping[str, Any]:
    left = {entry.step.id for entry in explained if entry.state != "done"}
    return {step: need for step, need in plan_memory(plan, history.find).items() if step in left}


def _reasons(entry: Explanation, *, whole: bool) -> Iterator[str]:
    if entry.why:
        yield "; ".join(entry.why) if whole else _brief(entry.why)
    if entry.blocked_by:
        blockers = tuple(visible(str(blocker)) for blocker in entry.blocked_by)
        yield "blocked by " + (", ".join(blockers) if whole else _brief(blockers))


def _brief(told: Sequence[str]) -> str:
    more = f" (and {len(told) - 1} more; --why)" if len(told) > 1 else ""
    return visible(told[0]) + more


def _time(amount: Amount | None) -> str:
    return "?" if amount is None else _mark(amount) + duration(amount.value).replace("under ", "<")


def _disk(amount: Amount | None) -> str:
    return "?" if amount is None else _mark(amount) + size(amount.value)


def _mark(amount: Amount) -> str:
    return "~" if amount.source.startswith("rough") else ""


def _range(amount: Amount, words: Any) -> str:
    low, high, value = words(amount.low), words(amount.high), words(amount.value)
    return value if low == high else f"{value} ({low} to {high})"
