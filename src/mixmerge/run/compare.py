"""Two studies side by side: which settings of which steps differ, and their scores with the differences.

Steps are matched by kind and name. A step whose input changed but whose own settings did not is no difference: what changed
is said where it was set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixmerge.errors import CheckpointError, reason
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import changes
from mixmerge.run.store import Store, read_json, remove

SCORED = "scores.json"
# Where a step's inputs lie and how they are read: what they hold is a setting of its own, told once by its content
PLACES = (
    *("folder", "recipe", "path", "sources", "set", "sets", "prompt_set", "prompts", "languages", "limit"),
    *("fingerprint", "seed", "answers", "refusals", "dropped"),
)
NAMED_AFTER = ("score", "report")  # steps that say which study they are of


def compare(one: Plan, other: Plan) -> dict[str, Any]:
    """The settings that differ: a field with both values and the steps that have it so, and the steps that only one has."""
    before, after = ({_title(step, plan): step for step in plan.steps} for plan in (one, other))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for title in before.keys() & after.keys():
        for field, old, new in _fields(before[title], after[title]):
            entry = {"kind": before[title].kind, "field": field, "a": old, "b": new, "steps": []}
            found.setdefault((field, repr((entry["kind"], old, new))), entry)["steps"].append(before[title].name)
    settings = [
        entry | {"steps": sorted(entry["steps"])} for _, entry in sorted(found.items(), key=lambda item: item[0])
    ]
    only = {
        "a": [title for title in before if title not in after],
        "b": [title for title in after if title not in before],
    }
    return {"a": one.study, "b": other.study, "settings": settings, "only": only}


def _title(step: Step, plan: Plan) -> str:
    """What steps are matched by: scores and report are called after the study, and each has one."""
    return f"{step.kind}/" if step.kind in NAMED_AFTER and step.name == plan.study else step.title


def _fields(one: Step, other: Step) -> Iterator[tuple[str, Any, Any]]:
    for field, old, new in changes(dict(one.what), dict(other.what)):
        if one.kind not in NAMED_AFTER or field != "study":
            yield field, old, new
    for field, old, new in changes(dict(one.how), dict(other.how)):
        if field.partition(".")[0] not in PLACES:
            yield f"how.{field}", old, new


def compare_scores(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every score that either study has: split, metric, candidate, language (None: the mean over them), both, b - a."""
    before, after = dict(_scores(one)), dict(_scores(other))
    rows = []
    for key in before | after:
        a, b = before.get(key), after.get(key)
        row: dict[str, Any] = dict(zip(("split", "metric", "candidate", "language"), key, strict=True))
        rows.append(row | {"a": a, "b": b, "difference": None if a is None or b is None else b - a})
    return rows


def _scores(scores: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str, str | None], float]]:
    for split, metrics in scores["splits"].items():
        for metric, candidates in metrics.items():
            for candidate, found in candidates.items():
                if found:
                    yield (split, metric, candidate, None), found["macro"]["value"]
                    for lang, score in found["languages"].items():
                        yield (split, metric, candidate, lang), score["value"]
    for metric, entry in (scores.get("harness") or {}).items():
        for candidate, found in entry["candidates"].items():
            yield ("test", metric, candidate, None), found["value"]
    for candidate, found in (scores.get("balance") or {}).items():
        if found:
            yield ("test", "balance", candidate, None), found["value"]


def scores_of(plan: Plan, store: Store) -> dict[str, Any] | None:
    """The scores of a study, None where it is not finished.

    Raises:
        CheckpointError: they cannot be read.
    """
    for step in plan.steps:
        if step.kind == "score" and (folder := store.find(step.id)) is not None:
            found = read_json(folder / SCORED)
            try:
                dict(_scores(found))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                what = f"no scores of a study: {reason(error)}"
                raise CheckpointError(what, where=str(folder / SCORED), do=remove(folder)) from error
            return found
    return None
