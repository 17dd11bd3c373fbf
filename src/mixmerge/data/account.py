"""What became of the records of one data set: every one that was read is counted once, and nothing is silent.

A record is kept, in another language, bad, beyond the limit, or dropped for its text's language; these add up to `read`.
Bad ones are counted by kind, with the first of each kind. Places are a file's name and row, so that an account is the
same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mixmerge.errors import DataError
from mixmerge.terminal import visible


class RowError(DataError):
    """One record that cannot be used, while the rest of its file may be; `kind` is what many such records share."""

    def __init__(self, what: str, *, kind: str = "bad row", where: str | None = None, do: str | None = None) -> None:
        super().__init__(what, where=where, do=do)
        self.kind = kind

    def again(self, *, what: str | None = None, where: str | None = None, do: str | None = None) -> Self:
        """The same error, of the same kind, with other words in one of its parts."""
        return type(self)(what or self.what, kind=self.kind, where=where or self.where, do=do or self.do)


@dataclass(slots=True)
class Tally:
    """How many, and the first of them as `file:row: what`."""

    rows: int = 0
    first: str = ""

    def add(self, example: str) -> None:
        self.rows += 1
        self.first = self.first or example


@dataclass(slots=True)
class Account:
    """The account of one data set; numbers are of records, by language where a mapping says so.

    `other_language` has the codes that the language column names; `bad` has kinds. `wrong_language` has rows whose text
    is evidently in another language than they claim, out of `judged`; they are among `kept` unless `wrong_dropped`.
    `replaced` has rows with U+FFFD, which stands where a character was lost before; they are among `kept` too.
    """

    read: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    other_language: dict[str, int] = field(default_factory=dict)
    bad: dict[str, Tally] = field(default_factory=dict)
    beyond_limit: int = 0
    limit_reached: list[str] = field(default_factory=list)
    judged: int = 0
    wrong_language: dict[str, Tally] = field(default_factory=dict)
    wrong_dropped: bool = False
    replaced: Tally = field(default_factory=Tally)

    def add_bad(self, error: RowError) -> None:
        self.bad.setdefault(error.kind, Tally()).add(visible(f"{short_place(error.where or '')}: {error.what}"))

    @property
    def bad_rows(self) -> int:
        return sum(tally.rows for tally in self.bad.values())

    @property
    def wrong_rows(self) -> int:
        return sum(tally.rows for tally in self.wrong_language.values())

    @property
    def lost_rows(self) -> int:
        """Rows in the right language that were left out: bad ones, and those dropped for their text's language."""
        return self.bad_rows + (self.wrong_rows if self.wrong_dropped else 0)

    def to_json(self) -> dict[str, Any]:
        """As the manifest and the record keep it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Account:
        """The account that a manifest or a record holds, among what else it says of the data set."""
        tallies = {key: {k: Tally(**v) for k, v in data[key].items()} for key in ("bad", "wrong_language")}
        told = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**told | tallies | {"replaced": Tally(**data.get("replaced", {}))})

    def kinds(self) -> str:
        """The kinds of bad rows and how many there are of each, the most frequent first."""
        return ", ".join(f"{count} {kind}" for kind, count in most_first({k: t.rows for k, t in self.bad.items()}))


def most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Counts from the largest down, then by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def short_place(where: str) -> str:
    """`file:row` without the folders.

    >>> short_place("/home/me/data/a.jsonl:7"), short_place("hub:org/set/train:7")
    ('a.jsonl:7', 'hub:org/set/train:7')
    """
    return where if where.startswith("hub:") else where.rpartition("/")[2]
