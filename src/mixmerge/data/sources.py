"""Where rows come from: JSONL, JSON, CSV, TSV and Parquet files, packaged starter files, or a Hub data set.

One idea: every record comes with the place it stands at (`file:row`), so that any later complaint can name it.
`row` is the line of a JSONL file and the record's 1-based number elsewhere. Nothing is guessed: a path that does not
resolve for a language, a broken line or broken UTF-8 is a `DataError`. Reading is lazy, except that a JSON array is
read whole.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmerge.errors import DataError, did_you_mean

Record = dict[str, Any]

STARTER = "starter:"


@dataclass(frozen=True, slots=True)
class DataSource:
    """One `data` entry of a recipe: either `path` (with `{lang}` where there is a file a language) or a `hub` id.

    `lang` fixes the language of everything in the source; `columns` maps our column names to those of the file.
    `{lang}` is also replaced in `config` and `split`.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    lang: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

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


def source_languages(source: DataSource, languages: Sequence[str]) -> list[str]:
    """The languages of `languages` that the source can give: all, or its own `lang` if that is among them.

    Raises:
        DataError: several languages, but neither a `{lang}` in the source nor a `lang` of its own.
    """
    if source.lang is not None:
        return [source.lang] if source.lang in languages else []
    if len(languages) > 1 and not source.has_file_per_language():
        what, place = ("file", "path") if source.hub is None else ("Hub data set", "config or split")
        raise DataError(
            f"one {what} for {len(languages)} languages ({', '.join(languages)})",
            where=source.name,
            do=f"write {{lang}} where the language code stands in its {place}, or give the source its own 'lang'",
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
    """Yield (`file:row`, raw record) for one language of a source.

    Raises:
        DataError: missing file, unknown file type, broken UTF-8, broken JSON, ragged CSV, a record that is no object,
            or a Hub data set that cannot be loaded.
    """
    if source.hub is not None:
        yield from _hub_records(source, lang)
        return
    assert source.path is not None
    file = resolve(source.path, lang=lang, relative_to=relative_to)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read a '{file.suffix}' file", where=str(file), do=f"known: {', '.join(READERS)}")
    for row, record in reader(file):
        if not isinstance(record, dict):
            raise DataError(f"expected an object, found {type(record).__name__}", where=f"{file}:{row}")
        yield f"{file}:{row}", record


def fingerprint(source: DataSource, languages: Sequence[str], relative_to: Path) -> str:
    """Sha256 (hex) of what the source holds for `languages`: file contents, or id, config, split and commit on the Hub.

    The order of `languages` and the place of the files do not enter.
    """
    parts: list[list[str | None]] = []
    for lang in sorted(source_languages(source, languages)):
        if source.hub is not None:
            config, split = (_fill(part, lang) if part else None for part in (source.config, source.split))
            parts.append([lang, "hub", source.hub, config, split, _commit(source)])
        else:
            assert source.path is not None
            file = resolve(source.path, lang=lang, relative_to=relative_to)
            with file.open("rb") as stream:
                parts.append([lang, "file", hashlib.file_digest(stream, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


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


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one, so that broken UTF-8 is reported with its line."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                # utf-8-sig on the first line only: spreadsheets write a byte-order mark.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}",
                    where=f"{file}:{number}",
                    do="save the file as UTF-8",
                ) from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(file):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"broken JSON: {error.msg} (column {error.colno})", where=f"{file}:{number}") from error


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads("".join(line for _, line in _lines(file)))
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} (column {error.colno})", where=f"{file}:{error.lineno}") from error
    if not isinstance(records, list):
        raise DataError("expected an array of objects", where=f"{file}:1", do="for one object a line, name it .jsonl")
    yield from enumerate(records, start=1)


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    row = 0
    try:
        header = next(reader, [])
        for cells in reader:
            if cells:
                row += 1
                if len(cells) != len(header):
                    raise DataError(f"{len(cells)} cells under {len(header)} columns", where=f"{file}:{row}")
                yield row, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", where=f"{file}:{row + 1}") from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"broken Parquet: {error}", where=f"{file}:{row + 1}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _hub_records(source: DataSource, lang: str | None) -> Iterator[tuple[str, Record]]:
    import datasets

    config, split = (_fill(part, lang) if part else None for part in (source.config, source.split))
    where = "/".join(part for part in (f"hub:{source.hub}", config, split) if part)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source.hub, name=config, split=split or "train", revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load the data set: {type(error).__name__}: {error}",
            where=where,
            do="check hub, config, split and revision, and that the Hub can be reached",
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    for row, record in enumerate(rows, start=1):
        yield f"{where}:{row}", record


def _commit(source: DataSource) -> str:
    """The commit a Hub source means now; a full commit id stands for itself and needs no network."""
    if source.revision is not None and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    import huggingface_hub

    try:
        sha = huggingface_hub.HfApi().dataset_info(str(source.hub), revision=source.revision).sha
    except Exception as error:  # the client raises its own, httpx's and OSError alike; all mean the same to the user
        raise DataError(
            f"cannot resolve the data set's commit: {type(error).__name__}",
            where=source.name,
            do="check the id and the network, or pin 'revision' to a full commit id",
        ) from error
    return str(sha)
