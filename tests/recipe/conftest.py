"""A recipe as text, and one way to break it: change a piece, get the line where the change begins and the error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixmerge.errors import RecipeError
from mixmerge.recipe.load import LoadedRecipe, load_recipe

TEXT = """\
name: demo
base:
  path: ./model
  chat_template: chatml
languages: [en, fr]
seed: 3
data:
  plain:
    objective: general
    path: "plain.{lang}.jsonl"
  refusals:
    objective: safety
    path: "refusals.{lang}.jsonl"
budget: {tokens: 1000}
training:
  learning_rate: 1.0e-4
  batch_size: 4
experts:
  general:
    mixture: general
  safety:
    mixture: safety
    languages: [en]
    training: {epochs: 2}
  only-{lang}:
    mixture: {general: 0.7, safety: 0.3}
    languages: ["{lang}"]
baselines:
  mix:
    mixture: {general: 1, safety: 1}
    budget:
      rows: 64
merges:
  ties:
    method: ties
    models:
      general: {weight: 1.0}
      safety: {weight: 1.0}
    parameters: {density: 0.5}
  slerp:
    method: slerp
    models: [general, safety]
    parameters: {t: 0.5}
  tongues:
    method: linear
    models:
      only-{lang}: {weight: 0.5}
evaluation:
  prompts:
    general: {purpose: general, path: "prompts.{lang}.jsonl"}
  limit: {dev: 2, test: 4}
judges:
  quality: {margin: 0.02}
how:
  jobs: 1
"""


class Written:
    """The recipe on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text(TEXT, encoding="utf-8")

    def load(self, *overrides: str) -> LoadedRecipe:
        return load_recipe(self.path, overrides)

    def change(self, old: str, new: str) -> int:
        """Replace what stands once; the 1-based line where it stood."""
        text = self.path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        self.path.write_text(text.replace(old, new), encoding="utf-8")
        return text[: text.index(old)].count("\n") + 1

    def refused(self, *overrides: str) -> str:
        """The one line of the error, without the folder in front."""
        with pytest.raises(RecipeError) as caught:
            self.load(*overrides)
        text = str(caught.value)
        assert "\n" not in text
        return text.replace(f"{self.path.parent}/", "")


@pytest.fixture
def recipe(tmp_path: Path) -> Written:
    return Written(tmp_path / "recipe.yaml")


@pytest.fixture
def breaks(recipe: Written) -> Callable[[str, str], tuple[int, str]]:
    """Change one piece; gives the line where it stood and the error."""

    def breaks(old: str, new: str) -> tuple[int, str]:
        return recipe.change(old, new), recipe.refused()

    return breaks
