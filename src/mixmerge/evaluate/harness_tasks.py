"""Tasks of lm-evaluation-harness by name: what defines them, found without importing the harness.

The harness parses some 14,000 YAML files before it knows a name, in ten seconds; reading only the lines that name tasks,
groups, tags and includes takes one or two, and gave the same names, files and tags for all 14,683 of lm-eval 0.4.13. The
user's own folder may be written in any style: what those lines do not show there, the harness is asked for. Own tasks
hide those of the harness with the same names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from mixmerge.errors import DataError, UserError, did_you_mean, reason

INSTALL = "pip install 'mixmerge[lm-eval]'"
# Readers of local files that `datasets` brings: such a `dataset_path` is no id on the Hub.
READERS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml")
IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # as the harness ignores them
MOST_INCLUDES = 20  # a definition that includes itself is refused when it is read whole

_KEY = re.compile(
    r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*(.*(?:\n(?:[ \t]*-[ \t].*|[ \t]*#.*|[ \t]*))*)""", re.M
)
_ITEM = re.compile(r"""^[ \t]*(?:-[ \t]+)?["']?([^\s"'#\[\]{},:][^"'#\[\]{},:\n]*?)["']?[ \t]*(?:#.*)?$""", re.M)


Keys = dict[str, tuple[str, ...]]  # key -> names under it
Names = Mapping[str, Path | tuple[str, ...]]  # a task's or group's file, or the tasks of a tag


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """What the harness would run under a name, as far as it can be told without running it.

    members: the tasks of a group or tag, empty for a task itself. config: sha256 of the YAML with its includes, paths of
    data left out. data: sha256 of every local data file. code: file -> sha256 of the Python files beside a task of the
    user's own; those of the harness belong to its version. hub: data sets on the Hub; what they hold is not known here.
    """

    name: str
    own: bool
    version: str | None = None
    config: str | None = None
    members: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    code: tuple[tuple[str, str], ...] = ()
    hub: tuple[str, ...] = ()


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> dict[str, TaskDefinition]:
    """Every named task, and the tasks of every named group or tag, by name; no model and no data set is loaded.

    include_path: a folder with the user's own tasks; relative data files in them are read from this folder.

    Raises:
        UserError: the harness is not installed; no task named; a name that neither the folder nor the harness knows; a task
            that runs what the model wrote, or that shows images or sound.
        DataError: a definition that cannot be read, or whose local data files are missing.
    """
    if not tasks:
        raise UserError("no task of lm-evaluation-harness is named", do="name at least one")
    catalogue = _Catalogue(include_path)
    found: dict[str, TaskDefinition] = {}
    waiting = list(dict.fromkeys(tasks))
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = catalogue.define(name)
            waiting += found[name].members
    return found


def identity(definitions: Mapping[str, TaskDefinition]) -> dict[str, Any]:
    """What of the tasks decides their results, as plain JSON: the harness' version and each definition, no path.

    A data set on the Hub enters by its id, and by its revision where the task pins one; few tasks do.
    """
    tasks = {name: asdict(definition) for name, definition in sorted(definitions.items())}
    plain: dict[str, Any] = json.loads(json.dumps({"lm_eval": lm_eval_version(), "tasks": tasks}))
    return plain


def lm_eval_version() -> str:
    """Raises: UserError: the harness is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the package 'lm-eval' is not installed", do=INSTALL) from None


class _Catalogue:
    """Names to definitions: by the lines of the user's folder, of the harness, then by the harness' reading of the folder."""

    def __init__(self, include_path: Path | None) -> None:
        lm_eval_version()
        self.folder = include_path
        if include_path is not None and not include_path.is_dir():
            raise UserError("no such folder of tasks", where=str(include_path), do="check include_path")
        self.own: Names = {} if include_path is None else _named_in(include_path)

    @property
    def shipped(self) -> Names:
        return _shipped()

    @cached_property
    def listed(self) -> Names:
        if self.folder is None:
            return {}
        from lm_eval.tasks import TaskManager

        index = TaskManager(include_defaults=False, include_path=str(self.folder)).task_index
        return {name: entry.yaml_path or tuple(sorted(entry.tags)) for name, entry in index.items()}

    def find(self, name: str) -> Path | tuple[str, ...] | None:
        for names in ("own", "shipped", "listed"):
            if found := getattr(self, names).get(name):
                return cast(Path | tuple[str, ...], found)
        return None

    def define(self, name: str) -> TaskDefinition:
        found = self.find(name)
        if found is None:
            where = "lm-evaluation-harness" if self.folder is None else str(self.folder)
            raise UserError(f"unknown task {name!r}", where=where, do=did_you_mean(name, [*self.own, *self.shipped]))
        if isinstance(found, tuple):
            return TaskDefinition(name, own=name in self.own, members=found)
        own = self.folder is not None and found.resolve().is_relative_to(self.folder.resolve())
        return _definition(name, found, own, self.folder or Path.cwd(), lambda member: self.find(member) is not None)


@cache
def _shipped() -> Names:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package 'lm-eval' is damaged", do=INSTALL)
    return _named_in(Path(spec.submodule_search_locations[0]) / "tasks")


def _named_in(folder: Path) -> Names:
    """Tasks and groups with their files, and tags with their tasks, by the lines that name them.

    Of two files with one name in a folder the harness takes the first.
    """
    read = cache(_keys)
    named: dict[str, Path] = {}
    tagged: dict[str, list[str]] = {}
    files = (path for path in folder.rglob("*.yaml") if not IGNORED.intersection(path.parts))
    for path in sorted(files, key=lambda path: path.as_posix()):
        keys = _with_includes(path, read, 0)
        group = keys.get("group", ()) if "class" not in keys else ()
        for name in (group or keys.get("task", ()))[:1]:
            if name not in named:
                named[name] = path
                for tag in () if group else keys.get("tag", ()):
                    tagged.setdefault(tag, []).append(name)
    return {tag: tuple(sorted(tasks)) for tag, tasks in tagged.items() if tag not in named} | named


def _keys(path: Path) -> Keys:
    """Names under the keys at the left edge of a YAML file; a file that is not there has none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    return {key: _items(value) for key, value in _KEY.findall(text)}


