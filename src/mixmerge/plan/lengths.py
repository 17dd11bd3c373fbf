"""Prompts that leave training no room for their answer: bad rows, found before anything starts where a local base can tell.

One idea: how long a prompt is belongs to the row, and how long it may be to the training that reads it; so a row can be bad
for one training and good for another. A data set's account counts those that no training can read, and a note names those
that only some cannot. What is told here is certain; the mixture step counts exactly, and a note says for how many rows it will.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from mixmerge.data.account import Account, RowError, short_place
from mixmerge.data.formats import Row
from mixmerge.data.loading import Loaded, take_out
from mixmerge.data.sources import DataSource
from mixmerge.plan.budget import FEWEST, Bounds
from mixmerge.train.tokens import most_tokens

KIND = "prompt too long"


def too_long(training: str, max_length: int) -> RowError:
    """What is said of a row whose prompt fills all that `training` reads of a row."""
    do = f"raise training.max_length of '{training}'"
    return RowError(f"the prompt alone fills max_length {max_length}", kind=KIND, do=do)


class LongPrompts:
    """The rows of a study that trainings read in vain; `bounds` are those of a row's prompt."""

    def __init__(self, loaded: Mapping[str, Loaded], sources: Mapping[str, DataSource], bounds: Bounds) -> None:
        self.loaded, self.sources, self.bounds = loaded, sources, bounds
        self.vain: dict[str, list[tuple[str, int, list[Row]]]] = defaultdict(list)
        self.read: dict[str, set[str]] = defaultdict(set)  # ids of rows that some training reads
        self.close: dict[tuple[str, int], set[str]] = defaultdict(set)  # by data set and length, ids that may fill it

    def take_out(self, training: str, max_length: int | None, data: str, rows: Iterable[Row]) -> list[Row]:
        """Those of a data set's rows that a training can read, of the ones it draws from.

        Raises:
            DataError: others where bad rows are refused, or a language of which nothing else is there.
        """
        asked = list(rows)
        long = [row for row in asked if max_length is not None and self._fills(row, max_length)]
        gone = {row.id for row in long}
        self.read[data].update(row.id for row in asked if row.id not in gone)
        if max_length is not None:
            may = (row for row in asked if row.id not in gone and self._may_fill(row, max_length))
            self.close[data, max_length].update(row.id for row in may)
        if long and max_length is not None:
            self.vain[data].append((training, max_length, long))
            self._without(data, training, max_length, long)
        return [row for row in asked if row.id not in gone]

    def account(self, data: str) -> Account:
        """The account of a data set in which the rows that no training can read are bad."""
        account = self.loaded[data].account
        told: set[str] = set()
        for training, max_length, long in self.vain[data]:
            never = [row for row in long if row.id not in self.read[data] | told]
            account = self._without(data, training, max_length, never, account)
            told.update(row.id for row in never)
        return account

    def notes(self) -> list[str]:
        """One for each training that cannot read what another does, and one for each close call."""
        some = [
            f"{training}: of the data set '{data}' {_rows(ids)} left out whose prompt alone fills max_length {max_length}, "
            f"first {short_place(self.loaded[data].places[ids[0]])}"
            for data, found in self.vain.items()
            for training, max_length, long in found
            if (ids := [row.id for row in long if row.id in self.read[data]])
        ]
        return some + [
            f"of the data set '{data}' {_rows(ids)} may have a prompt that alone fills max_length {max_length}: the mixture "
            "step counts their tokens exactly"
            for (data, max_length), ids in self.close.items()
            if ids
        ]

    def _without(
        self, data: str, training: str, max_length: int, long: Sequence[Row], account: Account | None = None
    ) -> Account:
        loaded = self.loaded[data]
        loaded = loaded if account is None else Loaded(loaded.rows, account, loaded.places)
        error = too_long(training, max_length)
        return take_out(loaded, self.sources[data], [(row, error) for row in long]).account

    def _may_fill(self, row: Row, max_length: int) -> bool:
        """Whether that is a close call; not where nothing is known of the tokenizer."""
        return most_tokens(row) >= max_length and self.bounds(row)[0] > FEWEST and self.bounds(row)[1] >= max_length

    def _fills(self, row: Row, max_length: int) -> bool:
        return most_tokens(row) >= max_length and self.bounds(row)[0] >= max_length


def _rows(ids: Collection[str]) -> str:
    return f"{len(ids):,} row{'s' * (len(ids) != 1)}"
