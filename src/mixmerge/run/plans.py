"""Plans of studies that were run: `plan.json` in the study's folder, read back."""

from __future__ import annotations

import json
from pathlib import Path

from mixmerge.errors import CheckpointError, UserError, reason
from mixmerge.plan.graph import Plan

PLAN = "plan.json"


def is_plan(path: Path) -> bool:
    """Whether a path means a study's folder or a plan file, and not a recipe."""
    return path.is_dir() or path.suffix == ".json"


def plan_file(path: Path) -> Path:
    """The plan file that a study's folder or a plan file means.

    Raises:
        UserError: there is none.
    """
    file = path / PLAN if path.is_dir() else path
    if not file.is_file():
        what = f"no {PLAN} in it" if path.is_dir() else "no such file"
        raise UserError(what, where=str(path), do="name a study's folder, <out>/runs/<study>, or its plan.json")
    return file


def read_plan(file: Path) -> Plan:
    """The plan in a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Plan.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"no plan of a study: {reason(error)}", where=str(file), do="run its recipe again"
        ) from error
