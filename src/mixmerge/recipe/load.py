"""Read a recipe: YAML with line marks, `--set` overrides, sweeps, templates, schema, then everything that refers to something.

A mistake becomes one `RecipeError` that says file, line, key and what to do. Nothing heavy is imported and no data is
read here: what depends on files is checked when the plan is made.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.error import YAMLError

from mixmerge.errors import RecipeError, did_you_mean
from mixmerge.merge.config import MergeConfig, parse_config
from mixmerge.recipe.budgets import budget_of
from mixmerge.recipe.expand import expand_templates
from mixmerge.recipe.schema import Merge, Recipe, Trained
from mixmerge.recipe.sweep import expand_sweeps, fill_rests
from mixmerge.yaml import KeyPath, Marks, read_value, read_yaml


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, where each of its keys stands, and the folder that its relative paths start from."""

    recipe: Recipe
    marks: Marks
    folder: Path
    path: Path


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe; each override is `key.path=value`, the value in YAML.

    Raises:
        RecipeError: anything that is wrong in the file, with its line.
    """
    path = Path(path)
    raw, marks = read_yaml(path)
    for override in overrides:
        _override(raw, override, marks)
    raw = fill_rests(expand_templates(expand_sweeps(raw, marks), marks), marks)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error.errors(), raw, marks) from None
    _check_references(recipe, marks)
    return LoadedRecipe(recipe, marks, path.resolve().parent, path)


def merge_config(name: str, merge: Merge, marks: Marks | None = None) -> MergeConfig:
    """The merge as a mergekit-style configuration whose models are candidate names.

    Raises:
        RecipeError: unknown method or parameter, value out of range, wrong number of models.
    """
    base = merge.base
    models = dict(merge.models)
    if base is None and merge.method == "slerp":
        base = next(iter(models), None)
    elif base is None and merge.method != "linear":
        base = "base"
    config: dict[str, Any] = {"merge_method": merge.method, "parameters": merge.parameters}
    config["models"] = [{"model": model, "parameters": own} for model, own in models.items()]
    if base is not None:
        config["base_model"] = base
    if merge.dtype is not None:
        config["dtype"] = merge.dtype
    names = list(models)

    class RecipeMarks(Marks):
        """Shows a place in the configuration as the place in the recipe that it came from."""

        def where(self, path: KeyPath) -> str:
            if path[:1] == ("models",) and len(path) > 1 and isinstance(path[1], int):
                path = ("models", names[path[1]], *path[3:])
            renamed = {"merge_method": "method", "base_model": "base"}
            path = (renamed.get(str(path[0]), path[0]), *path[1:]) if path else path
            return (marks or Marks("recipe")).where(("merges", name, *path))

    return parse_config(config, RecipeMarks("recipe"))


def _override(raw: dict[str, Any], override: str, marks: Marks) -> None:
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not key:
        raise RecipeError("expected key.path=value", where=where)
    path = tuple(key.split("."))
    node: Any = raw
    for depth, part in enumerate(path[:-1], start=1):
        if part not in node:
            node[part] = {}
            marks.lines[path[:depth]] = "--set"
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"{'.'.join(path[:depth])} is not a mapping", where=where)
    try:
        node[path[-1]] = read_value(text)
    except YAMLError as error:
        raise RecipeError("the value is not YAML", where=where) from error
    for old in [mark for mark in marks.lines if mark[: len(path)] == path]:
        del marks.lines[old]  # what stood there is gone
    marks.lines[path] = "--set"


def _explain(errors: Sequence[ErrorDetails], raw: Any, marks: Marks) -> RecipeError:
    """The first mistake as one line; the others are counted. A misspelt key goes before the key that it leaves missing."""
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
    do = None
    if error["type"] == "extra_forbidden":
        what = f"unknown key '{path[-1]}'"
        do = did_you_mean(str(path[-1]), _known_keys(Recipe, path[:-1]))
    elif error["type"] == "missing":
        what, do = f"'{path[-1]}' is missing", "add it"
        path = path[:-1]
        if path and marks.lines.get(path) == "--set":  # `--set merges.tis.x=1` made an entry of a misspelt name
            names = [name for name in reduce(getitem, path[:-1], raw) if name != path[-1]]
            what, do = f"no '{path[-1]}' in the recipe, and {what}", did_you_mean(str(path[-1]), names)
    elif error["type"] == "string_pattern_mismatch":
        what = (
            f"{error['input']!r} is not a valid {'language code' if 'a-z]{2,3}' in str(error.get('ctx')) else 'name'}"
        )
        do = (
            "use letters, digits, '.', '_' and '-', one of the first two first"
            if "name" in what
            else "use an ISO 639-1 code such as en"
        )
    elif error["type"] in ("less_than", "less_than_equal") and 1 < error["input"] <= 100 == 100 * _limit(error):
        what, do = (
            f"{error['msg']} (given: {error['input']!r})",
            f"for {error['input']} percent write {error['input'] / 100:g}",
        )
    else:
        hidden = error["type"] == "secret" or isinstance(error["input"], dict | list)
        given = "" if hidden else f" (given: {error['input']!r})"
        mapping = error["type"] in ("model_type", "dict_type")
        what = (
            "expected a mapping of keys to values" if mapping else error["msg"].removeprefix("Value error, ")
        ) + given
    if len(errors) > 1:
        do = f"{do + ' ' if do else ''}({len(errors) - 1} more after this one)"
    return RecipeError(what, where=marks.where(path), do=do)


def _limit(error: ErrorDetails) -> float:
    """The number that a value had to stay below."""
    limits = error.get("ctx", {})
    return float(limits.get("lt", limits.get("le", math.inf)))


def _known_keys(model: Any, path: KeyPath) -> Iterable[str]:
    """The keys that the mapping at `path` may have."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        else:
            model = get_args(model)[-1]
        if get_origin(model) in (Union, UnionType):
            model = next(arg for arg in get_args(model) if arg is not type(None))
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _check_references(recipe: Recipe, marks: Marks) -> None:
    seen: dict[str, str] = {"base": "base"}
    groups = {group: getattr(recipe, group) for group in ("adopted", "experts", "baselines", "merges")}
    for group, entries in groups.items():
        for name in entries:
            if name in seen:
                raise RecipeError(
                    f"the name '{name}' is taken by {seen[name]}", where=marks.where((group, name)), do="rename one"
                )
            seen[name] = f"{group}.{name}"
    if len(seen) == 1:
        what = "no experts, adopted models, baselines or merges"
        raise RecipeError(what, where=marks.file, do="add at least one candidate")
    for name, adopted in recipe.adopted.items():
        _known_name(adopted.start, seen, ("adopted", name, "start"), marks)
    for group, trained in (("experts", recipe.experts), ("baselines", recipe.baselines)):
        for name, entry in trained.items():
            _check_trained(recipe, (group, name), entry, seen, marks)
    for name, merge in recipe.merges.items():
        for model in merge.models:
            _known_name(model, seen, ("merges", name, "models", model), marks)
        if merge.base is not None:
            _known_name(merge.base, seen, ("merges", name, "base"), marks)
        merge_config(name, merge, marks)
    for data, sets in recipe.evaluation.overlap.parallel.items():
        path: KeyPath = ("evaluation", "overlap", "parallel", data)
        _known_name(data, recipe.data, path, marks, "data set")
        for index, name in enumerate(sets):
            _known_name(name, recipe.evaluation.prompts, (*path, index), marks, "prompt set")
    _check_cycles(recipe, marks)


