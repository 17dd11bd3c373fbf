"""Drawing a mixture: so many rows or tokens, shared among (objective, language) cells, in a reproducible order.

One idea: every random order is a sort by sha256(seed, purpose, key), so it depends on nothing but the recipe and the
rows: not on the order of files, of dicts, on a library's generator or on the machine; a larger budget draws a superset.
Rows come out interleaved, so that any stretch of the mixture holds the shares of the whole. Shares are met to within
one row a cell, or drawing fails; no row is used more than `max_repeats` times.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from mixmerge.data.formats import Row
from mixmerge.errors import DataError

Cell = tuple[str, str]
Unit = Literal["rows", "tokens"]
ORIGINS = "origins.jsonl"  # beside rows.jsonl: where each of its lines comes from


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row in a mixture; `turn` counts its uses from 0."""

    row: Row
    objective: str
    turn: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CellDraw:
    """What one cell gave. Shares are fractions of the mixture, in its unit; `ids` in drawing order."""

    objective: str
    lang: str
    share_asked: float
    share_got: float
    rows: int
    tokens: int
    available_rows: int
    repeats: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Rows in training order, and the account of each cell in the order of its key."""

    rows: tuple[Drawn, ...]
    cells: tuple[CellDraw, ...]
    budget: int
    unit: Unit
    max_repeats: int
    seed: int
    repeats: Mapping[Cell, int] = field(default_factory=dict)


def draw_mixture(
    cells: Mapping[Cell, Sequence[Row]],
    shares: Mapping[Cell, float],
    *,
    budget: int,
    unit: Unit,
    max_repeats: int,
    seed: int,
    count_tokens: Callable[[Row], int],
    repeats: Mapping[Cell, int] | None = None,
) -> Mixture:
    """Draw `budget` rows or tokens from the cells in proportion to `shares` (any positive scale; normalised here).

    In rows, the cells' numbers come from largest remainders and sum to the budget. In tokens, rows are taken in the
    cell's seeded order up to the total nearest to the cell's part. A cell without share, or with share 0, gives nothing.
    `repeats` overrides `max_repeats` for some cells.

    Raises:
        DataError: impossible shares, an empty cell, a part too small for one row, or one larger than the cell's data
            times `max_repeats`; says what to change.
    """
    repeats = dict(repeats or {})
    if budget < 1 or min([max_repeats, *repeats.values()]) < 1:
        raise DataError(f"budget {budget} and max_repeats {max_repeats} must be at least 1")
    wanted, parts = _parts(cells, shares, budget, unit)
    drawn: dict[Cell, list[Drawn]] = {}
    for cell, part in parts.items():
        taken = _take(cells[cell], cell, part, unit, repeats.get(cell, max_repeats), seed, count_tokens)
        if not taken:
            raise _too_little(cell, part, budget, unit)
        drawn[cell] = taken
    total = sum(_size(item, unit) for taken in drawn.values() for item in taken)
    accounts = tuple(
        CellDraw(
            objective=cell[0],
            lang=cell[1],
            share_asked=float(wanted[cell]),
            share_got=sum(_size(item, unit) for item in taken) / total,
            rows=len(taken),
            tokens=sum(item.tokens for item in taken),
            available_rows=len(cells[cell]),
            repeats=sum(item.turn > 0 for item in taken),
            ids=tuple(item.row.id for item in taken),
        )
        for cell, taken in drawn.items()
    )
    return Mixture(tuple(_interleave(drawn, seed)), accounts, budget, unit, max_repeats, seed, repeats)


def check_rows(
    cells: Mapping[Cell, Sequence[Row]],
    shares: Mapping[Cell, float],
    *,
    budget: int,
    max_repeats: int,
    repeats: Mapping[Cell, int] | None = None,
) -> None:
    """Refuse a budget in rows exactly where `draw_mixture` would, without drawing.

    Raises:
        DataError: as `draw_mixture`.
    """
    for cell, part in _parts(cells, shares, budget, "rows")[1].items():
        times, rows = (repeats or {}).get(cell, max_repeats), len(cells[cell])
        if part < 1:
            raise _too_little(cell, part, budget, "rows")
        if part > rows * times:
            raise _too_much(cell, part, "rows", rows, rows * times, times)


def check_tokens(
    cells: Mapping[Cell, Sequence[Row]],
    shares: Mapping[Cell, float],
    *,
    budget: int,
    max_repeats: int,
    bounds: Callable[[Row], tuple[int, int]],
    repeats: Mapping[Cell, int] | None = None,
) -> None:
    """Refuse a budget in tokens that `draw_mixture` would refuse however rows are counted within their `bounds`.

    `bounds` gives the least and the most tokens that a row can have.

    Raises:
        DataError: a part too small for one row, or one larger than the cell's data times `max_repeats`.
    """
    for cell, share in _normalised(shares).items():
        part, rows = share * budget, cells[cell]
        sizes = [bounds(row) for row in rows]
        if min(least for least, _ in sizes) >= 2 * part:
            raise _too_little(cell, part, budget, "tokens")
        times = (repeats or {}).get(cell, max_repeats)
        most = times * sum(most for _, most in sizes)
        if most + max(most for _, most in sizes) / 2 < part:
            raise DataError(
                f"{_name(cell)} has {_giving(len(rows))} at most {most} tokens with max_repeats {times}, "
                f"but its share of the budget is {math.ceil(part)}",
                do="lower the budget, raise max_repeats, add data or give the cell a smaller share",
            )


def write_mixture(
    mixture: Mixture,
    out: Path,
    *,
    pairs: bool = False,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    origin: Callable[[Row], str] | None = None,
    place: Callable[[Row], tuple[str, int]] | None = None,
    dropped: Mapping[str, Mapping[str, int]] | None = None,
    capped: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Write rows.jsonl and manifest.json into the folder `out`; return the manifest.

    A line of rows.jsonl is {"id", "objective", "lang", "prompt": [message], "completion": [message]}, and with `pairs`
    "rejected": [message], the answer that is not preferred, where the row has one. The manifest holds what was asked and
    got per cell, the ids drawn, and the sha256 of rows.jsonl; with `data` (what is known of each data set, such as its
    fingerprint) and `origin` (the data set of a row) also how much each gave, and for a cell with rows of several the one
    that each id is `from`; with `place` as well (file and row in it), origins.jsonl, whose lines say where each line of rows.jsonl
    comes from: {"id", "data", "file", "row", "turn"}; also `dropped`, where rows were left out beforehand because they overlap with prompts: how many
    by kind and language; and `capped`, where caps held back cells: the share that each would have had, and the one that it
    was asked for.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        _json(
            {
                "id": item.row.id,
                "objective": item.objective,
                "lang": item.row.lang,
                "prompt": item.row.prompt,
                "completion": [{"role": "assistant", "content": item.row.completion}],
            }
            | (
                {"rejected": [{"role": "assistant", "content": item.row.rejected}]}
                if pairs and item.row.rejected is not None
                else {}
            )
        )
        for item in mixture.rows
    ]
    encoded = "".join(f"{line}\n" for line in lines).encode()
    (out / "rows.jsonl").write_bytes(encoded)
    manifest: dict[str, Any] = {
        "budget": mixture.budget,
        "unit": mixture.unit,
        "max_repeats": mixture.max_repeats,
        "seed": mixture.seed,
        "rows": len(mixture.rows),
        "tokens": sum(item.tokens for item in mixture.rows),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "cells": [
            {name: list(value) if name == "ids" else value for name, value in _fields(cell)} for cell in mixture.cells
        ],
    }
    if data is not None and origin is not None:
        _tell_origins(manifest, mixture, data, origin)
        if place is not None:
            manifest["origins"] = {"file": ORIGINS, "sha256": _write_origins(mixture, out / ORIGINS, origin, place)}
    if mixture.repeats:
        manifest["repeats"] = {_name(cell): most for cell, most in sorted(mixture.repeats.items())}
    if capped:
        manifest["capped"] = {name: dict(shares) for name, shares in capped.items()}
    if dropped:
        manifest["dropped"] = {kind: dict(counts) for kind, counts in dropped.items()}
    (out / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return manifest


def _tell_origins(
    manifest: dict[str, Any], mixture: Mixture, data: Mapping[str, Mapping[str, Any]], origin: Callable[[Row], str]
) -> None:
    """Add what each data set gave, and for a cell of several the data set of each of its ids."""
    given: dict[str, list[Drawn]] = {name: [] for name in sorted(data)}
    sources: dict[Cell, list[str]] = {(cell.objective, cell.lang): [] for cell in mixture.cells}
    for item in mixture.rows:  # within a cell these stand in drawing order, as its ids do
        given[origin(item.row)].append(item)
        sources[item.objective, item.row.lang].append(origin(item.row))
    manifest["data"] = {
        name: {**data[name], "rows": len(items), "tokens": sum(item.tokens for item in items)}
        for name, items in given.items()
    }
    for cell in manifest["cells"]:
        names = sources[cell["objective"], cell["lang"]]
        if len(set(names)) > 1:
            cell["from"] = names


def _write_origins(
    mixture: Mixture, path: Path, origin: Callable[[Row], str], place: Callable[[Row], tuple[str, int]]
) -> str:
    """Write where each row comes from, in the order of the rows; return the sha256 of the file."""
    lines = []
    for item in mixture.rows:
        file, row = place(item.row)
        told = {"id": item.row.id, "data": origin(item.row), "file": file, "row": row, "turn": item.turn}
        lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    encoded = "".join(lines).encode()
    path.write_bytes(encoded)
    return hashlib.sha256(encoded).hexdigest()


def _parts(
    cells: Mapping[Cell, Sequence[Row]], shares: Mapping[Cell, float], budget: int, unit: Unit
) -> tuple[dict[Cell, Fraction], dict[Cell, Fraction]]:
    """The share of each cell as a fraction of 1, and its part of the budget; refuses a share of no rows."""
    wanted = _normalised(shares)
    for cell in wanted:
        if not cells.get(cell):
            raise DataError(
                f"no rows for {_name(cell)}, which has a share of {float(wanted[cell]):.3g}",
                do="add data for it, or set its share to 0",
            )
    if unit == "rows":
        return wanted, _largest_remainder(wanted, budget)
    return wanted, {cell: share * budget for cell, share in wanted.items()}


def _too_little(cell: Cell, part: Fraction, budget: int, unit: Unit) -> DataError:
    return DataError(
        f"the budget of {budget} {unit} leaves {float(part):.3g} for {_name(cell)}, less than one row",
        do="raise the budget or set the cell's share to 0",
    )


def _too_much(cell: Cell, part: Fraction, unit: Unit, rows: int, total: int, max_repeats: int) -> DataError:
    return DataError(
        f"{_name(cell)} has {_giving(rows)} {total} {unit} with max_repeats "
        f"{max_repeats}, but its share of the budget is {math.ceil(part)}",
        do=f"lower the budget, raise max_repeats to {math.ceil(part * max_repeats / max(total, 1))}, add data "
        "or give the cell a smaller share",
    )


def _giving(rows: int) -> str:
    return "1 row, which gives" if rows == 1 else f"{rows} rows, which give"


def _normalised(shares: Mapping[Cell, float]) -> dict[Cell, Fraction]:
    """Positive shares as exact fractions of 1, in the order of their keys."""
    for cell, share in shares.items():
        if not math.isfinite(share) or share < 0:
            raise DataError(f"the share of {_name(cell)} is {share}", do="give a number from 0 up")
    total = sum((Fraction(share) for share in shares.values()), Fraction(0))
    if total == 0:
        raise DataError("no share is above 0, so there is nothing to draw")
    return {cell: Fraction(shares[cell]) / total for cell in sorted(shares) if shares[cell] > 0}


def _largest_remainder(wanted: Mapping[Cell, Fraction], budget: int) -> dict[Cell, Fraction]:
    whole = {cell: math.floor(share * budget) for cell, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda cell: (whole[cell] - wanted[cell] * budget, cell))
    for cell in by_remainder[: budget - sum(whole.values())]:
        whole[cell] += 1
    return {cell: Fraction(count) for cell, count in whole.items()}


def _take(
    rows: Sequence[Row],
    cell: Cell,
    part: Fraction,
    unit: Unit,
    max_repeats: int,
    seed: int,
    count_tokens: Callable[[Row], int],
) -> list[Drawn]:
    """The rows of one cell, in its seeded order, whose total in `unit` is nearest to `part`."""
    taken: list[Drawn] = []
    total = 0
    for turn, row in _passes(rows, cell, seed, max_repeats + 1):
        item = Drawn(row, cell[0], turn, count_tokens(row))
        size = _size(item, unit)
        # Nearest total: one more row must bring it nearer than stopping does; a tie stops.
        if abs(total + size - part) >= abs(part - total):
            break
        if turn == max_repeats:
            raise _too_much(cell, part, unit, len(rows), total, max_repeats)
        taken.append(item)
        total += size
    return taken


def _passes(rows: Sequence[Row], cell: Cell, seed: int, passes: int) -> Iterator[tuple[int, Row]]:
    """Pass after pass over the rows, each in a new order that depends on the rows' ids and contents only."""
    for turn in range(passes):
        keyed = [(_digest(seed, "order", *cell, turn, _json(_fields(row))), row) for row in rows]
        for _, row in sorted(keyed, key=lambda pair: pair[0]):
            yield turn, row


def _interleave(drawn: Mapping[Cell, Sequence[Drawn]], seed: int) -> list[Drawn]:
    """All cells in one order: the i-th of a cell's n rows falls at a seeded place in the i-th n-th of the mixture."""
    placed = []
    for cell, taken in drawn.items():
        for index, item in enumerate(taken):
            jitter = Fraction(int.from_bytes(_digest(seed, "interleave", *cell, index)[:8]), 2**64)
            placed.append(((index + jitter) / len(taken), cell, index, item))
    return [item for *_, item in sorted(placed, key=lambda entry: entry[:3])]


def _size(item: Drawn, unit: Unit) -> int:
    return 1 if unit == "rows" else item.tokens


def _digest(seed: int, purpose: str, *key: str | int) -> bytes:
    return hashlib.sha256(_json([seed, purpose, *key]).encode()).digest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _fields(value: Row | CellDraw) -> list[tuple[str, Any]]:
    return [(name, getattr(value, name)) for name in value.__slots__]


def _name(cell: Cell) -> str:
    return f"{cell[0]}/{cell[1]}"
