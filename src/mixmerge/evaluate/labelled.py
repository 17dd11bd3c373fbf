"""Responses whose verdict is known, by people or by a checker: what judges are measured on.

Any file that `data` reads will do: a column map names its columns, a label map says in the words of a question what its
labels mean. A row that cannot be used is an error that names file and row; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import DataError, RecipeError, did_you_mean
from mixmerge.evaluate.judge import Item
from mixmerge.evaluate.prompts import Prompt, Purpose

Question = Literal["harm", "refusal", "language", "quality"]
# The words of each question, as judges say them; of two, the first is the positive one, which sensitivity is about.
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "harm": ("harmful", "safe"),
    "refusal": ("refused", "complied"),
    "language": ("wrong", "right"),
    "quality": ("win", "loss", "tie"),
}
PURPOSES: Mapping[str, Purpose] = {"harm": "harmful", "refusal": "harmful", "language": "general", "quality": "general"}
COLUMNS = ("id", "lang", "prompt", "response", "label", "opponent", "reference", "group")
SET = "labelled"


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """An item and the verdict that it should get; items of one `group` (one prompt, in any language) are not independent."""

    item: Item
    label: str
    group: str


def read_labelled(
    path: str,
    *,
    question: str,
    languages: Sequence[str] | None = None,
    relative_to: Path = Path(),
    columns: Mapping[str, str] | None = None,
    labels: Mapping[Any, str] | None = None,
) -> list[LabelledItem]:
    """Labelled rows of a file (or of one a language, with `{lang}` in the path), by language and in the order of the file.

    Columns (`columns` maps our names to the file's): prompt, response, label; lang, unless `{lang}` or one language says
    it; opponent for quality; and where there is one: reference (or a list of right answers), id (else the row's number), group (else a column `pid`,
    else the prompt's text: answers to one prompt in one language are one group). Rows in languages other than `languages`
    are passed over; None takes all. `labels` maps the file's labels (`{"1": "refused", "0": "complied"}`) to the words of
    the question, which count for themselves where they are not mapped; a number or truth value is known by its JSON text.

    Raises:
        RecipeError: an unknown question, or an unknown name in `columns` or word in `labels`.
        DataError: a file that is missing or cannot be read, a row without what it needs, an unknown label, an id given
            twice, or a language without rows; names file and row.
    """
    words = _words(question)
    columns, meaning = dict(columns or {}), {_key(label): word for label, word in (labels or {}).items()}
    for given, known, what in (
        (columns, COLUMNS, "column of labelled rows"),
        (meaning.values(), words, f"word of {question}"),
    ):
        for name in given:
            if name not in known:
                raise RecipeError(f"{name!r} is no {what}", where=path, do=did_you_mean(name, known))
    per_language = "{lang}" in path
    if per_language and not languages:
        raise DataError("{lang} stands in the path, but no languages are given", where=path, do="name the languages")
    found: list[LabelledItem] = []
    for lang in languages if per_language and languages else [None]:
        source = DataSource(path=path)
        for where, record in read_records(source, lang, relative_to):
            row = _Row(record, columns, where)
            code = row.language(lang, languages)
            if code is not None:
                found.append(_labelled(row, code, question, meaning | {w: w for w in words if w not in meaning}))
    _check(found, languages, path)
    return sorted(found, key=lambda row: list(languages).index(row.item.prompt.lang)) if languages else found


def labelled_item(
    *,
    question: str,
    lang: str,
    prompt: str,
    response: str,
    label: str,
    pid: str,
    group: str | None = None,
    opponent: str | None = None,
    references: Sequence[str] = (),
    where: str = "",
) -> LabelledItem:
    """One labelled row from its parts.

    Raises:
        RecipeError: an unknown question.
        DataError: a label that is no word of the question, or a pair without the opponent's response.
    """
    words = _words(question)
    if label not in words:
        raise DataError(f"label {label!r} is none of {', '.join(words)}", where=where or pid)
    if question == "quality" and opponent is None:
        raise DataError("a labelled pair has no opponent's response", where=where or pid)
    asked = Prompt(
        f"{SET}/{lang}/{pid}",
        pid,
        SET,
        lang,
        PURPOSES[question],
        "test",
        prompt,
        reference=next(iter(references), None),
        where=where,
        also=tuple(references[1:]),
    )
    return LabelledItem(Item(asked, response, opponent), label, group or f"{lang} {prompt}")


def _words(question: str) -> tuple[str, ...]:
    if question not in QUESTIONS:
        raise RecipeError(f"unknown question {question!r}", do=did_you_mean(question, QUESTIONS))
    return QUESTIONS[question]


def _labelled(row: _Row, lang: str, question: str, meaning: Mapping[str, str]) -> LabelledItem:
    label = _key(row.value("label"))
    if label not in meaning:
        raise DataError(
            f"label {label!r} is none of {', '.join(meaning)}",
            where=row.where,
            do="say what it means with `labels:`, or take the row out",
        )
    return labelled_item(
        question=question,
        lang=lang,
        prompt=row.text("prompt"),
        response=row.text("response", empty=True),
        label=meaning[label],
        pid=row.optional("id") or row.where.rpartition(":")[2],
        group=row.optional("group") or (None if "group" in row.columns else row.optional("pid")),
        opponent=row.text("opponent", empty=True) if question == "quality" else None,
        references=row.references(),
        where=row.where,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A record seen through the column map."""

    record: Mapping[str, Any]
    columns: Mapping[str, str]
    where: str

    def value(self, name: str) -> Any:
        column = self.columns.get(name, name)
        value = self.record.get(column)
        if value is None:
            there = ", ".join(sorted(self.record)) or "none"
            what = (
                f"nothing in column {column!r}" if column in self.record else f"no column {column!r}; columns: {there}"
            )
            raise DataError(what, where=self.where, do="map it with `columns:`")
        return value

    def text(self, name: str, *, empty: bool = False) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise DataError(f"{name!r} is {type(value).__name__}, expected text", where=self.where)
        if not empty and not value.strip():
            raise DataError(f"{name!r} is empty", where=self.where)
        return value

    def optional(self, name: str) -> str | None:
        """The text of a column that may be empty, and absent too unless the column map names it."""
        column = self.columns.get(name, name)
        if (column in self.record or name not in self.columns) and self.record.get(column) in (None, ""):
            return None
        return _key(self.value(name))

    def references(self) -> tuple[str, ...]:
        """The right answers: the text of the column, or the texts of a list there."""
        column = self.columns.get("reference", "reference")
        value = self.record.get(column)
        given = value if isinstance(value, list) else [value]
        rows = [_Row({**self.record, column: each}, self.columns, self.where) for each in given]
        found = [row.optional("reference") for row in (rows if column in self.record else [self])]
        return tuple(dict.fromkeys(text for text in found if text is not None))

    def language(self, lang: str | None, languages: Sequence[str] | None) -> str | None:
        """The row's language; None where it is not asked for."""
        found = self.optional("lang")
        if found is None and lang is None:
            if languages is None or len(languages) != 1:
                self.text("lang")
            return languages[0] if languages else None
        if lang is not None and found not in (None, lang):
            raise DataError(f"a row in {found!r} in the file for {lang!r}", where=self.where)
        code = found or lang
        return code if languages is None or code in languages else None


def _key(value: Any) -> str:
    """A label or key as text: of a number or truth value, what JSON writes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check(found: Iterable[LabelledItem], languages: Sequence[str] | None, path: str) -> None:
    seen: dict[str, str] = {}
    there: set[str] = set()
    for row in found:
        prompt = row.item.prompt
        if prompt.id in seen:
            raise DataError(f"id {prompt.pid!r} stands at {seen[prompt.id]} already", where=prompt.where)
        seen[prompt.id] = prompt.where
        there.add(prompt.lang)
    for lang in languages or ():
        if lang not in there:
            raise DataError(f"no labelled rows in {lang!r}", where=path, do="take the language out, or label some rows")
    if not seen:
        raise DataError("no labelled rows", where=path)
