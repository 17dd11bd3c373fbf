"""A plan is steps in an order in which each finds its inputs done.

A step is kind + what + how + inputs. `what` and the inputs' ids make its id; `how` (paths, threads, batch size) never does.
Steps of one group load the same things and share a process, one after another; the first word of a group is its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mixmerge.data.account import Account
from mixmerge.errors import MOST_NAMES, UserError, did_you_mean
from mixmerge.plan.identity import step_id

# Order of kinds in the queue, and the integer to raise when a kind's meaning changes.
REVISIONS = {
    "base": 2,
    "adopt": 1,
    "mixture": 3,
    "train": 2,
    "merge": 1,
    "generate": 2,
    "harness": 1,
    "fit-judge": 1,
    "judge": 3,
    "score": 6,
    "report": 6,
}
KINDS = tuple(REVISIONS)


@dataclass(frozen=True)
class Step:
    """One node: `inputs` maps a role to the id of the step that fills it; `name` is for people."""

    kind: str
    name: str
    what: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    @cached_property
    def payload(self) -> dict[str, Any]:
        """Everything that the id is made of."""
        revision = REVISIONS[self.kind]
        return {"kind": self.kind, "revision": revision, "what": dict(self.what), "inputs": dict(self.inputs)}

    @cached_property
    def id(self) -> str:
        return step_id(self.payload)

    @property
    def title(self) -> str:
        return f"{self.kind}/{self.name}"

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "name": self.name,
            "what": dict(self.what),
            "inputs": dict(self.inputs),
            "how": dict(self.how),
            "group": self.group,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        step = cls(data["kind"], data["name"], data["what"], data["inputs"], data["how"], data["group"])
        step.__dict__["id"] = str(data["id"])  # as it was made: a later mixmerge may give another
        return step


@dataclass(frozen=True)
class Plan:
    """The steps of one study, each after its inputs; `models` maps a candidate to the step that makes its folder.

    `dropped` counts the rows that overlap with prompts and are left out: data set -> kind -> language -> rows. `accounts`
    says what became of each data set's records, and `notes` what a person may not expect of the recipe; they are no part
    of any identity, and stay with whoever made the plan. `called` says which recipe this is the plan of, and how the
    runner was called, for the records.
    """

    study: str
    steps: tuple[Step, ...]
    models: Mapping[str, str]
    dropped: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    accounts: Mapping[str, Account] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    called: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def by_id(self) -> dict[str, Step]:
        return {step.id: step for step in self.steps}

    def find(self, name: str) -> Step:
        """The step called `kind/name`, or by its id or the beginning of it, four characters at least.

        Raises:
            UserError: no such step, or several that are called so.
        """
        titles = [step.title for step in self.steps]
        found = [step for step in self.steps if step.title == name]
        found = found or [step for step in self.steps if step.id.startswith(name) and len(name) >= 4]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{step.title} {step.id}" for step in found[:MOST_NAMES])
            raise UserError(f"'{name}' may be any of these steps: {several}", do="give the whole id of one")
        raise UserError(f"no step '{name}' in this study", do=did_you_mean(name, titles))

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "models": dict(self.models),
            "dropped": {name: dict(counts) for name, counts in self.dropped.items()},
            "called": dict(self.called),
            "steps": [step.to_json() for step in self.steps],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        steps = tuple(Step.from_json(step) for step in data["steps"])
        return cls(data["study"], steps, data["models"], data.get("dropped", {}), called=data.get("called", {}))


def longest_chains(steps: Iterable[Step], length: Callable[[Step], float]) -> dict[str, float]:
    """Step id -> the longest chain of these steps that begins with it, each of them needing the one before.

    HEFT's upward rank (Topcuoglu et al. 2002, https://doi.org/10.1109/71.993206). Steps come after their inputs; those
    that are not among them (done already) take no time.
    """
    chains: dict[str, float] = {}
    longest_after: dict[str, float] = {}
    for step in reversed(list(steps)):
        chains[step.id] = own = length(step) + longest_after.get(step.id, 0.0)
        for wanted in step.inputs.values():
            longest_after[wanted] = max(own, longest_after.get(wanted, 0.0))
    return chains
