"""All rows of one data set, and the account of what became of its records.

One idea: a record that cannot be used is found by whoever reads it, and judged here: `bad_rows: refuse` names the first
and says how many there are of each kind, `drop` leaves them out and counts them. A data set of which nothing can be
used is refused either way. Rows evidently in another language are told likewise; a mere report looks at a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from mixmerge.data.account import Account, RowError, Tally, most_first, short_place
from mixmerge.data.files import Record
from mixmerge.data.formats import Row, to_row
from mixmerge.data.languages import known_language, match_language
from mixmerge.data.sources import DataSource, read_each
from mixmerge.data.tongue import evident_language
from mixmerge.errors import DataError

SAMPLE = 1000  # rows of a data set to judge for a report: a third of a second, and 1 % is seen as 1 % +- 0.3 %


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of a data set, their account, and by id the `file:row` that each stands at."""

    rows: list[Row]
    account: Account
    places: Mapping[str, str]


def load_rows(source: DataSource, languages: Sequence[str], relative_to: Path, *, sample: int = 0) -> Loaded:
    """All rows of a source in `languages`, in file order; ids are `lang/id` and unique.

    Reading stops where every language has `limit` rows. Where rows in a wrong language are only reported, `sample` rows
    drawn by their ids are judged; where they are dropped or refused, every row is.

    Raises:
        DataError: whatever `read_each` raises, a bad row where they are refused, a source or a language without rows.
    """
    return _Loading(source, languages, relative_to).load(sample)


def take_out(loaded: Loaded, source: DataSource, unfit: Sequence[tuple[Row, RowError]]) -> Loaded:
    """What is left of rows some of which are unfit for what they are loaded for: bad rows, as if found when reading.

    They count for the source's `limit`.

    Raises:
        DataError: unfit rows where bad ones are refused, or a language of which nothing is left.
    """
    account, told = deepcopy(loaded.account), [error.again(where=loaded.places[row.id]) for row, error in unfit]
    for (row, _), error in zip(unfit, told, strict=True):
        account.kept[row.lang] -= 1
        account.add_bad(error)
    gone = {row.id for row, _ in unfit}
    rows = [row for row in loaded.rows if row.id not in gone]
    if told and (source.bad_rows == "refuse" or not rows):
        raise _refusal(told[0], account, nothing_left=not rows)
    _refuse_empty(account, source)
    return Loaded(rows, account, loaded.places)


