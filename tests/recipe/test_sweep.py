"""Sweeps: a list of values in an entry writes it out once per value, named after it; `rest` is what the others leave."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.errors import RecipeError
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.reference import recipe_schema
from mixmerge.recipe.sweep import expand_sweeps, fill_rests
from mixmerge.yaml import Marks, read_yaml

ROOT = Path(__file__).parents[2]
MIX = "  mix:\n    mixture: {general: 1, safety: 1}\n"


def expand(raw, marks=None):
    return expand_sweeps(raw, marks or Marks("r.yaml"))


def swept(name, values, group="baselines"):
    return {group: {name: {"mixture": {"general": "rest", "safety": {"sweep": values}}}}}


# What a sweep becomes


def test_a_sweep_of_a_share_becomes_one_named_baseline_per_value(recipe):
    recipe.change(MIX, "  mix-{safety}:\n    mixture: {general: rest, safety: {sweep: [0, .05, .15, .3, .5, 1]}}\n")
    found = recipe.load().recipe.baselines
    assert {name: entry.mixture for name, entry in found.items()} == {
        "mix-0": {"general": 1.0, "safety": 0},
        "mix-0.05": {"general": 0.95, "safety": 0.05},
        "mix-0.15": {"general": 0.85, "safety": 0.15},
        "mix-0.3": {"general": 0.7, "safety": 0.3},
        "mix-0.5": {"general": 0.5, "safety": 0.5},
        "mix-1": {"general": 0.0, "safety": 1},
    }
    assert all(entry.budget.rows == 64 for entry in found.values())


def test_entries_stand_where_the_sweep_stood(recipe):
    recipe.change(MIX, "  first: {mixture: general}\n  m-{safety}:\n    mixture: {safety: {sweep: [1, 2]}}\n")
    recipe.change("      rows: 64\n", "      rows: 64\n  last: {mixture: safety}\n")
    assert list(recipe.load().recipe.baselines) == ["first", "m-1", "m-2", "last"]


@pytest.mark.parametrize(
    ("group", "name", "entry", "names"),
    [
        ("experts", "x-{learning_rate}", {"training": {"learning_rate": {"sweep": [1e-5, 2e-5]}}}, ["x-1e-05", "x-2e-05"]),
        ("experts", "x-{rows}", {"budget": {"rows": {"sweep": [100, 200]}}}, ["x-100", "x-200"]),
        ("experts", "{mixture}-only", {"mixture": {"sweep": ["general", "safety"]}}, ["general-only", "safety-only"]),
        ("baselines", "m-{hi}-x", {"languages": {"en": "rest", "hi": {"sweep": [0.5, 1.0]}}}, ["m-0.5-x", "m-1-x"]),
        ("merges", "slerp-{t}", {"parameters": {"t": {"sweep": [0.3, 0.7]}}}, ["slerp-0.3", "slerp-0.7"]),
        ("merges", "ties-{normalize}", {"parameters": {"normalize": {"sweep": [True, False]}}}, ["ties-true", "ties-false"]),
        ("merges", "{method}", {"method": {"sweep": ["linear", "ties"]}}, ["linear", "ties"]),
        ("merges", "l-{weight}", {"models": {"a": {"weight": {"sweep": [0.1, 1e17]}}}}, ["l-0.1", "l-1e17"]),
        ("merges", "v-{value}", {"parameters": {"t": [{"filter": "mlp", "value": {"sweep": [0, 1]}}, 3]}}, ["v-0", "v-1"]),
    ],
)  # fmt: skip
def test_any_key_of_an_entry_can_be_swept_and_names_what_comes_of_it(group, name, entry, names):
    assert list(expand({group: {name: entry}})[group]) == names


def test_a_sweep_inside_a_list_leaves_the_rest_of_the_list_alone():
    entry = {"parameters": {"t": [{"filter": "mlp", "value": {"sweep": [0, 1]}}, 3]}}
    found = expand({"merges": {"v-{value}": entry}})["merges"]
    assert found["v-1"] == {"parameters": {"t": [{"filter": "mlp", "value": 1}, 3]}}


def test_a_sweep_and_a_language_template_multiply(recipe):
    recipe.change("  only-{lang}:\n    mixture: {general: 0.7, safety: 0.3}", "  only-{lang}-{safety}:\n    mixture: {general: rest, safety: {sweep: [0, 0.3]}}")  # fmt: skip
    recipe.change("      only-{lang}: {weight: 0.5}", "      only-{lang}-0.3: {weight: 0.5}")
    found = recipe.load().recipe
    assert list(found.experts) == ["general", "safety", "only-en-0", "only-fr-0", "only-en-0.3", "only-fr-0.3"]
    assert found.experts["only-fr-0.3"].mixture == {"general": 0.7, "safety": 0.3}
    assert found.experts["only-fr-0.3"].languages == {"fr": 1.0}
    assert list(found.merges["tongues"].models) == ["only-en-0.3", "only-fr-0.3"]


def test_a_sweep_of_a_merge_weight_leaves_the_rest_to_the_other_model(recipe):
    recipe.change("  slerp:\n", "  line-{weight}:\n    method: linear\n    models: {general: {weight: rest}, safety: {weight: {sweep: [.1, .9]}}}\n  slerp:\n")  # fmt: skip
    found = recipe.load().recipe.merges
    assert found["line-0.9"].models == {"general": {"weight": 0.1}, "safety": {"weight": 0.9}}
    assert found["line-0.1"].models == {"general": {"weight": 0.9}, "safety": {"weight": 0.1}}


def test_an_override_may_be_a_sweep(recipe):
    override = "baselines={m-{safety}: {mixture: {general: rest, safety: {sweep: [0, 1]}}}}".replace("m-{safety}", "'m-{safety}'")  # fmt: skip
    assert list(recipe.load(override).recipe.baselines) == ["m-0", "m-1"]
    bad = override.replace("[0, 1]", "[]")
    assert recipe.refused(bad).startswith("--set: baselines.m-{safety}.mixture.safety: a sweep is a list of at least")


def test_an_editor_takes_a_sweep_and_a_rest_wherever_numbers_stand(recipe):
    recipe.change(MIX, "  mix-{safety}:\n    mixture: {general: rest, safety: {sweep: [0, 1]}}\n")
    recipe.change("training: {epochs: 2}", "budget: {rows: {sweep: [1]}}")
    raw, _ = read_yaml(recipe.path)
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert [error.message for error in validator.iter_errors(raw)] == []
    raw["baselines"]["mix-{safety}"]["mixture"]["safety"] = {"sweep": []}
    assert not validator.is_valid(raw)


@given(st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=1, max_size=8, unique=True))
def test_every_value_of_a_sweep_stands_in_its_name_and_shares_add_up(values):
    found = fill_rests(expand(swept("m_{safety}", values)), Marks("r"))["baselines"]
    assert [float(name[2:]) for name in found] == values
    for name, entry in found.items():
        assert entry["mixture"]["safety"] == float(name[2:])
        assert entry["mixture"]["general"] + entry["mixture"]["safety"] == pytest.approx(1, abs=1e-15)


def test_the_recipe_that_was_given_keeps_its_sweep():
    raw = swept("m-{safety}", [0, 1])
    fill_rests(expand(raw), Marks("r"))
    assert raw == swept("m-{safety}", [0, 1])


# What rest is


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ({"a": "rest", "b": 0.9}, 0.1),
        ({"b": 0.1, "c": 0.2, "a": "rest"}, 0.7),
        ({"a": "rest"}, 1.0),
        ({"a": "rest", "b": 1}, 0.0),
    ],
)
def test_rest_is_worked_out_as_a_person_would(shares, found):
    raw = {"experts": {"x": {"mixture": shares}}}
    filled = fill_rests(raw, Marks("r"))["experts"]["x"]["mixture"]
    assert filled == shares | {"a": found}
    assert list(filled) == list(shares)


def test_rest_works_among_languages_and_without_a_sweep(recipe):
    recipe.change("    languages: [en]\n", "    languages: {en: rest, fr: 0.2}\n")
    assert recipe.load().recipe.experts["safety"].languages == {"en": 0.8, "fr": 0.2}


@pytest.mark.parametrize("odd", [None, 3, "text", [1], {"a": None}, {"a": 3}, {"a": {"models": 3, "mixture": [2]}}])
def test_what_is_no_mapping_is_left_to_the_schema_by_sweeps_too(odd):
    raw = {"experts": odd, "baselines": odd, "merges": odd}
    assert fill_rests(expand(raw), Marks("r")) == raw


# What is refused, and where


@pytest.mark.parametrize(
    ("name", "mixture", "error"),
    [
        ("mix-{safety}", "{general: rest, safety: {sweep: []}}", "mixture.safety: a sweep is a list of at least one value; write {sweep: [0.1, 0.2]}"),
        ("mix-{safety}", "{general: rest, safety: {sweep: 0.5}}", "mixture.safety: a sweep is a list of at least one value"),
        ("mix-{safety}", "{general: {sweep: [1]}, safety: {sweep: [1]}}", "mixture.safety: two sweeps in one entry (mixture.general and mixture.safety); keep one"),
        ("mix", "{general: rest, safety: {sweep: [0, 1]}}", "mixture.safety: 'safety' is swept, and the name 'mix' does not say with which value; write 'mix-{safety}'"),
        ("mix-{general}", "{general: rest, safety: {sweep: [0, 1]}}", "mixture.safety: 'safety' is swept, and the name 'mix-{general}' does not say with which"),
        ("mix-{safety}", "{general: 1, safety: 1}", "the name 'mix-{safety}' speaks of a sweep of 'safety', and there is none in it; write safety: {sweep:"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [[1, 2]]}}", "[1, 2] in a sweep cannot stand in a name; sweep numbers or plain words"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [rest]}}", "'rest' in a sweep cannot stand in a name"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [.nan]}}", "nan in a sweep cannot stand in a name"),
        ("mix-{mixture}", "{sweep: [a/b]}", "'a/b' in a sweep cannot stand in a name"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [0.5, 0.5]}}", "'mix-0.5' is there twice; rename one of them"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [1, 1.0]}}", "'mix-1' is there twice; rename one of them"),
        ("mix", "{general: rest, safety: rest}", "mixture.safety: 'general' and 'safety' are both rest"),
        ("mix", "{general: rest, safety: 15}", "mixture.general: the others add up to 15, so nothing is left for the rest; shares beside a rest are fractions of 1"),
        ("mix", "{general: rest, safety: much}", "mixture.general: Input should be a valid number"),
        ("mix-{safety}", "{general: 1, safety: {sweep: [0.5, -1]}}", "mixture.safety: Input should be greater than or equal to 0 (given: -1)"),
        ("mix-{safety}", "{general: rest, safety: {sweep: [0.5, 1.5]}}", "mixture.general: the others add up to 1.5, so nothing is left"),
        ("mix-{safety}", "{general: 1, safety: {sweep: [0.5, much]}}", "mixture.safety: Input should be a valid number (given: 'much')"),
    ],
)  # fmt: skip
def test_a_sweep_that_means_nothing_is_one_line_with_its_place(recipe, name, mixture, error):
    line = recipe.change(MIX, f"  {name}:\n    mixture: {mixture}\n")
    found = recipe.refused()
    place, _, told = found.partition(": ")
    assert place in (f"recipe.yaml:{line}", f"recipe.yaml:{line + 1}")
    assert told.startswith("baselines.mix")
    assert error in told


def test_a_bad_value_is_shown_at_its_own_line(recipe):
    line = recipe.change(MIX, "  m-{safety}:\n    mixture:\n      general: 1\n      safety:\n        sweep:\n        - 0.1\n        - -2\n")  # fmt: skip
    assert recipe.refused().startswith(f"recipe.yaml:{line + 6}: baselines.m--2.mixture.safety: ")


def test_a_mistake_beside_a_sweep_is_shown_at_its_own_line(recipe):
    line = recipe.change(MIX, "  m-{safety}:\n    mixture: {general: rest, safety: {sweep: [0, 1]}}\n    trainin: {}\n")
    assert recipe.refused().startswith(f"recipe.yaml:{line + 2}: baselines.m-0.trainin: unknown key 'trainin'")


def test_a_swept_name_that_is_taken_is_refused(recipe):
    recipe.change(MIX, "  mix-0.5: {mixture: general}\n  mix-{safety}:\n    mixture: {safety: {sweep: [0.5]}}\n")
    assert "baselines.mix-0.5: 'mix-0.5' is there twice; rename one of them" in recipe.refused()


def test_a_sweep_in_place_of_an_entry_is_refused():
    with pytest.raises(RecipeError, match="a sweep in place of the whole entry; sweep one of its keys"):
        expand({"experts": {"x": {"sweep": [1, 2]}}})


def test_a_model_without_the_parameter_leaves_no_rest(recipe):
    recipe.change("      general: {weight: 1.0}\n      safety: {weight: 1.0}", "      general: {weight: rest}\n      safety: {}")  # fmt: skip
    assert "merges.ties.models.safety" in recipe.refused()
    assert "weight: rest needs that of every other model, and 'safety' has none; give it a number" in recipe.refused()


# The recipe that comes with it


def test_the_papers_recipe_sweeps_the_mix_and_the_merge_weight():
    found = load_recipe(ROOT / "recipes/paper-objectives.yaml").recipe
    assert [entry.mixture["safety"] for entry in found.baselines.values()] == [0.05, 0.15, 0.3, 0.5]
    assert all(sum(entry.mixture.values()) == 1 for entry in found.baselines.values())
    lines = {name: merge.models for name, merge in found.merges.items() if name.startswith("linear-")}
    assert {name: own["safety"]["weight"] for name, own in lines.items()} == {
        "linear-0.3": 0.3,
        "linear-0.5": 0.5,
        "linear-0.7": 0.7,
    }
    assert all(own["general"]["weight"] == pytest.approx(1 - own["safety"]["weight"]) for own in lines.values())
