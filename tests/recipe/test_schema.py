"""The schema that editors use: valid JSON Schema, agreeing with what `load_recipe` takes, and printed in docs."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mixmerge.model.chat import CHAT_TEMPLATES, CHOICES
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.reference import recipe_reference, recipe_schema
from mixmerge.yaml import read_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_there_are_recipes_to_start_from():
    assert [path.stem for path in RECIPES] == ["paper-languages", "paper-objectives", "paper-study", "quickstart"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_comes_with_mixmerge_fits_the_schema_and_loads(validator, path):
    raw, _ = read_yaml(path)
    assert [error.message for error in validator.iter_errors(raw)] == []
    assert load_recipe(path).recipe.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_comes_with_mixmerge_is_commented_line_by_line(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert sum("#" in line for line in lines) >= len(lines) / 2


def test_the_command_prints_the_schema(mixmerge, validator):
    status, out, _ = mixmerge("schema")
    assert (status, json.loads(out)) == (0, validator.schema)


def test_the_short_forms_fit_the_schema(validator, recipe):
    recipe.change("base:\n  path: ./model\n  chat_template: chatml\n", "base: ./model\n")
    raw, _ = read_yaml(recipe.path)
    assert [error.message for error in validator.iter_errors(raw)] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 3", "sed: 3"),
        ("seed: 3", "seed: three"),
        ("    method: ties", "    methd: ties"),
        ("  batch_size: 4", "  batch_size: 0"),
        ("  jobs: 1", "  device: gpu"),
        ("    mixture: general\n", "    mixture: 3\n"),
        ("models: [general, safety]", "models: 3"),
        ("base:\n  path: ./model\n  chat_template: chatml\n", "base: 4\n"),
    ],
)
def test_an_editor_sees_the_same_mistakes(validator, recipe, old, new):
    recipe.change(old, new)
    raw, _ = read_yaml(recipe.path)
    assert not validator.is_valid(raw)
    recipe.refused()


def test_every_key_is_described_for_people():
    schema = recipe_schema()
    for section in [schema, *schema["$defs"].values()]:
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, key


def test_the_reference_in_docs_is_the_one_that_is_printed(mixmerge):
    status, out, _ = mixmerge("schema", "--markdown")
    assert status == 0
    assert out == recipe_reference()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == out, (
        "run: mixmerge schema --markdown > docs/recipe.md"
    )


def test_the_reference_names_every_section_and_key():
    page = recipe_reference()
    for name, section in recipe_schema()["$defs"].items():
        part = page.split(f"## {name}\n")[1].split("\n## ")[0]
        for key in section["properties"]:
            assert f"| `{key}` |" in part


def test_the_schema_and_the_errors_name_every_chat_template():
    told = recipe_schema()["$defs"]["Base"]["properties"]["chat_template"]["description"]
    names = ", ".join(sorted(CHAT_TEMPLATES))
    assert told.startswith(f"For a base without one: {names}, or the path of a Jinja file")
    assert f"{names}, or a Jinja file" == CHOICES
