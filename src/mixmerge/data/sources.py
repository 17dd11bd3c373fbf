"""Where rows come from: local files, packaged starter files, or a Hub data set.

One idea: every record comes with the place it stands at (`file:row`), so that any later complaint can name it.
`row` is the line of a JSONL file and the record's 1-based number elsewhere. Nothing is guessed: a path that does not
resolve for a language is a `DataError`, and a record that cannot be read is a `RowError` in its place.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mixmerge.data.account import RowError
from mixmerge.data.files import READERS, Record, read_file
from mixmerge.data.hub import commit, hub_records, local_folder
from mixmerge.errors import DataError, did_you_mean
from mixmerge.hashes import file_sha256

STARTER = "starter:"


@dataclass(frozen=True, slots=True)
class DataSource:
    """One `data` entry of a recipe: either `path` (with `{lang}` where there is a file a language) or a `hub` id.

    `lang` fixes the language of everything in the source, `lang_column` names the column that says it row by row;
    `columns` maps our column names to those of the file. `{lang}` is also replaced in `config` and `split`.
    `limit` is the number of rows per language to stop at, in file order; `streaming` fetches no more of a Hub data set
    than is read.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    lang: str | None = None
    lang_column: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    streaming: bool = False
    bad_rows: Literal["refuse", "drop"] = "refuse"
    wrong_language: Literal["report", "drop", "refuse"] = "report"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise DataError(
                "a data source has both a path and a hub id"
                if self.path
                else "a data source has no path and no hub id",
                do="give either 'path' or 'hub'",
            )

    @property
    def name(self) -> str:
        """The source as the user wrote it."""
        return self.path if self.path is not None else f"hub:{self.hub}"

    def has_file_per_language(self) -> bool:
        return any("{lang}" in (part or "") for part in (self.path, self.config, self.split))

    def choices(self) -> dict[str, str | int]:
        """What was chosen beside the defaults that can change which rows the source gives, for an identity."""
        dropped = {key: "drop" for key in ("bad_rows", "wrong_language") if getattr(self, key) == "drop"}
        given = {"lang_column": self.lang_column, "limit": self.limit}
        return {key: value for key, value in given.items() if value is not None} | dropped

    def readings(self, languages: Sequence[str]) -> list[tuple[str | None, list[str]]]:
        """How often the source is to be read, and for which of its languages each time.

        Raises:
            DataError: as `source_languages`.
        """
        covered = source_languages(self, languages)
        if self.lang_column is not None and not self.has_file_per_language():
            return [(None, covered)] if covered else []
        return [(lang, [lang]) for lang in covered]


def source_languages(source: DataSource, languages: Sequence[str]) -> list[str]:
    """The languages of `languages` that the source can give: all, or its own `lang` if that is among them.

    Raises:
        DataError: several languages, but neither a `{lang}` in the source nor a `lang` or `lang_column` of its own.
    """
    if source.lang is not None:
        return [source.lang] if source.lang in languages else []
    if len(languages) > 1 and source.lang_column is None and not source.has_file_per_language():
        what, place = ("file", "path") if source.hub is None else ("Hub data set", "config or split")
        raise DataError(
            f"one {what} for {len(languages)} languages ({', '.join(languages)})",
            where=source.name,
            do=f"write {{lang}} where the language code stands in its {place}, or give the source its own 'lang' or "
            "a 'lang_column'",
        )
    return list(languages)


def resolve(path: str, *, lang: str | None, relative_to: Path) -> Path:
    """The existing file that `path` means for `lang`.

    `starter:x` is the packaged starter file x; other paths are relative to the folder `relative_to`.

    Raises:
        DataError: a `{...}` other than `{lang}`, or no such file; names language and path.
    """
    filled = _fill(path, lang)
    if filled.startswith(STARTER):
        below = filled.removeprefix(STARTER)
        root = Path(str(importlib.resources.files("mixmerge"))) / "starter"
        file = root / below
        if ".." in Path(below).parts or Path(below).is_absolute():
            raise DataError("a starter path may not leave the starter data", where=path)
    else:
        file = relative_to / Path(filled).expanduser()
    if file.is_dir():
        raise DataError("a folder, not a file", where=str(file), do=f"name a file in it: {', '.join(READERS)}")
    if not file.is_file():
        what = "no such file" if lang is None else f"no file for language '{lang}': {file} does not exist"
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        advice = did_you_mean(file.name, near) if near else f"the folder {file.parent} does not exist"
        raise DataError(what, where=path if lang is not None else str(file), do=advice)
    return file


