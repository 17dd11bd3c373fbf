"""Writing an adopted model into a recipe: one line under `adopted`, all else left as it stands, comments included.

The one idea: the recipe stays the only truth, so the command edits its text and checks the result before it is put in place.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mixmerge.errors import RecipeError, UserError
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.section import NAME
from mixmerge.yaml import read_yaml


def adopt_into(
    recipe: Path, name: str, place: str, *, revision: str | None = None, start: str | None = None
) -> tuple[str, RecipeError | None]:
    """Add the model or adapter at `place`, a folder that is there or else a Hub id, as the candidate `name`.

    Gives its line, and what else is still wrong with a recipe that was not whole before. The file is replaced whole.

    Raises:
        UserError: a name that cannot be or is taken, a folder that is not there, a recipe that the line does not fit.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{name!r} is not a valid name", do="use letters, digits, '.', '_' and '-', one of the first two first"
        )
    folder = Path(place).expanduser()
    local = is_local(place)
    if local and not folder.is_dir():
        raise UserError("no such folder", where=place, do="give a folder, or a Hub id such as org/name")
    first, _, rest = place.partition("/")
    if not local and "/" in rest:
        what = "no such folder, and no Hub id, which is org/name"
        raise UserError(what, where=place, do="give the folder of a model or of an adapter")
    if not local and rest and revision is None and Path(first).is_dir():
        what = f"the folder '{first}' is here and has no '{rest}'"
        raise UserError(what, where=place, do="correct the path; a Hub id of that name needs --revision, e.g. main")
    told = {"path": _from(recipe.resolve().parent, folder.resolve())} if local else {"hub": place}
    told |= {key: value for key, value in (("revision", revision), ("start", start)) if value is not None}
    line = f"{name}: {{{', '.join(f'{key}: {_quoted(value)}' for key, value in told.items())}}}"
    written = _insert(recipe, name, line).encode()
    left = _mistake(recipe)
    file = recipe.resolve()  # of a link, what it stands for is written
    growing = file.with_name(f".{file.name}.{os.getpid()}.tmp")

    def named(error: RecipeError) -> str:
        return (error.where or "").replace(str(growing), str(recipe))

    try:
        _write(growing, written, recipe)
        if name not in (read_yaml(growing)[0].get("adopted") or {}):
            raise RecipeError("no place for 'adopted' was found", where=str(recipe), do=f"write there: {line}")
        found = _mistake(growing)
        if found is not None:
            found = found.again(where=named(found))
            if left is None or f": adopted.{name}" in (found.where or ""):
                raise found
        growing.replace(file)
    except RecipeError as error:
        raise error.again(where=named(error)) from error
    finally:
        growing.unlink(missing_ok=True)
    return line, found


def _write(growing: Path, data: bytes, recipe: Path) -> None:
    try:
        growing.write_bytes(data)
    except OSError as error:
        error.filename = str(recipe)  # not that of a file which is gone by the time that a person reads it
        raise


def is_local(place: str) -> bool:
    """Whether what `adopt` is given is a folder; a Hub id otherwise."""
    return place.startswith((".", "/", "~")) or Path(place).is_dir()


def _mistake(recipe: Path) -> RecipeError | None:
    try:
        load_recipe(recipe)
    except RecipeError as error:
        return error
    return None


def _insert(recipe: Path, name: str, line: str) -> str:
    """The recipe's text with the line under `adopted`, which is made where it is not there."""
    raw, marks = read_yaml(recipe)
    if name in (raw.get("adopted") or {}):
        what, place = f"'{name}' is adopted already", marks.where(("adopted", name))
        raise RecipeError(what, where=place, do="give another name, or correct that line")
    text = recipe.read_bytes().decode()
    lines = [part if part.endswith("\n") else f"{part}\n" for part in text.splitlines(keepends=True)]
    end = "\r\n" if "\r\n" in text else "\n"
    if "adopted" not in raw:
        return f"{text.rstrip()}{end}{end}adopted:                         # trained elsewhere{end}  {line}{end}"
    at = int(marks.lines[("adopted",)])
    entries = [int(place) for path, place in marks.lines.items() if path[:1] == ("adopted",) and len(path) == 2]
    if re.search(r"adopted\s*:\s*[{\w]", lines[at - 1]) or at in entries:
        raise RecipeError("'adopted' is written in one line", where=marks.where(("adopted",)), do=f"add to it: {line}")
    first = lines[min(entries) - 1] if entries else "  "
    indent = first[: len(first) - len(first.lstrip())]
    return "".join([*lines[:at], f"{indent}{line}{end}", *lines[at:]])


def _from(folder: Path, model: Path) -> str:
    """The model's path as the recipe should write it: relative where both lie together."""
    if model.is_relative_to(folder):
        return f"./{model.relative_to(folder)}"
    return str(model)


def _quoted(value: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_./@+-]*", value) and not re.fullmatch(
        r"[\d.eE+-]+|true|false|null|~", value
    )
    return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
