"""How long the steps of a run will take, for its order and for the time that is left: by the plan's estimates where they tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from mixmerge.machine import this_machine
from mixmerge.plan.estimate import estimate, seconds_of
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.history import History
from mixmerge.run.schedule import rough
from mixmerge.run.store import Store


def expected_seconds(plan: Plan, todo: Sequence[Step], store: Store) -> dict[str, float]:
    """Seconds by step id, learnt from the store's records or told by the model's size; those that nothing tells are left out."""
    try:
        found = estimate(plan, todo, History(store), this_machine())
    except Exception:  # whatever stands in an old record, a study runs without estimates as well
        return {}
    return {i: seconds for i, one in found.items() if (seconds := seconds_of(one)) is not None}


def length_by(seconds: Mapping[str, float], todo: Sequence[Step]) -> Callable[[Step], float]:
    """A step's length: its seconds, else its rough one, scaled as those of the others are."""
    scales = [seconds[step.id] / rough(step) for step in todo if step.id in seconds]
    scale = median(scales) if scales else 1.0

    def length(step: Step) -> float:
        return seconds.get(step.id, scale * rough(step))

    return length
