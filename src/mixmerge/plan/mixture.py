"""What the mixture of a training is made of: its cells with their shares, its data sets, its budget.

One idea: a mixture is known before it is drawn. What is wanted is worked out from the recipe and the rows that are there,
refused where these cannot give it, and then written down as the `what` and `how` of a mixture step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixmerge.data.formats import Row
from mixmerge.data.loading import Loaded
from mixmerge.data.mixture import Cell, check_rows, check_tokens
from mixmerge.data.overlap import Overlap, counted
from mixmerge.data.shares import by_temperature, capped, part_of
from mixmerge.data.sources import DataSource, fingerprint
from mixmerge.errors import DataError, RecipeError
from mixmerge.plan.budget import both_sides, cut_at, prompt_bounds, token_bounds
from mixmerge.plan.graph import Step
from mixmerge.plan.identity import fingerprint as identity_of
from mixmerge.plan.lengths import LongPrompts
from mixmerge.plan.training import longest_row
from mixmerge.recipe.budgets import Grant, budget_of
from mixmerge.recipe.load import LoadedRecipe
from mixmerge.recipe.schema import DataSet, Trained, Training


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one training draws: shares by cell, as `asked` and as caps leave them, from the data sets `used`."""

    name: str
    training: Training
    asked: Mapping[Cell, float]
    shares: Mapping[Cell, float]
    used: tuple[str, ...]
    repeats: Mapping[Cell, int]
    budget: Grant
    where: str

    @property
    def pairs(self) -> bool:
        return self.training.method == "dpo"

    @property
    def longest(self) -> int | None:
        return longest_row(self.training)


