"""Prompt sets: what every candidate is asked, with a language, a purpose, a split and an id parallel across languages.

A prompt is known by `set/lang/pid`; rows with one pid in several languages are one cluster to the statistics, so a pid
must keep its split in every language, and a limit keeps the same pids in each. Files of others are read as they are: a
column map, a filter on columns, and rules for ids and splits say how. `evaluate.ready` has them for known sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mixmerge.data.overlap import normalised
from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import DataError, RecipeError, did_you_mean
from mixmerge.evaluate.choices import INSTRUCTION, letter_of, read_choices, render
from mixmerge.evaluate.instructions import Instruction, read_instructions

Purpose = Literal["general", "harmful", "harmless", "benchmark"]
Split = Literal["dev", "test"]
# The last three are read only where a column map names them.
COLUMNS = ("id", "prompt", "reference", "lang", "split", "choices", "instructions", "arguments")
SPLIT_WORDS = (*get_args(Split), "skip")
MOST_VALUES = 12  # of a filtered column, in an error


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a candidate; `reference` is a known good answer where there is one, `where` its `file:row`.

    With `choices` the text names them by letter, and the reference is a letter. `instructions` are what the text asks of
    the form of an answer, for a checker. `also` are further answers that are as right as the reference.
    """

    id: str
    pid: str
    set: str
    lang: str
    purpose: Purpose
    split: Split
    text: str
    reference: str | None = None
    where: str = field(default="", compare=False)
    choices: tuple[str, ...] = ()
    instructions: tuple[Instruction, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Every known good answer."""
        return () if self.reference is None else (self.reference, *self.also)

    def identity(self) -> dict[str, Any]:
        """All that can change a result: where the prompt stands cannot. What it has not is not named."""
        names = ("id", "pid", "set", "lang", "purpose", "split", "text", "reference")
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.also:
            out["also"] = list(self.also)
        if self.choices:
            out["choices"] = list(self.choices)
        if self.instructions:
            out["instructions"] = [{"id": each.id, "arguments": each.named()} for each in self.instructions]
        return out

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
    where: Mapping[str, Any] | None = None,
    covers: Sequence[str] | None = None,
    language_in_id: str | None = None,
    splits: Mapping[str, str] | None = None,
    dev_share: float | None = None,
    seed: int = 0,
    ask: Mapping[str, str] | None = None,
    turns: bool = False,
) -> list[Prompt]:
    """Read the prompt set `name`, by language and in the order of its files.

    A template with `{lang}` names a file a language. One without names a file of all: there a `lang` column tells the
    language (rows in others are passed over), and may be missing only where there is one language. A file without a split
    column is `test` throughout. `limit` {"dev": n, "test": n} (None or absent: all) keeps, of each split, the first n ids
    that every language has, in the order of the first language. A list as `reference` holds several right answers.

    Args:
        columns: our names (`COLUMNS`) -> the file's. `choices` (a list) makes a multiple-choice question of the prompt:
            the reference is then read as a letter, an index from 0 or a choice's text, and becomes the letter.
            `instructions` (a list of ids) and `arguments` (a list of mappings) are IFEval's.
        where: column -> value or values; a row counts where each column has one of them. A text with `*` or `?` is a
            pattern. For files that hold several sets.
        covers: the languages that the set has; others of `languages` are passed over. None: it has all of them.
        language_in_id: how the language stands in an id (`-{lang}-`, exactly once); what stands before `{lang}` is left
            in its place, so that translations share an id.
        splits: the file's words for a split -> dev, test or skip (such rows are left out); `*` is every word.
        dev_share: the share of ids, 0..1, that is drawn as `dev` where the file has none. An id is drawn by its own hash
            and `seed`, so it has one split in every language, and keeps it when rows are added. Ids that ask the same
            are drawn together.
        ask: language -> a text put after each prompt; for choices it replaces the one that is there for six languages.
        turns: a list as `reference` has one answer a turn instead; the prompt is the first turn.

    Raises:
        DataError: a missing column, empty prompt, unknown split, repeated id, id whose split differs between languages,
            or a language without rows; a bad choice, answer or instruction; names file and row.
        RecipeError: `columns` or `limit` with a key that does not exist; a rule that cannot be.
    """
    columns, limit, splits = dict(columns or {}), dict(limit or {}), dict(splits or {})
    _check_rules(name, columns, limit, splits, dev_share, language_in_id)
    read = [code for code in languages if covers is None or code in covers]
    if not read:
        raise DataError(
            f"prompt set {name!r} has {', '.join(covers or ())}, none of {', '.join(languages)}", where=path_template
        )
    rules = _Rules(name, purpose, columns, splits, language_in_id, dict(ask or {}), turns)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    given: dict[str, tuple[str, str]] = {}
    for language in read:
        before = len(prompts)
        rows = _records(path_template, language, relative_to, columns, only=len(languages) == 1)
        for place, record in _matching(rows, dict(where or {}), path_template):
            prompt = _prompt(record, rules, language, place)
            if prompt is None:
                continue
            if prompt.id in seen:
                raise DataError(f"id {prompt.pid!r} stands at {seen[prompt.id]} already", where=place)
            split, other = given.setdefault(prompt.pid, (prompt.split, place))
            if split != prompt.split:
                raise DataError(
                    f"id {prompt.pid!r} is {prompt.split} here and {split} at {other}",
                    where=place,
                    do="a parallel id keeps its split in every language",
                )
            seen[prompt.id] = place
            prompts.append(prompt)
        if len(prompts) == before:
            raise DataError(f"prompt set {name!r} has no rows in {language!r}", where=path_template)
    if dev_share is not None:
        prompts = _drawn(prompts, dev_share, seed)
    return _limited(prompts, limit, read, path_template)


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


@dataclass(frozen=True, slots=True)
class _Rules:
    """How a record becomes a prompt."""

    name: str
    purpose: Purpose
    columns: Mapping[str, str]
    splits: Mapping[str, str]
    language_in_id: str | None
    ask: Mapping[str, str]
    turns: bool


def _check_rules(
    name: str,
    columns: Mapping[str, str],
    limit: Mapping[str, int | None],
    splits: Mapping[str, str],
    dev_share: float | None,
    language_in_id: str | None,
) -> None:
    for given, known in ((columns, COLUMNS), (limit, get_args(Split))):
        for key in given:
            if key not in known:
                raise RecipeError(f"unknown key {key!r} in prompt set {name!r}", do=did_you_mean(key, known))
    for word, split in splits.items():
        if split not in SPLIT_WORDS:
            raise RecipeError(f"splits of prompt set {name!r}: {word!r} is {split!r}", do="dev, test or skip")
    if dev_share is not None and not 0 < dev_share < 1:
        raise RecipeError(f"prompt set {name!r}: a dev share of {dev_share} is not between 0 and 1")
    if language_in_id is not None and language_in_id.count("{lang}") != 1:
        raise RecipeError(
            f"prompt set {name!r}: no {{lang}} in {language_in_id!r}", do="write it as it stands in the ids: -{lang}-"
        )
    if "arguments" in columns and "instructions" not in columns:
        raise RecipeError(f"prompt set {name!r}: arguments of no instructions", do="map `instructions` too")


def _matching(
    rows: Iterable[tuple[str, Mapping[str, Any]]], where: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows that a filter lets through; DataError with what stands there where it lets none through."""
    wanted = {column: value if isinstance(value, list | tuple) else [value] for column, value in where.items()}
    seen: dict[str, set[str]] = {column: set() for column in wanted}
    columns: set[str] = set()
    found = False
    for place, record in rows:
        columns.update(record)
        for column in wanted:
            if column in record:
                seen[column].add(str(record[column]))
        if all(column in record and any(_is(record[column], v) for v in values) for column, values in wanted.items()):
            found = True
            yield place, record
    if found or not columns:
        return
    for column, values in seen.items():
        if not values:
            raise DataError(f"no column {column!r} to filter on", where=path, do=did_you_mean(column, columns))
        if not any(_is(value, each) for value in values for each in wanted[column]):
            there = ", ".join(repr(value) for value in sorted(values)[:MOST_VALUES])
            raise DataError(f"no row where {column!r} is {where[column]!r}", where=path, do=f"there: {there}")
    raise DataError("no row that fits the whole of the filter", where=path)


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and ("*" in wanted or "?" in wanted):
        return fnmatchcase(str(value), wanted.replace("[", "[[]"))
    return bool(value == wanted or str(value) == str(wanted))


def _drawn(prompts: list[Prompt], share: float, seed: int) -> list[Prompt]:
    """The prompts with a share of the ids as dev; ids that have a text in common, in any language, go together."""
    for prompt in prompts:
        if prompt.split == "dev":
            raise DataError("a dev row, where a share is to be drawn", where=prompt.where, do="leave out the dev share")
    parent = {prompt.pid: prompt.pid for prompt in prompts}

    def root(pid: str) -> str:
        while parent[pid] != pid:
            parent[pid] = pid = parent[parent[pid]]
        return pid

    first: dict[str, str] = {}
    for prompt in prompts:
        one, other = root(first.setdefault(normalised(prompt.text), prompt.pid)), root(prompt.pid)
        parent[max(one, other)] = min(one, other)

    def is_dev(pid: str) -> bool:
        # without the set's name, so that parallel sets (harmful, and look-alikes) with the same ids split alike
        digest = hashlib.sha256(json.dumps([seed, "dev share", root(pid)], ensure_ascii=False).encode()).digest()
        return int.from_bytes(digest[:8]) < share * 2**64

    return [replace(prompt, split="dev" if is_dev(prompt.pid) else "test") for prompt in prompts]


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
            what = f"nothing in column {column!r}" if column in record else f"no column {column!r}"
            raise DataError(what, where=where, do="add it, or name the files by language with {lang}")
        if found is not None and found != language:
            if per_language:
                raise DataError(f"a row in {found!r} in the file for {language!r}", where=where)
            continue
        yield where, record


def _prompt(record: Mapping[str, Any], rules: _Rules, language: str, where: str) -> Prompt | None:
    """The prompt of a record; None where its split is to be skipped."""
    columns = rules.columns
    pid, text = (_text(record, columns.get(key, key), where) for key in ("id", "prompt"))
    word = _optional(record, "split", columns, where) or "test"
    split = rules.splits.get(word, rules.splits.get("*", word))
    if split == "skip":
        return None
    if split not in get_args(Split):
        raise DataError(
            f"split {split!r} is neither dev nor test", where=where, do=f"say what it is: splits: {{{word}: test}}"
        )
    ask = rules.ask.get(language)
    choices, instructions = _choices(record, columns, where), _instructions(record, columns, where)
    if choices:
        references: tuple[str, ...] = (letter_of(record.get(columns.get("reference", "reference")), choices, where),)
        ask = ask or INSTRUCTION.get(language)
        if ask is None:
            do = f"write it in the set: ask: {{{language}: ...}}"
            raise DataError(f"nothing that asks for a letter in {language!r}", where=where, do=do)
        text = render(text, choices, ask)
    else:
        references = _references(record, rules, where)
        text = f"{text}\n\n{ask}" if ask else text
    pid = _shared_id(pid, rules.language_in_id, language, where)
    return Prompt(
        id=f"{rules.name}/{language}/{pid}",
        pid=pid,
        set=rules.name,
        lang=language,
        purpose=rules.purpose,
        split=cast(Split, split),
        text=text,
        reference=references[0] if references else None,
        where=where,
        choices=choices,
        instructions=instructions,
        also=references[1:],
    )


def _shared_id(row_id: str, mark: str | None, language: str, where: str) -> str:
    if mark is None:
        return row_id
    here = mark.replace("{lang}", language)
    if row_id.count(here) != 1:
        raise DataError(
            f"{here!r} does not stand in id {row_id!r} exactly once", where=where, do="map another id column"
        )
    return row_id.replace(here, mark[: mark.index("{lang}")])


def _choices(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> tuple[str, ...]:
    column = columns.get("choices")
    return () if column is None else read_choices(record.get(column), column, where)


def _instructions(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> tuple[Instruction, ...]:
    column = columns.get("instructions")
    if column is None:
        return ()
    arguments = columns.get("arguments")
    return read_instructions(record.get(column), None if arguments is None else record.get(arguments), where)


def _optional(record: Mapping[str, Any], key: str, columns: Mapping[str, str], where: str) -> str | None:
    """The text of a column that may be empty, and absent too unless the column map names it."""
    column = columns.get(key, key)
    if (column in record or key not in columns) and record.get(column) in (None, "", []):
        return None
    return _text(record, column, where)


def _references(record: Mapping[str, Any], rules: _Rules, where: str) -> tuple[str, ...]:
    """Known good answers: a text, a number, or several of them in a list, where what is empty is passed over."""
    column = rules.columns.get("reference", "reference")
    value = record.get(column)
    if not isinstance(value, list):
        given = [record]
    else:
        given = [{**record, column: each} for each in (value[:1] if rules.turns else value)]
    found = []
    for each in given:
        if isinstance(each.get(column), float):
            each = {**each, column: repr(each[column])}
        found.append(_optional(each, "reference", rules.columns, where))
    return tuple(dict.fromkeys(text for text in found if text is not None))


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if value is None:
        if column in record:
            raise DataError(f"nothing in column {column!r}", where=where, do="fill it, or take the row out")
        there = ", ".join(sorted(record)) or "none"
        raise DataError(f"no column {column!r}; columns: {there}", where=where, do="map it with `columns:`")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {type(value).__name__}, expected text", where=where)
    if not value.strip():
        raise DataError(f"{column!r} is empty", where=where)
    return value
