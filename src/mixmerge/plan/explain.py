"""What a plan means now: each step's state, why it is to run, and what it waits for.

The reason compares a step's payload with that of the newest finished step of the same kind and name, field by field. States:
done, running, interrupted; of the steps that are left, `changed` was made before with other settings, `blocked` has inputs that
are not there yet, `to run` can begin now. A changed step may have to wait as well: `blocked_by` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import differences

STATES = ("done", "running", "interrupted", "changed", "to run", "blocked")


class Finished(Protocol):
    """What explaining needs to know of earlier runs."""

    def find(self, step_id: str) -> Any: ...
    def damage(self, step_id: str) -> str | None: ...
    def latest(self, kind: str, name: str) -> dict[str, Any] | None: ...
    def interrupted(self, step: Step) -> bool: ...
    def running(self, step: Step) -> dict[str, Any] | None: ...
    def failure(self, step_id: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Blocker:
    """A step that has to be done first; `error`: what it failed of when it was last tried."""

    step: Step
    error: str | None = None

    def __str__(self) -> str:
        return self.step.title if self.error is None else f"{self.step.title}, which failed: {self.error}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A step's state (one of `STATES`), why it is to run, and what stands before it: failures first.

    `failed`: what the step itself failed of when it was last tried.
    """

    step: Step
    state: str
    why: tuple[str, ...] = ()
    blocked_by: tuple[Blocker, ...] = ()
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        blockers = [
            {"id": b.step.id, "title": b.step.title} | ({} if b.error is None else {"failed": b.error})
            for b in self.blocked_by
        ]
        return {"state": self.state, "why": list(self.why), "blocked_by": blockers}


def explain(plan: Plan, past: Finished) -> list[Explanation]:
    """Every step of the plan, in order, with its state."""
    explained: list[Explanation] = []
    undone: dict[str, tuple[Blocker, ...]] = {}  # of each undone step: the failures that it meets, itself included
    for step in plan.steps:
        entry = _explain(step, plan, past, undone)
        explained.append(entry)
        if entry.state != "done":
            own = () if entry.failed is None else (Blocker(step, entry.failed),)
            undone[step.id] = own or tuple(blocker for blocker in entry.blocked_by if blocker.error is not None)
    return explained


def _explain(step: Step, plan: Plan, past: Finished, undone: Mapping[str, tuple[Blocker, ...]]) -> Explanation:
    if past.find(step.id) is not None:
        return Explanation(step, "done")
    if past.running(step) is not None:
        return Explanation(step, "running")
    waits = dict.fromkeys(i for i in step.inputs.values() if i in undone)
    failed = {blocker.step.id: blocker for i in waits for blocker in undone[i]}
    blocked_by = (*failed.values(), *(Blocker(plan.by_id[i]) for i in waits if i not in failed))
    error = past.failure(step.id)
    before = () if error is None else (f"failed last time: {error}",)
    damage, changed = past.damage(step.id), False
    if damage is not None:
        why = [f"damaged: {damage}"]
    else:
        old = past.latest(step.kind, step.name)
        why = _reasons(step, plan, old, past.find)
        changed = old is not None and any(not reason.endswith(AGAIN) for reason in why if reason != GONE)
    interrupted = damage is None and past.interrupted(step)
    state = "interrupted" if interrupted else "changed" if changed else "blocked" if blocked_by else "to run"
    return Explanation(step, state, (*before, *why), blocked_by, error)


AGAIN, GONE = " is to be made again", "its folder is gone"


def _reasons(step: Step, plan: Plan, old: Mapping[str, Any] | None, find: Callable[[str], Any]) -> list[str]:
    if old is None:
        return ["not made yet"]
    if old["revision"] != step.payload["revision"]:
        return [f"mixmerge makes {step.kind} steps differently now (revision {old['revision']} -> current)"]
    reasons = list(differences(old["what"], dict(step.what)))
    before = {role: entry["id"] for role, entry in old["inputs"].items()}
    for role in sorted(before.keys() | step.inputs.keys()):
        if role not in step.inputs:
            reasons.append(f"no longer needs {role}")
        elif before.get(role) != step.inputs[role]:
            source = plan.by_id[step.inputs[role]]
            new = find(source.id) is not None or role not in before
            reasons.append(f"input {source.title} is new" if new else f"input {source.title}{AGAIN}")
    return reasons or [GONE]
