"""Plans of studies that were run: `plan.json` in the study's folder, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mixmerge.errors import CheckpointError, UserError, reason
from mixmerge.plan.graph import KINDS, Plan

PLAN = "plan.json"
PLANS = ".plan-*.json"  # those that processes are at, whichever was written last


def name_of(plan: Plan) -> str:
    """What the file is called that processes read a plan from: it tells the plans of a study apart, however it is run."""
    said = json.dumps(plan.to_json() | {"called": None}, sort_keys=True)
    return f".plan-{sha256(said.encode()).hexdigest()[:12]}.json"


def is_plan(path: Path) -> bool:
    """Whether a path means a study's folder or a plan file, and not a recipe."""
    return path.is_dir() or path.suffix == ".json"


def plan_file(path: Path) -> Path:
    """The plan file that a study's folder or a plan file means.

    Raises:
        UserError: there is none.
    """
    file = path / PLAN if path.is_dir() else path
    if not file.is_file() or not is_plan(path):
        what = f"no {PLAN} in it" if path.is_dir() else "a recipe is no study" if file.is_file() else "no such file"
        raise UserError(what, where=str(path), do="name a study's folder, <out>/runs/<study>, or its plan.json")
    return file


def root_of(file: Path) -> Path | None:
    """The `--out` folder that a plan file `<out>/runs/<study>/plan.json` lies in; None where no store is there: a copy."""
    root = file.absolute().parent.parent.parent
    return root if (root / "store").is_dir() else None


def read_plan(file: Path) -> Plan:
    """The plan in a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        plan = Plan.from_json(json.loads(file.read_text(encoding="utf-8")))
        _check(plan)
        return plan
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"no plan of a study: {reason(error)}", where=str(file), do="run its recipe again"
        ) from error


def plans_under(root: Path) -> Iterator[Plan]:
    """The plans of the studies in an `--out` folder: as each was run last, and as running processes have it; none that is damaged."""
    for file in sorted(file for name in (PLAN, PLANS) for file in (root / "runs").glob(f"*/{name}")):
        with suppress(CheckpointError):
            yield read_plan(file)


def _check(plan: Plan) -> None:
    """Raise a ValueError where a plan is not what a run writes: whoever reads it further may rely on its shape."""
    seen: set[str] = set()
    for step in plan.steps:
        texts = (step.kind, step.name, step.group, *step.inputs.values())
        mappings = (step.what, step.how, step.inputs)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(part, dict) for part in mappings):
            raise ValueError(f"step {step.id} has parts of other types")
        if step.kind not in KINDS or not seen.issuperset(step.inputs.values()):
            raise ValueError(f"step {step.id} is of no known kind, or needs what is not before it")
        seen.add(step.id)
    if not isinstance(plan.study, str) or not plan.steps or not isinstance(plan.called, dict):
        raise ValueError("it has no name or no steps")
    if not seen.issuperset(dict(plan.models).values()):
        raise ValueError("it names candidates that no step makes")
