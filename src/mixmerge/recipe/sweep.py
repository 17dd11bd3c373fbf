"""Sweeps: one entry with a list of values stands for one named entry per value; `rest` is what the others leave of 1.

`baselines: {"mix-{safety}": {mixture: {general: rest, safety: {sweep: [0, 0.15, 1]}}}}` becomes mix-0, mix-0.15 and mix-1.
The key that is swept stands in braces in the entry's name, so that every candidate's name says which one it is. A sweep may
stand at any key of an expert, a baseline or a merge, once an entry. Like templates, sweeps are written out on plain YAML data
before anything is checked, and what comes of them keeps the line that it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from mixmerge.errors import RecipeError
from mixmerge.recipe.expand import GROUPS, TEMPLATE, carry_marks, marks_below
from mixmerge.yaml import KeyPath, Marks

SWEEP, REST = "sweep", "rest"


def expand_sweeps(raw: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """The recipe with every swept entry of experts, baselines and merges written out.

    Raises:
        RecipeError: an empty sweep, two in one entry, a value that gives no name, two entries with one name, or a name
            without its sweep.
    """
    out = dict(raw)
    for group in GROUPS:
        if isinstance(raw.get(group), dict):
            out[group] = _expand_group(raw[group], group, marks)
    return out


def fill_rests(raw: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """The recipe with every `rest` as a number: 1 minus the other shares of a mixture or of languages, or minus the other
    models' values of one parameter of a merge.

    Raises:
        RecipeError: two rests, others that add up to more than 1, or a model of a merge that does not give the parameter.
    """
    out = dict(raw)
    for group in ("experts", "baselines"):
        if isinstance(raw.get(group), dict):
            out[group] = {name: _fill_shares(entry, (group, name), marks) for name, entry in raw[group].items()}
    if isinstance(raw.get("merges"), dict):
        out["merges"] = {name: _fill_models(entry, ("merges", name), marks) for name, entry in raw["merges"].items()}
    return out


def _expand_group(group: dict[str, Any], title: str, marks: Marks) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, entry in group.items():
        written = [(key, entry)]
        found = list(_sweeps(entry, ()))
        words = [word for word in re.findall(r"\{(\w+)\}", key) if f"{{{word}}}" != TEMPLATE]
        if found:
            written = list(_write_out(key, entry, (title, key), found, marks))
        elif words:
            raise RecipeError(
                f"the name '{key}' speaks of a sweep of '{words[0]}', and there is none in it",
                where=marks.where((title, key)),
                do=f"write {words[0]}: {{sweep: [0.1, 0.2]}} in it, or give it another name",
            )
        for name, value in written:
            if name in out:
                raise RecipeError(f"'{name}' is there twice", where=marks.where((title, name)), do="rename one of them")
            out[name] = value
    return out


def _sweeps(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every sweep in an entry: its place in it, and its values as given."""
    if isinstance(value, dict) and set(value) == {SWEEP}:
        yield path, value[SWEEP]
    elif isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _sweeps(below, (*path, key))


def _write_out(
    key: str, entry: Any, place: KeyPath, found: list[tuple[KeyPath, Any]], marks: Marks
) -> Iterator[tuple[str, Any]]:
    (path, values), *others = found
    if others:
        both = " and ".join(".".join(map(str, one)) or SWEEP for one, _ in found[:2])
        raise RecipeError(
            f"two sweeps in one entry ({both})",
            where=marks.where((*place, *others[0][0])),
            do="keep one; a share that follows from the others is `rest`",
        )
    where = marks.where((*place, *path))
    words = [part for part in path if isinstance(part, str)]
    if not words:
        raise RecipeError("a sweep in place of the whole entry", where=where, do="sweep one of its keys")
    if not isinstance(values, list) or not values:
        raise RecipeError("a sweep is a list of at least one value", where=where, do="write {sweep: [0.1, 0.2]}")
    template = f"{{{words[-1]}}}"
    if template not in key:
        raise RecipeError(
            f"'{words[-1]}' is swept, and the name '{key}' does not say with which value",
            where=where,
            do=f"write '{key}-{template}'",
        )
    swept = (*path, SWEEP)  # its values are no part of what is written out
    below = [(rest, line) for rest, line in marks_below(marks, place) if rest[: len(swept)] != swept]
    for index, value in enumerate(values):
        spot = (*place, *path, SWEEP, index)
        name = key.replace(template, _label(value, marks.where(spot)))
        carry_marks(marks, below, (*place[:-1], name))
        if spot in marks.lines:
            marks.lines[(*place[:-1], name, *path)] = marks.lines[spot]
        yield name, _replaced(entry, path, value)


