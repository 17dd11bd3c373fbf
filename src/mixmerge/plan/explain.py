"""What a plan means now: for every step done, interrupted, running or to run, and why.

The reason compares a step's payload with that of the newest finished step of the same kind and name, field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import differences


class Finished(Protocol):
    """What explaining needs to know of the store."""

    def find(self, step_id: str) -> Any: ...
    def damage(self, step_id: str) -> str | None: ...
    def latest(self, kind: str, name: str) -> dict[str, Any] | None: ...
    def interrupted(self, step: Step) -> bool: ...
    def running(self, step: Step) -> dict[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Explanation:
    """A step's state (`done`, `running`, `interrupted`, `to run`) and why it is to run."""

    step: Step
    state: str
    why: tuple[str, ...] = ()


def explain(plan: Plan, store: Finished) -> list[Explanation]:
    """Every step of the plan, in order, with its state."""
    return [_explain(step, plan, store) for step in plan.steps]


def _explain(step: Step, plan: Plan, store: Finished) -> Explanation:
    if store.find(step.id) is not None:
        return Explanation(step, "done")
    if store.running(step) is not None:
        return Explanation(step, "running")
    damage = store.damage(step.id)
    if damage is not None:
        return Explanation(step, "to run", (f"damaged: {damage}",))
    why = tuple(_reasons(step, plan, store.latest(step.kind, step.name), store.find))
    return Explanation(step, "interrupted" if store.interrupted(step) else "to run", why)


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
            word = "new" if find(source.id) is not None or role not in before else "to be made again"
            reasons.append(f"input {source.title} is {word}")
    return reasons or ["its folder is gone"]
