"""YAML 1.2 with the line of every key, so that an error can point at the place in the file.

`read_yaml` gives plain dicts, lists and scalars plus a `Marks` table from key path to line. YAML 1.2 (ruamel)
because YAML 1.1 readers turn `no` (Norwegian) into false and `1e-5` into text. Duplicate keys are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.parser import Parser
from ruamel.yaml.scanner import Scanner

from mixmerge.errors import RecipeError

KeyPath = tuple[str | int, ...]
_DEEPEST, _MOST = 64, 200_000  # levels and values of a document, with every alias written out


@dataclass(frozen=True, slots=True)
class Marks:
    """Where each key stands: `file` as the user named it, and the 1-based line of every key path.

    A key that came from somewhere else than the file (an option of the command line) has that place's name for a line.
    """

    file: str
    lines: dict[KeyPath, int | str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`file:line: a.b.0`, with the line of the nearest marked ancestor where the path itself has none."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                line = self.lines[path[:end]]
                place = line if isinstance(line, str) else f"{self.file}:{line}"
                break
        else:
            place = self.file
        return f"{place}: {dotted(path)}" if path else place


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def read_yaml(path: Path) -> tuple[dict[str, Any], Marks]:
    """The one document of a YAML file and its marks.

    Raises:
        RecipeError: unreadable file, broken YAML, duplicate key, or a top level that is not a mapping.
    """
    documents = list(read_yaml_documents(path))
    if len(documents) != 1:
        raise RecipeError(f"{len(documents)} YAML documents, expected one", where=str(path))
    return documents[0]


def read_yaml_documents(path: Path) -> Iterator[tuple[dict[str, Any], Marks]]:
    """Each document of a YAML file with its marks; raises as `read_yaml`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"cannot read the file: {reason}", where=str(path)) from error
    try:
        documents = list(_reader().load_all(text))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        problem = (error.problem or "broken YAML").strip()
        raise RecipeError(problem, where=f"{path}:{line}") from error
    except YAMLError as error:
        raise RecipeError(f"broken YAML: {error}", where=str(path)) from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=str(path)) from error
    for node in documents:
        if not isinstance(node, CommentedMap):
            raise RecipeError("the top level must be a mapping of keys to values", where=str(path))
        marks = Marks(str(path))
        _refuse_bomb(node, str(path))
        plain = _plain(node, (), marks)
        yield plain, marks


def _reader() -> YAML:
    """ruamel's reader that keeps the places of keys, without the comments, which take a fifth of its time."""
    reader = YAML(typ="rt")
    reader.Scanner, reader.Parser = Scanner, Parser
    return reader


def read_value(text: str) -> Any:
    """One YAML value as plain data; raises ruamel's YAMLError."""
    return _plain(YAML(typ="rt").load(text), (), Marks(""))


def _refuse_bomb(node: Any, file: str) -> None:
    """Refuse a document that its aliases blow up, or that holds itself."""
    values, level = 0, [node]
    for _ in range(_DEEPEST):
        values += len(level)
        tags = (one.tag.value for one in level if isinstance(one, CommentedMap | CommentedSeq | TaggedScalar))
        if tag := next((tag for tag in tags if tag is not None), None):
            raise RecipeError(f"the tag {tag} is not understood", where=file, do="write plain values")
        if values > _MOST:
            raise RecipeError(f"more than {_MOST:,} values, with every alias written out", where=file)
        level = [
            below
            for one in level
            if isinstance(one, CommentedMap | CommentedSeq)
            for below in (one.values() if isinstance(one, CommentedMap) else one)
        ]
        if not level:
            return
    raise RecipeError(f"nested more than {_DEEPEST} levels deep", where=file)


def _plain(node: Any, path: KeyPath, marks: Marks) -> Any:
    if isinstance(node, CommentedMap):
        out: dict[str, Any] = {}
        for key, value in node.items():
            below = (*path, str(key))
            if key in (node.lc.data or {}):  # a key that `<<` merged in has no place of its own: its mapping's is shown
                marks.lines[below] = node.lc.key(key)[0] + 1
            out[str(key)] = _plain(value, below, marks)
        return out
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            marks.lines[(*path, index)] = node.lc.item(index)[0] + 1
        return [_plain(value, (*path, index), marks) for index, value in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)
