"""Planning in this process: the ids that a recipe comes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan
from mixmerge.recipe.load import load_recipe


@pytest.fixture
def planned(study) -> Callable[..., Plan]:
    """The plan of the tiny study with overrides."""

    def planned(*overrides: str) -> Plan:
        return build_plan(load_recipe(study.recipe, overrides))

    return planned
