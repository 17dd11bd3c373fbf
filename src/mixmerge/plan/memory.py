"""How much memory each training of a plan needs, before it runs: the arithmetic is train/memory.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mixmerge.plan.graph import Plan, Step
from mixmerge.train.memory import Memory, Shape, settings_memory, shape_of
from mixmerge.train.settings import Devices, settings_from


def plan_memory(plan: Plan, find: Callable[[str], Path | None]) -> dict[str, Memory]:
    """The estimate of every training of a plan, by step id; `find` gives the folder of a finished step.

    Empty where the base's shape is not known yet: a Hub id, a package or a trimmed vocabulary that was not brought in.
    """
    base = plan.by_id[plan.models["base"]]
    folder = find(base.id)
    if folder is None and "path" in base.how and base.what["trim"] is None:
        folder = Path(base.how["path"])
    shape = None if folder is None else shape_of(folder)
    if shape is None:
        return {}
    trainings = (step for step in plan.steps if step.kind == "train" and step.what.get("engine") != "command")
    return {step.id: _of_step(step, shape) for step in trainings}


def _of_step(step: Step, shape: Shape) -> Memory:
    checkpointing = bool(step.how.get("gradient_checkpointing"))
    return settings_memory(shape, settings_from(step.what), checkpointing=checkpointing, devices=Devices.of(step.how))


def memory_lines(plan: Plan, found: Mapping[str, Memory]) -> Iterator[str]:
    """One line for each amount, with the trainings that need it."""
    alike: dict[Memory, list[str]] = {}
    for step in plan.steps:
        if step.id in found:
            alike.setdefault(found[step.id], []).append(step.name)
    for memory, names in alike.items():
        parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:.1f}" for name in memory.__slots__)
        yield f"memory to train {', '.join(names)}: about {memory.total / 1e9:.1f} GB ({parts})"
