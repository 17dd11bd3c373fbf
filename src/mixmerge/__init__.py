"""mixmerge: mix the data or merge the models?

`load_recipe`, `plan`, `run` and `results` carry out a study; `merge` merges models from a mergekit YAML without a recipe,
and `merge_state_dicts` those in memory.
Importing this package imports nothing heavy: each name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_recipe", "merge", "merge_state_dicts", "plan", "results", "run"]


def __getattr__(name: str) -> Any:
    if name in ("merge", "plan", "run"):  # packages that are called as functions
        return import_module(f"mixmerge.{name}")
    if name == "load_recipe":
        return import_module("mixmerge.recipe.load").load_recipe
    if name == "merge_state_dicts":
        return import_module("mixmerge.merge").merge_state_dicts
    if name == "results":
        return import_module("mixmerge.run").results
    raise AttributeError(f"module 'mixmerge' has no attribute '{name}'")
