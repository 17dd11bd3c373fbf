"""What a training may see: a number of its own, the study's, or for a baseline a rule over the experts' budgets.

One idea: a merge of experts has been paid for by all of them, so equal cost is a rule (`sum`, `each`) and never a number
copied by hand. A rule is worked out when the recipe is read; a step's identity holds the number alone, so that writing
the same budget as a rule makes nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mixmerge.errors import RecipeError, did_you_mean
from mixmerge.recipe.schema import Budget, Recipe, StudyBudget
from mixmerge.yaml import KeyPath, Marks


@dataclass(frozen=True, slots=True)
class Grant:
    """So many rows or tokens of a mixture, and in words the rule that they follow from, if one does."""

    amount: int
    unit: Literal["rows", "tokens"]
    rule: str | None = None


def budget_of(recipe: Recipe, name: str, marks: Marks) -> Grant:
    """The budget of an expert or a baseline.

    Raises:
        RecipeError: none at all; a rule for an expert, or one over experts that are not there, that mix rows and tokens, that read
            their mixtures another number of times than the baseline, or (`each`) whose budgets differ.
    """
    if name in recipe.experts:
        own = recipe.experts[name].budget
        if own is not None and own.rule is not None:
            raise RecipeError(
                f"'{own.rule}' is a rule over the experts, so it cannot be an expert's own",
                where=marks.where(("experts", name, "budget")),
                do="give tokens or rows",
            )
        return _number(own or recipe.budget, marks.where(("experts", name)))
    own = recipe.baselines[name].budget
    where: KeyPath = ("baselines", name, "budget")
    if own is None and recipe.budget is not None and recipe.budget.baselines is not None:
        own, where = recipe.budget.baselines, ("budget", "baselines")
    if own is None or own.rule is None:
        return _number(own or recipe.budget, marks.where(("baselines", name)))
    return _by_rule(recipe, name, own, where, marks)


def _by_rule(recipe: Recipe, name: str, budget: Budget, path: KeyPath, marks: Marks) -> Grant:
    rule, where = str(budget.rule), marks.where(path)
    listed = budget.sum or budget.each or []
    for expert in listed:
        if expert not in recipe.experts:
            advice = did_you_mean(expert, recipe.experts)
            raise RecipeError(f"unknown expert '{expert}'", where=marks.where((*path, rule)), do=advice)
    experts = listed or list(recipe.experts)
    if not experts:
        raise RecipeError(f"budget: {rule}, and there are no experts", where=where, do="give tokens or rows")
    grants = {expert: budget_of(recipe, expert, marks) for expert in experts}
    first = grants[experts[0]]
    for expert, grant in grants.items():
        if grant.unit != first.unit:
            raise RecipeError(
                f"'{experts[0]}' has a budget in {first.unit} and '{expert}' one in {grant.unit}, so there is no {rule}",
                where=where,
                do="give all experts budgets in one unit, or the baseline a number",
            )
        epochs, mine = (recipe.training_of(t).epochs for t in (recipe.experts[expert], recipe.baselines[name]))
        if epochs != mine:
            raise RecipeError(
                f"'{expert}' trains for {epochs:g} epochs and '{name}' for {mine:g}, so equal budgets are no equal cost",
                where=where,
                do="give both the same epochs, or the baseline a number",
            )
    if rule == "each" and (other := next((e for e in experts if grants[e].amount != first.amount), None)) is not None:
        raise RecipeError(
            f"'{experts[0]}' has {first.amount} {first.unit} and '{other}' {grants[other].amount}: each has its own",
            where=where,
            do=f"name one, e.g. {{each: [{experts[0]}]}}, or write sum",
        )
    amount = first.amount if rule == "each" else sum(grant.amount for grant in grants.values())
    return Grant(amount, first.unit, _words(rule, listed))


def _number(budget: Budget | StudyBudget | None, where: str) -> Grant:
    if budget is None:
        raise RecipeError("'budget' is missing", where=where, do="add it here, or for all at the top level")
    return Grant(budget.tokens, "tokens") if budget.tokens is not None else Grant(budget.rows or 0, "rows")


def _words(rule: str, listed: Sequence[str]) -> str:
    whose = " + ".join(listed) if listed else "all experts"
    if rule == "sum":
        return f"sum of {whose}"
    return f"as {' and '.join(listed)} each" if listed else "as each expert"
