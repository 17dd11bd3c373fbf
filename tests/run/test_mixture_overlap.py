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

    def drawn(*overrides: str, out: str = "out", at_once: int = 1) -> dict[str, tuple[dict[str, Any], Path]]:
        whole = build_plan(load_recipe(study.recipe, overrides))
        steps = tuple(step for step in whole.steps if step.kind in ("base", "mixture"))
        plan = Plan(whole.study, steps, {})
        run_plan(plan, study.folder / out, jobs=at_once, threads=at_once, progress=Progress()).check()
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


def test_the_manifest_names_every_data_set_with_its_fingerprint_and_what_it_gave(study, drawn):
    manifest, folder = drawn()["mix"]
    assert manifest["data"].keys() == {"general", "safety"}
    for name, found in manifest["data"].items():
        assert (found["objective"], found["languages"], found["rows"]) == (name, ["en", "fr"], 4)
        assert len(found["fingerprint"]) == 64
    assert sum(found["tokens"] for found in manifest["data"].values()) == manifest["tokens"]
    ids = sorted(row for cell in manifest["cells"] for row in cell["ids"])
    assert ids == sorted(row["id"] for row in rows_of(folder))


def test_two_data_sets_of_one_objective_are_told_apart_row_by_row(study, drawn):
    for code in ("en", "fr"):
        rows = (study.folder / f"data/general.{code}.jsonl").read_text(encoding="utf-8")
        (study.folder / f"data/more.{code}.jsonl").write_text(rows.replace('"completion": "', '"completion": "So: '))
    more = 'more: {objective: general, path: "data/more.{lang}.jsonl"}'
    study.edit("  safety: {objective", f"  {more}\n  safety: {{objective")
    manifest, folder = drawn("budget={rows: 24}")["general"]
    for cell in manifest["cells"]:
        text = {row["id"]: row for row in rows_of(folder) if row["lang"] == cell["lang"]}
        assert set(cell["from"]) == {"general", "more"}
        assert len(cell["from"]) == len(cell["ids"]) == 12
        assert set(cell["ids"]) <= text.keys()
    whole = [row["completion"][0]["content"].startswith("So: ") for row in rows_of(folder)]
    assert manifest["data"]["more"]["rows"] == sum(whole)
    assert manifest["data"]["general"]["rows"] == len(whole) - sum(whole)


def test_the_order_of_data_sets_and_the_number_of_threads_change_no_byte(study, drawn):
    one = drawn("budget={tokens: 400}", out="one")
    turned = "data={safety: {objective: safety, path: 'data/safety.{lang}.jsonl'}, general: {objective: general, path: 'data/general.{lang}.jsonl'}}"  # fmt: skip
    mix = "baselines={mix: {mixture: {safety: 0.5, general: 0.5}, languages: {fr: 1, en: 1}}}"
    two = drawn("budget={tokens: 400}", turned, mix, out="two", at_once=2)
    for name in ("general", "mix"):
        for file in ("rows.jsonl", "manifest.json"):
            assert (one[name][1] / file).read_bytes() == (two[name][1] / file).read_bytes()


def test_the_rows_of_the_tiny_study_are_the_same_bytes_on_every_machine(drawn):
    # A changed digest means that every study trains again on other rows.
    assert {name: manifest["sha256"] for name, (manifest, _) in drawn().items()} == {
        "general": "285d6fc0b57fd43ef754c1897d4c208e11917a33125eb4c60acdb0e766aa1b32",
        "mix": "963becb47b3815e974043d26d0b71d61ea4adc5c6c9e638596abddc9b03c1eb6",
    }
