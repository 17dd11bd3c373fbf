"""What a plan means now: each step's state, why it is to run, and what it waits for.

The reason compares a step's payload, field by field, with that of the most alike finished step of the same kind and name: of this
study first, so that what is named was changed in its own recipe; else of another study in the store. A step that was begun
with these very settings has not changed. States:
done, running, interrupted; of the steps that are left, `changed` was made before with other settings, `blocked` has inputs that
are not there yet, `to run` can begin now. A changed step may have to wait as well: `blocked_by` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import Change, changes

STATES = ("done", "running", "interrupted", "changed", "to run", "blocked")


class Finished(Protocol):
    """What explaining needs to know of earlier runs."""

    def find(self, step_id: str) -> Any: ...
    def damage(self, step_id: str) -> str | None: ...
    def named(self, kind: str, name: str) -> list[dict[str, Any]]: ...
    def own(self, record: Mapping[str, Any]) -> bool: ...
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
    """A step's state (one of `STATES`), why it is to run: in words or as changed fields, and what is before it: failures first.

    `failed`: what the step itself failed of when it was last tried.
    """

    step: Step
    state: str
    reasons: tuple[str | Change, ...] = ()
    blocked_by: tuple[Blocker, ...] = ()
    failed: str | None = None

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons for a person: long values are cut to what stands where they differ."""
        return tuple(map(str, self.reasons))

    def to_json(self) -> dict[str, Any]:
        """Everything, with nothing cut; `changes` are the fields among the reasons."""
        why = [reason.whole if isinstance(reason, Change) else reason for reason in self.reasons]
        changed = [reason.to_json() for reason in self.reasons if isinstance(reason, Change)]
        blockers = [
            {"id": b.step.id, "title": b.step.title} | ({} if b.error is None else {"failed": b.error})
            for b in self.blocked_by
        ]
        return {"state": self.state, "why": why, "changes": changed, "blocked_by": blockers}


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
    interrupted = damage is None and past.interrupted(step)
    if damage is not None:
        why: list[str | Change] = [f"damaged: {damage}"]
    else:
        old = None if interrupted else _nearest(step, past)
        why = _reasons(step, plan, old, past.find)
        changed = old is not None and any(not str(reason).endswith(AGAIN) for reason in why if reason != GONE)
    state = "interrupted" if interrupted else "changed" if changed else "blocked" if blocked_by else "to run"
    return Explanation(step, state, (*before, *why), blocked_by, error)


AGAIN, GONE = " is to be made again", "its folder is gone"


def _nearest(step: Step, past: Finished) -> Mapping[str, Any] | None:
    """The record to compare a step with: of this study if there is one, and with the fewest differences."""

    def distance(record: Mapping[str, Any]) -> tuple[bool, bool, int]:
        inputs = {role: entry["id"] for role, entry in record["inputs"].items()}
        roles = sum(inputs.get(role) != step.inputs.get(role) for role in inputs.keys() | step.inputs.keys())
        fields = sum(1 for _ in changes(record["what"], dict(step.what)))
        return not past.own(record), record["revision"] != step.payload["revision"], fields + roles

    found = past.named(step.kind, step.name)
    return min(found, key=distance) if len(found) > 1 else next(iter(found), None)


def _reasons(step: Step, plan: Plan, old: Mapping[str, Any] | None, find: Callable[[str], Any]) -> list[str | Change]:
    if old is None:
        return ["not made yet"]
    if (revision := old["revision"]) != step.payload["revision"]:
        return [f"mixmerge makes {step.kind} steps differently now (revision {revision} -> current)"]
    reasons: list[str | Change] = list(changes(old["what"], dict(step.what)))
    before = {role: entry["id"] for role, entry in old["inputs"].items()}
    for role in sorted(before.keys() | step.inputs.keys()):
        if role not in step.inputs:
            reasons.append(f"no longer needs {role}")
        elif before.get(role) != step.inputs[role]:
            source = plan.by_id[step.inputs[role]]
            new = find(source.id) is not None or role not in before
            reasons.append(f"input {source.title} is new" if new else f"input {source.title}{AGAIN}")
    return reasons or [GONE]