def _label(value: Any, where: str) -> str:
    """How a value is written in a name: 0.05 as 0.05, 1.0 as 1, true as true."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and math.isfinite(value):
        return repr(value).removesuffix(".0").replace("+", "")
    if isinstance(value, str) and value != REST and re.fullmatch(r"[A-Za-z0-9._-]+", value):
        return value
    raise RecipeError(f"{value!r} in a sweep cannot stand in a name", where=where, do="sweep numbers or plain words")


def _replaced(value: Any, path: KeyPath, new: Any) -> Any:
    """A copy in which `new` stands at `path`."""
    if not path:
        return new
    first, below = path[0], path[1:]
    if isinstance(value, list):
        return [_replaced(item, below, new) if index == first else item for index, item in enumerate(value)]
    return {key: _replaced(item, below, new) if key == first else item for key, item in value.items()}


def _fill_shares(entry: Any, place: KeyPath, marks: Marks) -> Any:
    if not isinstance(entry, dict):
        return entry
    filled = {
        field: _filled(entry[field], {key: (*place, field, key) for key in entry[field]}, marks)
        for field in ("mixture", "languages")
        if isinstance(entry.get(field), dict)
    }
    return entry | filled


def _fill_models(entry: Any, place: KeyPath, marks: Marks) -> Any:
    models = entry.get("models") if isinstance(entry, dict) else None
    if not isinstance(models, dict):
        return entry
    models = {name: dict(own) if isinstance(own, dict) else own for name, own in models.items()}
    parameters = {key for own in models.values() if isinstance(own, dict) for key, v in own.items() if v == REST}
    for parameter in sorted(parameters):
        values = {name: own.get(parameter) if isinstance(own, dict) else None for name, own in models.items()}
        places = {name: (*place, "models", name, parameter) for name in models}
        if (bare := next((name for name, value in values.items() if value is None), None)) is not None:
            raise RecipeError(
                f"{parameter}: rest needs that of every other model, and '{bare}' has none",
                where=marks.where(places[bare]),
                do="give it a number",
            )
        for name, value in _filled(values, places, marks).items():
            models[name][parameter] = value
    return entry | {"models": models}


def _filled(values: Mapping[str, Any], places: Mapping[str, KeyPath], marks: Marks) -> dict[str, Any]:
    """Numbers with the one `rest` among them worked out in decimal, so that 1 - 0.9 is 0.1; others are left as they are."""
    rests = [key for key, value in values.items() if value == REST]
    numbers = [value for key, value in values.items() if key not in rests]
    if len(rests) > 1:
        raise RecipeError(f"'{rests[0]}' and '{rests[1]}' are both rest", where=marks.where(places[rests[1]]))
    if not rests or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        return dict(values)  # what is no number is the schema's to refuse
    others = sum((Decimal(repr(value)) for value in numbers), Decimal(0))
    if others > 1:
        raise RecipeError(
            f"the others add up to {others}, so nothing is left for the rest",
            where=marks.where(places[rests[0]]),
            do="shares beside a rest are fractions of 1",
        )
    return dict(values) | {rests[0]: float(1 - others)}
