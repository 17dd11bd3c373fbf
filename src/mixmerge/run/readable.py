"""What scores and reports are made of, read from the folders of finished steps and checked row by row.

A row that no judge of this study could have written is damage: it is named by file and row, with the folder to remove.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

from mixmerge.errors import CheckpointError, MixmergeError, UserError
from mixmerge.plan.graph import Plan
from mixmerge.run.store import Store, read_json, read_record, remove

JUDGE_FILE = "judge.json"
VERDICTS_FILE = "verdicts.jsonl"


def read_verdicts(folder: Path, prompt_set: str, languages: Collection[str]) -> list[dict[str, Any]]:
    """The verdict rows of a finished judge step.

    Raises:
        CheckpointError: a row that is no JSON, or not what the step's judge writes of a prompt of this set and study.
    """
    from mixmerge.evaluate.prompts import Split

    file = folder / VERDICTS_FILE
    # the record counts every verdict that the judge can give, zeros too
    words = [name for name, count in read_record(folder)["measurements"].items() if isinstance(count, int)]
    known = {"lang": languages, "split": get_args(Split), "set": (prompt_set,), "verdict": words}
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                wrong: str | None = f"damaged row: {error}"
            else:
                wrong = _wrong(row, known)
            if wrong is not None:
                raise CheckpointError(wrong, where=f"{file}:{number}", do=remove(folder))
            rows.append(row)
    return rows


def _wrong(row: Any, known: Mapping[str, Collection[str]]) -> str | None:
    """What is wrong with a verdict row, in a few words; None where nothing is."""
    if not isinstance(row, dict):
        return "damaged row: no object"
    for key in ("prompt_id", "pid"):
        if not isinstance(row.get(key), str):
            return f"damaged row: no {key}"
    for key, values in known.items():
        if row.get(key) not in values:
            return f"damaged row: {key} {row.get(key)!r:.60} is none of {', '.join(values)}"
    value = row.get("value")
    if row["verdict"] == "scored" and (isinstance(value, bool) or not isinstance(value, int | float)):
        return f"damaged row: value {value!r:.60} is no number"
    return None


def check_readable(plan: Plan, store: Store) -> None:
    """Read what the scores and the report of a study are to be made of, where they are still to be made.

    Raises:
        UserError: a file that is damaged; names the folder to remove.
    """
    from mixmerge.evaluate.generate import read_responses
    from mixmerge.evaluate.harness_results import read_harness

    languages = next(step.what["languages"] for step in plan.steps if step.kind == "score")

    def read(role: str, folder: Path) -> None:
        kind, _, rest = role.partition("/")
        if kind == "verdicts":
            read_verdicts(folder, rest.split("/")[1], languages)
            read_json(folder / JUDGE_FILE)
        elif kind == "responses":
            read_responses(folder / "responses.jsonl")
        elif kind == "harness":
            read_harness(folder)

    for step in plan.steps:
        if step.kind not in ("score", "report") or store.find(step.id) is not None:
            continue
        for role, step_id in step.inputs.items():
            if plan.by_id[step_id].kind == "score":
                continue
            folder = store.path(step_id)
            try:
                read(role, folder)
            except MixmergeError as error:
                do = f"remove the folder {folder}, then mixmerge run RECIPE"
                raise UserError(error.what, where=error.where, do=do) from error
