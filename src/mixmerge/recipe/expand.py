"""Templates: one entry named with `{lang}` stands for one entry per language of the recipe.

`experts: {"only-{lang}": {mixture: general, languages: ["{lang}"]}}` becomes only-en, only-fr, ...; the same holds for
baselines, merges, and the models inside a merge. Expansion happens on plain YAML data, before anything is checked, and
carries the line of the template over to what it became.
"""

from __future__ import annotations

from typing import Any

from mixmerge.errors import RecipeError
from mixmerge.yaml import KeyPath, Marks

TEMPLATE = "{lang}"
GROUPS = ("adopted", "experts", "baselines", "merges")


def expand_templates(raw: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """The recipe with every `{lang}` entry of adopted models, experts, baselines, merges and merge models written out.

    Raises:
        RecipeError: two entries that end with the same name.
    """
    languages = raw.get("languages")
    if not isinstance(languages, list) or not all(isinstance(code, str) for code in languages):
        return raw
    languages = list(dict.fromkeys(languages))
    out = dict(raw)
    for group in GROUPS:
        if isinstance(raw.get(group), dict):
            out[group] = _expand_keys(raw[group], (group,), languages, marks)
    for name, merge in out["merges"].items() if isinstance(out.get("merges"), dict) else ():
        if isinstance(merge, dict) and isinstance(merge.get("models"), dict | list):
            path: KeyPath = ("merges", name, "models")
            models = merge["models"]
            if isinstance(models, list):
                models = [_substitute(model, code) for model in models for code in _codes(model, languages)]
            else:
                models = _expand_keys(models, path, languages, marks)
            out["merges"][name] = merge | {"models": models}
    return out


def _codes(value: Any, languages: list[str]) -> list[str]:
    return languages if isinstance(value, str) and TEMPLATE in value else [""]


def _expand_keys(group: dict[str, Any], path: KeyPath, languages: list[str], marks: Marks) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in group.items():
        below = marks_below(marks, (*path, key)) if TEMPLATE in key else []
        for code in _codes(key, languages):
            name = key.replace(TEMPLATE, code)
            if name in out:
                raise RecipeError(f"'{name}' is there twice", where=marks.where((*path, key)), do="rename one of them")
            out[name] = _substitute(value, code) if TEMPLATE in key else value
            if name != key:
                carry_marks(marks, below, (*path, name), code)
    return out


def _substitute(value: Any, code: str) -> Any:
    if isinstance(value, str):
        return value.replace(TEMPLATE, code)
    if isinstance(value, dict):
        return {key.replace(TEMPLATE, code): _substitute(item, code) for key, item in value.items()}
    return [_substitute(item, code) for item in value] if isinstance(value, list) else value


Below = list[tuple[KeyPath, int | str]]


def marks_below(marks: Marks, path: KeyPath) -> Below:
    """The lines of everything at and below a path, by the rest of its path; looked for once, however often it is carried."""
    length = len(path)
    return [(found[length:], line) for found, line in marks.lines.items() if found[:length] == path]


def carry_marks(marks: Marks, below: Below, new: KeyPath, code: str = TEMPLATE) -> None:
    """Give everything below `new` the lines of what it was written out from; `code` is what `{lang}` became."""
    for path, line in below:
        if code != TEMPLATE:
            path = tuple(p.replace(TEMPLATE, code) if isinstance(p, str) else p for p in path)
        marks.lines.setdefault(new + path, line)