class _Loading:
    """One pass over a source: the rows so far, the places of their ids, and the account."""

    def __init__(self, source: DataSource, languages: Sequence[str], relative_to: Path) -> None:
        self.source, self.relative_to = source, relative_to
        self.readings = source.readings(languages)
        kept = {lang: 0 for _, covered in self.readings for lang in covered}
        self.account = Account(kept=kept, wrong_dropped=source.wrong_language == "drop")
        self.rows: list[Row] = []
        self.places: dict[str, str] = {}
        self.first: RowError | None = None
        self.wrong: tuple[str, str, str] | None = None  # place, language that it says, language that it is in

    def load(self, sample: int) -> Loaded:
        for lang, covered in self.readings:
            self._read(lang, covered)
        if sample and self.source.wrong_language == "report":
            for row in sorted(self.rows, key=lambda row: _seeded(row.id))[:sample]:
                self._is_elsewhere(row)
        self._refuse()
        return Loaded(self.rows, self.account, self.places)

    def _read(self, lang: str | None, covered: Sequence[str]) -> None:
        for where, record in read_each(self.source, lang, self.relative_to):
            self.account.read += 1
            try:
                self._add(record, where, covered)
            except RowError as error:
                self.first = self.first or error
                self.account.add_bad(error)
            if all(code in self.account.limit_reached for code in covered):
                break

    def _add(self, record: Record | RowError, where: str, covered: Sequence[str]) -> None:
        if isinstance(record, RowError):
            raise record
        account, lang = self.account, self._language(record, where, covered)
        if lang is None:
            return
        if lang in account.limit_reached:
            account.beyond_limit += 1
            return
        row = to_row(record, where=where, lang=lang, columns=self.source.columns)
        row = replace(row, id=f"{lang}/{row.id}")
        if row.id in self.places:
            what = f"id '{row.id.partition('/')[2]}' was used before, at {short_place(self.places[row.id])}"
            raise RowError(what, kind="repeated id", where=where)
        self.places[row.id] = where
        if self.source.wrong_language != "report" and self._is_elsewhere(row) and account.wrong_dropped:
            return
        self.rows.append(row)
        if any(
            "\ufffd" in text for text in (*(turn["content"] for turn in row.prompt), row.completion, row.rejected or "")
        ):
            account.replaced.add(short_place(where))
        account.kept[lang] += 1
        if account.kept[lang] == self.source.limit:
            account.limit_reached.append(lang)

    def _is_elsewhere(self, row: Row) -> bool:
        """Whether the row is evidently in another language than it says; counted."""
        self.account.judged += 1
        other = evident_language(row)
        if other is not None:
            example = f"{short_place(self.places[row.id])}: in '{other}'"
            self.account.wrong_language.setdefault(row.lang, Tally()).add(example)
            self.wrong = self.wrong or (self.places[row.id], row.lang, other)
        return other is not None

    def _language(self, record: Record, where: str, covered: Sequence[str]) -> str | None:
        """The row's language; None, counted, where it is not among those that are covered."""
        column = self.source.lang_column
        if column is None:
            return covered[0]
        if column not in record:
            found = ", ".join(sorted(record)) or "none"
            what = f"missing column '{column}' (lang_column); columns found: {found}"
            raise RowError(what, kind="no language", where=where, do="correct 'lang_column'")
        value = record[column]
        lang = match_language(value, covered)
        if lang is None:
            other = known_language(value)
            if other is None:
                named = f"'{column}' is {value!r:.60}, which names no language"
                raise RowError(named, kind="no language", where=where, do="write a code such as en, or a name")
            self.account.other_language[other] = self.account.other_language.get(other, 0) + 1
        return lang

    def _refuse(self) -> None:
        account = self.account
        if self.first is not None and (self.source.bad_rows == "refuse" or not self.rows):
            raise _refusal(self.first, account, nothing_left=not self.rows)
        if self.wrong is not None and self.source.wrong_language == "refuse":
            where, own, other = self.wrong
            rows = f"{account.wrong_rows} such row{'s' * (account.wrong_rows > 1)} of {account.judged}"
            what = f"this row says '{own}' and is evidently in '{other}' ({rows})"
            raise DataError(what, where=where, do="mend it, or set wrong_language: drop or report")
        _refuse_empty(account, self.source)


def _refuse_empty(account: Account, source: DataSource) -> None:
    empty = next((code for code, rows in account.kept.items() if not rows), None)
    if empty is None:
        return
    what, do = f"no rows for language '{empty}'", None
    if account.read:
        others = ", ".join(code for code, _ in most_first(account.other_language)[:6])
        what += f" in {account.read} records"
        what += f" (other languages there: {others})" if others else ""
        what += f" ({account.kinds()} dropped)" if account.bad else ""
        what += f" ({account.wrong_rows} evidently in others dropped)" if account.wrong_dropped else ""
        do = "say which languages it has with 'languages'"
    raise DataError(what, where=source.name, do=do)


def _seeded(row_id: str) -> bytes:
    """A place in a random order that depends on the row's id alone."""
    return hashlib.sha256(f"language {row_id}".encode()).digest()


def _refusal(first: RowError, account: Account, *, nothing_left: bool) -> DataError:
    """The first bad row, and how many more there are of what kind."""
    what, do = first.what, first.do
    if account.bad_rows > 1:
        what += f" ({account.bad_rows} bad rows of {account.read}: {account.kinds()})"
    if not nothing_left:
        do = f"{do}, or set bad_rows: drop" if do else "mend it, or set bad_rows: drop"
    return DataError(what, where=first.where, do=do)
