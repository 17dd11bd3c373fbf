"""Budgets: numbers, or for baselines a rule over what the experts have, so that equal cost is said and not copied."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.recipe.budgets import Grant, budget_of
from mixmerge.recipe.reference import recipe_schema
from mixmerge.recipe.schema import Recipe
from mixmerge.yaml import Marks, read_yaml

NUMBER = "    budget:\n      rows: 64\n"
PLACE = "baselines.mix.budget"


def small(**changes):
    """A recipe with two experts and a baseline, as checked data."""
    recipe = {
        "name": "x",
        "base": "./base",
        "languages": ["en"],
        "data": {"rows": {"objective": "a", "path": "rows.jsonl"}},
        "budget": {"rows": 10},
        "experts": {"one": {"mixture": "a"}, "two": {"mixture": "a"}},
        "baselines": {"mix": {"mixture": "a"}},
        "evaluation": {"prompts": {}},
    }
    return Recipe.model_validate(recipe | changes)


def grant(recipe, name="mix"):
    return budget_of(recipe, name, Marks("r"))


@pytest.fixture
def same_epochs(recipe):
    """The demo recipe, in which every training reads its mixture once."""
    recipe.change("    training: {epochs: 2}\n", "")
    return recipe


# What a rule comes to


@pytest.mark.parametrize(
    ("budget", "amount", "rule"),
    [
        ("sum", 4000, "sum of all experts"),
        ("each", 1000, "as each expert"),
        ("{sum: [general, safety]}", 2000, "sum of general + safety"),
        ("{sum: [only-en]}", 1000, "sum of only-en"),
        ("{each: [general, safety]}", 1000, "as general and safety each"),
        ("{tokens: 7}", 7, None),
    ],
)
def test_a_baseline_has_what_its_rule_says(same_epochs, budget, amount, rule):
    same_epochs.change(NUMBER, f"    budget: {budget}\n")
    loaded = same_epochs.load()
    assert budget_of(loaded.recipe, "mix", loaded.marks) == Grant(amount, "tokens", rule)


def test_experts_of_different_size_are_added_up_and_named_for_each():
    experts = {"one": {"mixture": "a", "budget": {"rows": 3}}, "two": {"mixture": "a"}}
    of = {"mixture": "a"}
    assert grant(small(experts=experts, baselines={"mix": of | {"budget": "sum"}})).amount == 13
    assert grant(small(experts=experts, baselines={"mix": of | {"budget": {"each": ["one"]}}})).amount == 3


def test_the_study_may_give_all_its_baselines_a_rule_that_one_of_them_overrides():
    baselines = {"mix": {"mixture": "a"}, "large": {"mixture": "a", "budget": {"rows": 99}}}
    recipe = small(budget={"rows": 10, "baselines": "sum"}, baselines=baselines)
    assert grant(recipe) == Grant(20, "rows", "sum of all experts")
    assert grant(recipe, "large") == Grant(99, "rows")
    assert grant(recipe, "one") == Grant(10, "rows")
    assert grant(small(budget={"rows": 10, "baselines": {"tokens": 5}})) == Grant(5, "tokens")


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
def test_a_sum_is_the_sum_of_the_experts_own_budgets(sizes):
    experts = {f"e{i}": {"mixture": "a", "budget": {"tokens": size}} for i, size in enumerate(sizes)}
    recipe = small(experts=experts, baselines={"mix": {"mixture": "a", "budget": "sum"}})
    assert grant(recipe) == Grant(sum(sizes), "tokens", "sum of all experts")


def test_a_number_works_as_it_always_did(recipe):
    loaded = recipe.load()
    assert budget_of(loaded.recipe, "mix", loaded.marks) == Grant(64, "rows")
    assert budget_of(loaded.recipe, "safety", loaded.marks) == Grant(1000, "tokens")


# What is refused


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (
            "sum",
            f"{PLACE}: 'safety' trains for 2 epochs and 'mix' for 1, so equal budgets are no equal cost; give both",
        ),
        ("{sum: [genral]}", f"{PLACE}.sum: unknown expert 'genral'; did you mean 'general'?"),
        ("{each: [ties]}", f"{PLACE}.each: unknown expert 'ties'; known: general, only-en, only-fr, safety"),
        ("{sum: [general, general]}", f"{PLACE}.sum: 'general' is listed twice"),
        ("{sum: [general], rows: 3}", f"{PLACE}: give exactly one of tokens or rows (or sum or each, for a baseline)"),
        ("{sum: [general], each: [general]}", f"{PLACE}: give exactly one of tokens or rows (or sum or each"),
        ("all", f"{PLACE}: expected a mapping of keys to values (given: 'all')"),
    ],
)
def test_a_rule_that_means_nothing_is_one_line_with_its_place(recipe, budget, error):
    line = recipe.change(NUMBER, f"    budget: {budget}\n")
    assert recipe.refused().startswith(f"recipe.yaml:{line}: {error}")


def test_experts_in_rows_and_in_tokens_have_no_sum(same_epochs):
    same_epochs.change("    languages: [en]\n", "    languages: [en]\n    budget: {rows: 5}\n")
    line = same_epochs.change(NUMBER, "    budget: sum\n")
    assert same_epochs.refused() == (
        f"recipe.yaml:{line}: {PLACE}: 'general' has a budget in tokens and 'safety' one in rows, so there is no sum; "
        "give all experts budgets in one unit, or the baseline a number"
    )


def test_experts_that_differ_have_no_budget_of_each(same_epochs):
    same_epochs.change("    languages: [en]\n", "    languages: [en]\n    budget: {tokens: 5}\n")
    line = same_epochs.change(NUMBER, "    budget: each\n")
    assert same_epochs.refused() == (
        f"recipe.yaml:{line}: {PLACE}: 'general' has 1000 tokens and 'safety' 5: each has its own; "
        "name one, e.g. {each: [general]}, or write sum"
    )


@pytest.mark.parametrize("rule", ["sum", "each", "{each: [general]}"])
def test_an_expert_cannot_have_a_rule(recipe, rule):
    line = recipe.change("    languages: [en]\n", f"    budget: {rule}\n")
    error = recipe.refused()
    assert error.startswith(
        f"recipe.yaml:{line}: experts.safety.budget: '{'sum' if rule == 'sum' else 'each'}' is a rule"
    )
    assert error.endswith("so it cannot be an expert's own; give tokens or rows")


def test_a_rule_of_the_study_is_refused_where_it_stands(recipe):
    recipe.change(NUMBER, "")
    line = recipe.change("budget: {tokens: 1000}", "budget: {tokens: 1000, baselines: sum}")
    assert recipe.refused().startswith(f"recipe.yaml:{line}: budget.baselines: 'safety' trains for 2 epochs and 'mix'")


def test_a_rule_needs_experts_to_hold_on_to(recipe):
    assert "baselines.mix.budget: budget: sum, and there are no experts; give tokens or rows" in recipe.refused(
        "experts={}", "merges={}", "baselines.mix.budget=sum"
    )


def test_an_editor_takes_the_rules_for_baselines(recipe):
    recipe.change("budget: {tokens: 1000}", "budget: {tokens: 1000, baselines: sum}")
    recipe.change(NUMBER, "    budget: each\n")
    raw, _ = read_yaml(recipe.path)
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert [error.message for error in validator.iter_errors(raw)] == []
    raw["baselines"]["mix"]["budget"] = "some"
    assert not validator.is_valid(raw)
