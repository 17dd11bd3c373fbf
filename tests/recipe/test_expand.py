"""Templates: `{lang}` in a name writes an entry out per language, with the line it came from."""

from __future__ import annotations

import pytest

from mixmerge.errors import RecipeError
from mixmerge.recipe.expand import expand_templates
from mixmerge.yaml import Marks


def expand(raw, marks=None):
    return expand_templates(raw, marks or Marks("r.yaml"))


@pytest.mark.parametrize("group", ["experts", "baselines", "merges"])
def test_a_template_becomes_one_entry_per_language_in_order(group):
    raw = {"languages": ["en", "fr"], group: {"first": {}, "x-{lang}": {"a": "{lang}", "b": ["{lang}-y"]}, "last": {}}}
    assert list(expand(raw)[group]) == ["first", "x-en", "x-fr", "last"]
    assert expand(raw)[group]["x-fr"] == {"a": "fr", "b": ["fr-y"]}


def test_keys_below_a_template_are_filled_too():
    raw = {"languages": ["en"], "experts": {"x-{lang}": {"languages": {"{lang}": 1}}}}
    assert expand(raw)["experts"]["x-en"] == {"languages": {"en": 1}}


def test_an_entry_without_a_template_in_its_name_is_left_alone():
    raw = {"languages": ["en", "fr"], "experts": {"all": {"note": "{lang}"}}}
    assert expand(raw) == raw


@pytest.mark.parametrize(
    ("models", "expanded"),
    [
        ({"x-{lang}": {"weight": 1}, "base": {}}, {"x-en": {"weight": 1}, "x-fr": {"weight": 1}, "base": {}}),
        (["base", "x-{lang}"], ["base", "x-en", "x-fr"]),
        ({"x-{lang}": None}, {"x-en": None, "x-fr": None}),
    ],
)
def test_the_models_of_a_merge_are_written_out(models, expanded):
    raw = {"languages": ["en", "fr"], "merges": {"all": {"models": models}}}
    assert expand(raw)["merges"]["all"]["models"] == expanded


def test_a_merge_per_language_names_its_own_language_inside():
    raw = {"languages": ["en", "fr"], "merges": {"m-{lang}": {"models": ["x-{lang}", "base"]}}}
    assert expand(raw)["merges"] == {"m-en": {"models": ["x-en", "base"]}, "m-fr": {"models": ["x-fr", "base"]}}


def test_every_written_out_key_has_the_line_of_its_template():
    marks = Marks("r.yaml", {("merges", "all"): 3, ("merges", "all", "models", "x-{lang}"): 5})
    marks.lines[("merges", "all", "models", "x-{lang}", "weight")] = 6
    expand({"languages": ["en", "fr"], "merges": {"all": {"models": {"x-{lang}": {"weight": "much"}}}}}, marks)
    assert marks.where(("merges", "all", "models", "x-fr")) == "r.yaml:5: merges.all.models.x-fr"
    assert marks.where(("merges", "all", "models", "x-en", "weight")) == "r.yaml:6: merges.all.models.x-en.weight"


@pytest.mark.parametrize(
    "names", [("x-en", "x-{lang}"), ("x-{lang}", "x-en"), ("{lang}-en", "en-{lang}")], ids=["before", "after", "both"]
)
def test_two_entries_that_end_with_one_name_are_refused(names):
    marks = Marks("r.yaml", {("experts", names[0]): 3, ("experts", names[1]): 4})
    with pytest.raises(
        RecipeError, match=r"^r.yaml:4: experts\..*: 'x?-?en(-en)?' is there twice; rename one of them$"
    ):
        expand({"languages": ["en", "fr"], "experts": {name: {} for name in names}}, marks)


@pytest.mark.parametrize("languages", [None, "en", [1], {}])
def test_without_a_list_of_languages_nothing_is_touched(languages):
    raw = {"languages": languages, "experts": {"x-{lang}": {}}}
    assert expand(raw) == raw


@pytest.mark.parametrize(
    "odd", [None, 3, "text", [1, None], {"a": None}, {"a": 3}, {"a": {"models": 3}}, {"a": {"models": [3]}}]
)
def test_what_is_no_mapping_is_left_to_the_schema(odd):
    raw = {"languages": ["en"], "experts": odd, "merges": odd}
    assert expand(raw) == raw


def test_the_recipe_that_was_given_is_not_changed():
    raw = {"languages": ["en"], "merges": {"all": {"models": ["x-{lang}"]}}}
    expand(raw)
    assert raw == {"languages": ["en"], "merges": {"all": {"models": ["x-{lang}"]}}}


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("mixture: {general: 0.7, safety: 0.3}", "mixture: {genral: 1}", "experts.only-en.mixture.genral"),
        ('languages: ["{lang}"]', "languagez: [x]", "experts.only-en.languagez"),
        ("      only-{lang}: {weight: 0.5}", "      olny-{lang}: {weight: 0.5}", "merges.tongues.models.olny-en"),
        ("      only-{lang}: {weight: 0.5}", "      only-{lang}: {weigt: 0.5}", "merges.tongues.models.only-en.weigt"),
    ],
)
def test_a_mistake_inside_a_template_is_shown_at_the_template(breaks, old, new, key):
    line, error = breaks(old, new)
    assert error.startswith(f"recipe.yaml:{line}: {key}: ")
