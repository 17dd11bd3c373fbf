"""Prompt sets: what every candidate is asked, with a language, a purpose, a split and an id parallel across languages.

A prompt is known by `set/lang/pid`; rows with one pid in several languages are one cluster to the statistics, so a pid
must keep its split in every language, and a limit keeps the same pids in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mixmerge.data.overlap import normalised
from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import DataError, RecipeError, did_you_mean

Purpose = Literal["general", "harmful", "harmless"]
Split = Literal["dev", "test"]
COLUMNS = ("id", "prompt", "reference", "lang", "split")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a candidate; `reference` is a known good answer where there is one, `where` its `file:row`."""

    id: str
    pid: str
    set: str
    lang: str
    purpose: Purpose
    split: Split
    text: str
    reference: str | None = None
    where: str = field(default="", compare=False)

    def identity(self) -> dict[str, Any]:
        """All that can change a result: where the prompt stands cannot."""
        return {name: value for name, value in asdict(self).items() if name != "where"}

    def key(self) -> dict[str, str]:
        """What response and verdict rows say of their prompt."""
        return {
            "prompt_id": self.id,
            "pid": self.pid,
            "set": self.set,
            "lang": self.lang,
            "purpose": self.purpose,
            "split": self.split,
        }


def read_prompts(
    name: str,
    path_template: str,
    *,
    purpose: Purpose,
    languages: Sequence[str],
    relative_to: Path,
    limit: Mapping[str, int | None] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Read the prompt set `name`, by language and in the order of its files.

    A template with `{lang}` names a file a language. One without names a file of all: there a `lang` column tells the
    language (rows in others are passed over), and may be missing only where there is one language. A file without a split
    column is `test` throughout. `limit` {"dev": n, "test": n} (None or absent: all) keeps, of each split, the first n ids
    that every language has, in the order of the first language. `columns` maps our names (`COLUMNS`) to the file's.

    Raises:
        DataError: a missing column, empty prompt, unknown split, repeated id, id whose split differs between languages,
            or a language without rows; names file and row.
        RecipeError: `columns` or `limit` with a key that does not exist.
    """
    columns, limit = dict(columns or {}), dict(limit or {})
    for given, known in ((columns, COLUMNS), (limit, get_args(Split))):
        for key in given:
            if key not in known:
                raise RecipeError(f"unknown key {key!r} in prompt set {name!r}", do=did_you_mean(key, known))
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    splits: dict[str, tuple[str, str]] = {}
    for language in languages:
        before = len(prompts)
        for where, record in _records(path_template, language, relative_to, columns, only=len(languages) == 1):
            prompt = _prompt(record, name, purpose, language, columns, where)
            if prompt.id in seen:
                raise DataError(f"id {prompt.pid!r} stands at {seen[prompt.id]} already", where=where)
            split, place = splits.setdefault(prompt.pid, (prompt.split, where))
            if split != prompt.split:
                raise DataError(
                    f"id {prompt.pid!r} is {prompt.split} here and {split} at {place}",
                    where=where,
                    do="a parallel id keeps its split in every language",
                )
            seen[prompt.id] = where
            prompts.append(prompt)
        if len(prompts) == before:
            raise DataError(f"prompt set {name!r} has no rows in {language!r}", where=path_template)
    return _limited(prompts, limit, languages, path_template)


def asked_again(prompts: Iterable[Prompt]) -> tuple[Prompt, Prompt] | None:
    """A prompt and the first one with the same text in another split or another set; None where there is no such pair.

    Texts are compared as training rows are with prompts. Translations of one prompt may be alike: they share a split.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(normalised(prompt.text), prompt)
        if (other.set, other.split) != (prompt.set, prompt.split):
            return prompt, other
    return None


def _limited(
    prompts: list[Prompt], limit: Mapping[str, int | None], languages: Sequence[str], path_template: str
) -> list[Prompt]:
    in_all = set.intersection(*({p.pid for p in prompts if p.lang == language} for language in languages))
    kept: set[str] = set()
    for split in get_args(Split):
        ids = [p.pid for p in prompts if p.lang == languages[0] and p.split == split]
        count = limit.get(split)
        if count is None:
            kept.update(p.pid for p in prompts if p.split == split)
            continue
        parallel = [pid for pid in ids if pid in in_all]
        if count > 0 and not parallel and any(p.split == split for p in prompts):
            raise DataError(
                f"no {split} id stands in every language, so a limit cannot keep the same prompts in each",
                where=path_template,
                do="give translations of one prompt the same id, or lift the limit",
            )
        kept.update(parallel[:count])
    return [p for p in prompts if p.pid in kept]


def _records(
    path_template: str, language: str, relative_to: Path, columns: Mapping[str, str], *, only: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    source = DataSource(path=path_template, hub=None, config=None, split=None, revision=None, lang=None, columns={})
    column = columns.get("lang", "lang")
    per_language = "{lang}" in path_template
    for where, record in read_records(source, language, relative_to):
        found = record.get(column)
        if found is None and ("lang" in columns or not (per_language or only)):
            raise DataError(
                f"no column {column!r}", where=where, do="add it, or name the files by language with {lang}"
            )
        if found is not None and found != language:
            if per_language:
                raise DataError(f"a row in {found!r} in the file for {language!r}", where=where)
            continue
        yield where, record


def _prompt(
    record: Mapping[str, Any], name: str, purpose: Purpose, language: str, columns: Mapping[str, str], where: str
) -> Prompt:
    pid, text = (_text(record, columns.get(key, key), where) for key in ("id", "prompt"))
    split = _optional(record, "split", columns, where) or "test"
    if split not in get_args(Split):
        raise DataError(f"split {split!r} is neither dev nor test", where=where)
    reference = _optional(record, "reference", columns, where)
    return Prompt(f"{name}/{language}/{pid}", pid, name, language, purpose, cast(Split, split), text, reference, where)


def _optional(record: Mapping[str, Any], key: str, columns: Mapping[str, str], where: str) -> str | None:
    """The text of a column that may be empty, and absent too unless the column map names it."""
    column = columns.get(key, key)
    if (column in record or key not in columns) and record.get(column) in (None, ""):
        return None
    return _text(record, column, where)


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if value is None:
        there = ", ".join(sorted(record)) or "none"
        raise DataError(f"no column {column!r}; columns: {there}", where=where, do="map it with `columns:`")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {type(value).__name__}, expected text", where=where)
    if not value.strip():
        raise DataError(f"{column!r} is empty", where=where)
    return value