class Mixtures:
    """The mixtures of a study: `rows` are those to draw from, `dropped` those that overlap with prompts."""

    def __init__(
        self,
        recipe: LoadedRecipe,
        sources: Mapping[str, DataSource],
        loaded: Mapping[str, Loaded],
        rows: Mapping[str, list[Row]],
        dropped: Mapping[str, list[Overlap]],
        base: Step,
        sha256: Callable[[Path], str],
    ) -> None:
        self.loaded, self.recipe, self.sources, self.sha256 = recipe, recipe.recipe, sources, sha256
        self.rows, self.dropped = rows, dropped
        folder = Path(base.how["path"]) if "path" in base.how else None
        jinja, trimmed = base.what["chat_template"], base.what["trim"] is not None
        self.bounds = token_bounds(folder, jinja, trimmed=trimmed)
        self.long = LongPrompts(loaded, sources, prompt_bounds(folder, jinja, trimmed=trimmed))

    def wanted(self, name: str, entry: Trained) -> Wanted:
        """What the training of an expert or a baseline draws.

        Raises:
            RecipeError: a share with no row behind it, caps or a budget that cannot be.
        """
        group = "experts" if name in self.recipe.experts else "baselines"
        asked = self._shares(entry)
        self._check_shares(group, name, entry, asked)
        shares = self._capped(group, name, entry, asked)
        return Wanted(
            name,
            self.recipe.training_of(entry),
            asked,
            shares,
            used=tuple(sorted({data for objective, _ in shares for data in self._of_objective(objective)})),
            repeats={
                cell: entry.max_repeats[key] for cell in sorted(shares) if (key := part_of(cell, entry.max_repeats))
            },
            budget=budget_of(self.recipe, name, self.loaded.marks),
            where=self._where(group, name),
        )

    def check(self, wanted: Wanted) -> None:
        """Refuse what drawing would certainly refuse: prompts too long to learn from, a budget that the data cannot fill.

        Raises:
            DataError, RecipeError: names the first row, or the cell.
        """
        cells = self._cells(wanted)
        shares, budget, repeats = wanted.shares, wanted.budget, wanted.repeats
        times = wanted.training.max_repeats
        try:
            if budget.unit == "tokens":
                bounds = cut_at(wanted.longest, self.bounds)
                bounds = both_sides(bounds) if wanted.pairs else bounds
                check_tokens(cells, shares, budget=budget.amount, max_repeats=times, repeats=repeats, bounds=bounds)
            else:
                check_rows(cells, shares, budget=budget.amount, max_repeats=times, repeats=repeats)
        except DataError as error:
            raise RecipeError(error.what, where=wanted.where, do=error.do) from error

    def what(self, wanted: Wanted) -> dict[str, Any]:
        """All that the drawn rows depend on; a key that changes nothing is left out, so that it makes nothing new."""
        shares, asked = wanted.shares, wanted.asked
        codes = sorted({code for _, code in shares})
        what: dict[str, Any] = {
            "cells": [{"objective": o, "lang": c, "share": share} for (o, c), share in sorted(shares.items())],
            "data": {data: self._data_identity(data, self._covered(data, codes)) for data in wanted.used},
            "budget": wanted.budget.amount,
            "unit": wanted.budget.unit,
            "max_repeats": wanted.training.max_repeats,
            "seed": self.recipe.seed,
        }
        if wanted.pairs:
            what["pairs"] = True
        if wanted.longest is not None:
            what["max_length"] = wanted.longest
        if shares != asked:
            what["capped"] = {
                f"{o}/{c}": {"asked": asked[o, c], "share": shares[o, c]}
                for o, c in sorted(shares)
                if shares[o, c] < asked[o, c]
            }
        if wanted.repeats:
            what["repeats"] = {f"{o}/{c}": most for (o, c), most in wanted.repeats.items()}
        if dropped := self._dropped_from(wanted):
            # What is left out is hashed; which rows these are is looked up, not hashed a second time row by row.
            what["dropped"] = {
                "rows": identity_of(_ids(dropped)),
                "counts": counted(overlap for found in dropped.values() for overlap in found),
            }
        return what

    def how(self, wanted: Wanted) -> dict[str, Any]:
        """Where the rows are read again, which of them are left out, and the rule that the budget follows from."""
        how: dict[str, Any] = {
            "sources": {data: asdict(self.sources[data]) for data in wanted.used},
            "folder": str(self.loaded.folder),
        }
        if wanted.budget.rule:
            how["budget_rule"] = wanted.budget.rule
        if dropped := self._dropped_from(wanted):
            how["dropped"] = _ids(dropped)
        return how

    def _where(self, *path: str) -> str:
        return self.loaded.marks.where(path)

    def _shares(self, entry: Trained) -> dict[Cell, float]:
        """Share of each (objective, language) cell, those above 0, adding up to 1 (by temperature: to 9 digits)."""
        languages = entry.languages or dict.fromkeys(self.recipe.languages, 1.0)
        if entry.temperature is None:
            total = sum(entry.mixture.values()) * sum(languages.values())
            cells = {(o, c): a * b / total for o, a in entry.mixture.items() for c, b in languages.items()}
        else:
            cells = {}
            for objective, part in entry.mixture.items():
                counts = Counter(row.lang for data in self._of_objective(objective) for row in self.rows[data])
                found = by_temperature(counts, entry.temperature, languages)
                whole = sum(entry.mixture.values())
                cells |= {(objective, code): part / whole * share for code, share in found.items()}
        return {cell: share for cell, share in cells.items() if share > 0}

    def _check_shares(self, group: str, name: str, entry: Trained, shares: Mapping[Cell, float]) -> None:
        """Refuse a share with no row behind it."""
        if gone := next((o for o, part in entry.mixture.items() if part and o not in {o for o, _ in shares}), None):
            raise RecipeError(
                f"no '{gone}' row in any of its languages",
                where=self._where(group, name, "mixture", gone),
                do="add data, or leave it out of this mixture",
            )
        for objective, code in shares:
            if not any(row.lang == code for data in self._of_objective(objective) for row in self.rows[data]):
                raise RecipeError(
                    f"no '{objective}' row in '{code}'",
                    where=self._where(group, name, "mixture", objective),
                    do="add data in that language, or leave it out of this mixture's languages",
                )

    def _capped(self, group: str, name: str, entry: Trained, shares: Mapping[Cell, float]) -> Mapping[Cell, float]:
        if not entry.caps:
            return shares
        try:
            found = capped(shares, entry.caps)
        except DataError as error:
            raise RecipeError(error.what, where=self._where(group, name, "caps"), do=error.do) from error
        return {cell: share for cell, share in found.items() if share > 0}

    def _cells(self, wanted: Wanted) -> dict[Cell, list[Row]]:
        """The rows that the training can read, by cell."""
        cells: dict[Cell, list[Row]] = {cell: [] for cell in wanted.shares}
        for data in wanted.used:
            objective = self.recipe.data[data].objective
            rows = (row for row in self.rows[data] if (objective, row.lang) in cells)
            try:
                left = self.long.take_out(wanted.name, wanted.longest, data, rows)
            except DataError as error:
                raise error.within(self._where("data", data)) from error
            for row in left:
                cells[objective, row.lang].append(row)
        return cells

    def _dropped_from(self, wanted: Wanted) -> dict[str, list[Overlap]]:
        """By data set, the dropped rows that the cells of a mixture would hold."""
        found = {
            data: [o for o in self.dropped.get(data, ()) if (self.recipe.data[data].objective, o.lang) in wanted.shares]
            for data in wanted.used
        }
        return {data: overlaps for data, overlaps in found.items() if overlaps}

    def _covered(self, data: str, languages: Iterable[str]) -> list[str]:
        return covered(self.recipe.data[data], languages)

    def _of_objective(self, objective: str) -> list[str]:
        return [name for name, data in self.recipe.data.items() if data.objective == objective]

    def _data_identity(self, name: str, languages: list[str]) -> dict[str, Any]:
        source = self.sources[name]
        return {
            "objective": self.recipe.data[name].objective,
            "languages": languages,
            "fingerprint": fingerprint(source, languages, self.loaded.folder, self.sha256),
            "columns": dict(source.columns),
            "lang": source.lang,
        } | source.choices()


def covered(data: DataSet, languages: Iterable[str]) -> list[str]:
    """Those of the languages that a data set covers."""
    return [code for code in languages if data.languages is None or code in data.languages]


def _ids(dropped: Mapping[str, list[Overlap]]) -> dict[str, list[str]]:
    return {data: sorted(overlap.row_id for overlap in found) for data, found in dropped.items()}