def _items(value: str) -> tuple[str, ...]:
    first, _, rest = value.partition("\n")
    if first.lstrip().startswith("["):
        first, rest = first.strip().strip("[]").replace(",", "\n"), ""
    return tuple(_ITEM.findall(first + "\n" + rest))


def _with_includes(path: Path, read: Callable[[Path], Keys], depth: int) -> Keys:
    keys: Keys = read(path)
    if "include" not in keys or depth > MOST_INCLUDES:
        return keys
    merged: Keys = {}
    for each in keys["include"]:
        merged |= _with_includes(path.parent / each, read, depth + 1)
    return merged | keys


def _definition(name: str, path: Path, own: bool, base: Path, known: Callable[[str], bool]) -> TaskDefinition:
    config = _read(path, [])
    if isinstance(config.get("group"), str) and "class" not in config:
        members = tuple(dict.fromkeys(_members(config.get("task"), known)))
        return TaskDefinition(name, own, _version(config), _digest(config), members)
    if config.get("unsafe_code"):
        raise UserError(f"task {name!r} runs code that the model writes", where=str(path), do="leave it out")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise UserError(f"task {name!r} shows images or sound", where=str(path), do="name tasks of text")
    options = dict(config.get("dataset_kwargs") or {})
    sources = {key: options.pop(key) for key in ("data_files", "data_dir") if key in options}
    config["dataset_kwargs"] = options
    files, remote = _data(config.get("dataset_path"), sources, base, path)
    if remote and (revision := options.get("revision")):
        remote = [f"{each}@{revision}" for each in remote]
    code = sorted(path.parent.rglob("*.py")) if own else []
    return TaskDefinition(
        name,
        own,
        _version(config),
        _digest(config),
        data=tuple(sorted(map(_sha256, files))),
        code=tuple((file.relative_to(path.parent).as_posix(), _sha256(file)) for file in code),
        hub=tuple(remote),
    )


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    """A definition with its includes under it; functions stay the text that names them."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """A loader of its own, so that no other is taught the tag."""

    Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")
    path = path.resolve()
    if path in seen:
        raise DataError("the definition includes itself", where=str(path))
    seen.append(path)
    try:
        config = yaml.load(path.read_bytes(), Loader=Loader)
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"cannot read the task's definition: {reason(error)}", where=str(path)) from error
    if not isinstance(config, dict):
        raise DataError(f"a task's definition is a mapping, not {type(config).__name__}", where=str(path))
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        merged |= _read(path.parent / each, seen)
    merged.pop("task_list", None)
    return merged | config


def _members(listed: Any, known: Callable[[str], bool]) -> Iterator[str]:
    """Names in a group's list; a task that the group itself defines is no name of its own."""
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("group"), str):
            if known(item["group"]):
                yield item["group"]
            else:
                yield from _members(item.get("task"), known)
        elif isinstance(item, dict) and isinstance(item.get("task"), str) and known(item["task"]):
            yield item["task"]


def _data(dataset: Any, sources: Mapping[str, Any], base: Path, where: Path) -> tuple[list[Path], list[str]]:
    """Local files that a task reads, and what it reads from elsewhere."""
    local, remote = [], []
    if isinstance(dataset, str) and dataset not in READERS:
        folder = base / Path(dataset).expanduser()
        if folder.is_dir():
            local += sorted(path for path in folder.rglob("*") if path.is_file())
        else:
            return [], [dataset]  # data_files of a data set on the Hub stand there too
    for text in _texts(sources):
        if "://" in text:
            remote.append(text)
            continue
        place = base / Path(text).expanduser()
        if place.is_dir():
            found = sorted(path for path in place.rglob("*") if path.is_file())
        else:
            found = (
                [place] if place.is_file() else sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
            )
        if not found:
            raise DataError(f"the task's data file {place} is not there", where=str(where))
        local += found
    return local, remote


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _version(config: Mapping[str, Any]) -> str | None:
    metadata = config.get("metadata")
    return str(metadata["version"]) if isinstance(metadata, dict) and "version" in metadata else None


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
