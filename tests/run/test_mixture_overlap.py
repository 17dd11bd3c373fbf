"""A mixture as a step: planned from a recipe, drawn by the worker, and what its folder says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan
from mixmerge.recipe.load import load_recipe
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
from mixmerge.run.store import Store

Drawn = Callable[..., dict[str, tuple[dict[str, Any], Path]]]


@pytest.fixture
def drawn(study) -> Drawn:
    """Carry out the base and the mixtures of the study; manifest and folder by name."""

    def drawn(*overrides: str, out: str = "out") -> dict[str, tuple[dict[str, Any], Path]]:
        whole = build_plan(load_recipe(study.recipe, overrides))
        steps = tuple(step for step in whole.steps if step.kind in ("base", "mixture"))
        plan = Plan(whole.study, steps, {})
        run_plan(plan, study.folder / out, jobs=1, threads=1, progress=Progress()).check()
        folders = {step.name: Store(study.folder / out).path(step.id) for step in steps if step.kind == "mixture"}
        return {name: (json.loads((path / "manifest.json").read_text()), path) for name, path in folders.items()}

    return drawn


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_dropped_rows_are_in_no_mixture_and_counted_in_its_manifest(study, drawn):
    prompts = (study.folder / "prompts/general.en.jsonl").read_text(encoding="utf-8").splitlines()
    with (study.folder / "data/general.en.jsonl").open("a", encoding="utf-8") as file:
        for index, line in enumerate(prompts):
            file.write(
                json.dumps({"id": f"bad{index}", "prompt": json.loads(line)["prompt"], "completion": "No."}) + "\n"
            )
    found = drawn("evaluation.overlap=drop", "budget={rows: 16}")
    for name in ("general", "mix"):
        manifest, folder = found[name]
        assert manifest["dropped"] == {"exact": {"en": 3}}
        assert manifest["rows"] == 16
        assert not any("bad" in row["id"] for row in rows_of(folder))
    cell = next(cell for cell in found["general"][0]["cells"] if cell["lang"] == "en")
    assert cell["available_rows"] == 8


def test_a_budget_by_rule_draws_what_its_number_draws_and_its_record_says_the_rule(study, drawn):
    study.edit("experts:\n", "experts:\n  safety: {mixture: safety, budget: {rows: 4}}\n")
    manifest, folder = drawn("budget={rows: 8, baselines: sum}")["mix"]
    assert (manifest["budget"], manifest["rows"]) == (12, 12)
    record = json.loads((folder / "record.json").read_text())
    assert record["how"]["budget_rule"] == "sum of all experts"