def _check_trained(recipe: Recipe, path: KeyPath, entry: Trained, seen: dict[str, str], marks: Marks) -> None:
    objectives = {data.objective for data in recipe.data.values()}
    if not objectives:
        raise RecipeError("no data to train on", where=marks.where(path), do="add data sets under 'data'")
    for objective in entry.mixture:
        if objective not in objectives:
            _refuse_misspelt_objective(recipe, objective, marks)
        _known_name(objective, objectives, (*path, "mixture", objective), marks, "objective")
    for code in entry.languages:
        _known_name(code, recipe.languages, (*path, "languages", code), marks, "language")
    _known_name(entry.start, seen, (*path, "start"), marks)
    for key in ("caps", "max_repeats"):
        _check_parts(recipe, (*path, key), getattr(entry, key), entry, marks)
    budget_of(recipe, str(path[1]), marks)


def _check_parts(recipe: Recipe, path: KeyPath, parts: Iterable[str], entry: Trained, marks: Marks) -> None:
    """Names of parts of a mixture: all languages, all objectives, or all cells, so that no cell is in two of them."""
    languages = list(entry.languages) or recipe.languages
    cells = [f"{objective}/{code}" for objective in entry.mixture for code in languages]
    kinds = {"a language": languages, "an objective": list(entry.mixture), "a cell": cells}
    first: tuple[str, str] | None = None
    for name in parts:
        kind = next((kind for kind, known in kinds.items() if name in known), None)
        if kind is None:
            known = [*languages, *entry.mixture, *(cells if "/" in name else ())]
            _known_name(name, known, (*path, name), marks, "language, objective or cell")
        first = first or (name, str(kind))
        if kind != first[1]:
            raise RecipeError(
                f"'{first[0]}' is {first[1]} and '{name}' {kind}, so a row could be under both",
                where=marks.where((*path, name)),
                do="name languages, or objectives, or cells such as safety/en",
            )


def _refuse_misspelt_objective(recipe: Recipe, wanted: str, marks: Marks) -> None:
    """Refuse a data set whose objective no mixture uses, where it looks like the one that `wanted` lacks.

    Of two that differ, the data set's is taken for the misspelt one if several mixtures or the data set's name say `wanted`.
    """
    trained = [*recipe.experts.values(), *recipe.baselines.values()]
    used = [objective for entry in trained for objective in entry.mixture]
    for name, data in recipe.data.items():
        alike = data.objective not in used and difflib.get_close_matches(data.objective, [wanted])
        if alike and (name == wanted or used.count(wanted) > 1):
            raise RecipeError(
                f"'{wanted}' is used in mixtures, and the data set '{name}' has objective '{data.objective}'",
                where=marks.where(("data", name, "objective")),
                do=f"write objective: {wanted}",
            )


def _known_name(name: str, known: Iterable[str], path: KeyPath, marks: Marks, kind: str = "candidate") -> None:
    if name not in known:
        raise RecipeError(f"unknown {kind} '{name}'", where=marks.where(path), do=did_you_mean(name, known))


def _check_cycles(recipe: Recipe, marks: Marks) -> None:
    needs = recipe.needs()
    done = {"base"}
    while left := [name for name in needs if name not in done]:
        free = [name for name in left if done.issuperset(needs[name])]
        if not free:
            while waiting := [name for name in left if not any(name in needs[other] for other in left)]:
                left = [name for name in left if name not in waiting]  # they only wait for the cycle
            group = next(g for g in ("adopted", "experts", "baselines", "merges") if left[0] in getattr(recipe, g))
            what = f"'{left[0]}' needs itself" if len(left) == 1 else f"candidates need each other: {', '.join(left)}"
            raise RecipeError(what, where=marks.where((group, left[0])), do="start from another candidate")
        done.update(free)