def read_records(source: DataSource, lang: str | None, relative_to: Path) -> Iterator[tuple[str, Record]]:
    """Yield (`file:row`, raw record) of a source, for one language where it has a file a language.

    Raises:
        DataError: missing file, unknown file type, a damaged file, or a Hub data set that cannot be loaded.
        RowError: broken UTF-8, broken JSON, ragged CSV, a record that is no object.
    """
    for where, record in read_each(source, lang, relative_to):
        if isinstance(record, RowError):
            raise record
        yield where, record


def read_each(source: DataSource, lang: str | None, relative_to: Path) -> Iterator[tuple[str, Record | RowError]]:
    """As `read_records`, with the error in the place of a record that cannot be read."""
    if source.hub is not None:
        config, split = _hub_parts(source, lang)
        yield from hub_records(source.hub, config, split, source.revision, relative_to, streaming=source.streaming)
        return
    assert source.path is not None
    yield from read_file(resolve(source.path, lang=lang, relative_to=relative_to))


def fingerprint(
    source: DataSource,
    languages: Sequence[str],
    relative_to: Path,
    sha256: Callable[[Path], str] = file_sha256,
) -> str:
    """Sha256 (hex) of what the source holds for `languages`: file contents, or id, config, split and commit on the Hub.

    Of a local data set folder the contents stand for id and commit.

    The order of `languages` and the place of the files do not enter. `sha256` tells that of a file, from memory perhaps.
    """
    parts: list[list[str | None]] = []
    for lang, _ in source.readings(sorted(languages)):
        if source.hub is not None:
            config, split = _hub_parts(source, lang)
            local = local_folder(source.hub, relative_to) is not None
            content = commit(source.hub, source.revision, relative_to, sha256)
            parts.append([lang, "hub", "local" if local else source.hub, config, split, content])
        else:
            assert source.path is not None
            file = resolve(source.path, lang=lang, relative_to=relative_to)
            parts.append([lang, "file", sha256(file)])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source as it is now. `file` is how records name it but for its folder: where it lies is no part of it.

    Of a Hub data set it is `hub:id/config/split`, and `sha256` its commit or that of a local folder's contents.
    """

    lang: str | None
    file: str
    bytes: int | None
    sha256: str


def source_files(
    source: DataSource,
    languages: Sequence[str],
    relative_to: Path,
    sha256: Callable[[Path], str] = file_sha256,
) -> dict[str, SourceFile]:
    """What the source is read from for `languages`, each by the place that stands before `:row` in its records.

    Raises:
        DataError: as `resolve` and `commit`.
    """
    found = {}
    for lang, _ in source.readings(languages):
        if source.hub is not None:
            where = "/".join(part for part in (f"hub:{source.hub}", *_hub_parts(source, lang)) if part)
            found[where] = SourceFile(lang, where, None, commit(source.hub, source.revision, relative_to, sha256))
        else:
            assert source.path is not None
            path = resolve(source.path, lang=lang, relative_to=relative_to)
            found[str(path)] = SourceFile(lang, _fill(source.path, lang), path.stat().st_size, sha256(path))
    return found


def _hub_parts(source: DataSource, lang: str | None) -> tuple[str | None, str | None]:
    """Config and split for a language."""
    config, split = (_fill(part, lang) if part else None for part in (source.config, source.split))
    return config, split


def _fill(template: str, lang: str | None) -> str:
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise DataError(f"broken template: {error}", where=template, do="the only placeholder is {lang}") from error
    for name, spec, conversion in fields:
        if name is not None and (name != "lang" or spec or conversion):
            raise DataError(f"unknown placeholder {{{name}}}", where=template, do="the only placeholder is {lang}")
        if name == "lang" and lang is None:
            raise DataError("{lang} stands in a path that is read without a language", where=template)
    return template.format(lang=lang)
