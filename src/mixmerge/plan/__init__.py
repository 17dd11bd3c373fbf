"""The plan: the graph of steps that carries out a recipe, and what each step's identity is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixmerge.callable import make_callable

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan


def plan(recipe: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """Plan the study of a recipe file; overrides are `key.path=value`.

    Raises:
        UserError: whatever is wrong with the recipe, its data or its prompts.
    """
    from mixmerge.hashes import cache_folder
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe

    return build_plan(load_recipe(recipe, overrides), cache=cache_folder())


make_callable(__name__)
