"""How wide the columns of a table are, and which of them stand beside each other, so that no word is broken.

Columns that do not fit stand in a table below, with the first column again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len

GAP = 2  # between columns
WHOLE = re.compile(r"\[[^\]\n]*\]|\S+")  # what is not broken: a word, an interval


def abreast(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each table, by index, for so many characters; the first column is in all.

    >>> abreast(["name", "score", "note"], [["a", "[10.0, 20.0]", "by definition"]], 30)
    [[0, 1, 2]]
    >>> abreast(["name", "score", "note"], [["a", "[10.0, 20.0]", "by definition"]], 20)
    [[0, 1], [0, 2]]
    """
    needs = [_most(WHOLE.findall("\n".join(cells))) for cells in _columns(heads, rows)]
    tables = [[0]]
    for at in range(1, len(heads)):
        beside = [*tables[-1], at]
        if len(tables[-1]) > 1 and sum(needs[i] + GAP for i in beside) - GAP > width:
            beside = [0, at]
            tables.append(beside)
        tables[-1] = beside
    return tables


def widths(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """The width of each column of one table: what its lines take, or a common bound that still breaks no word.

    None where words have to be broken.

    >>> widths(["name", "note"], [["a", "by definition"]], 15)
    [4, 10]
    """
    columns = _columns(heads, rows)
    needs = [_most(WHOLE.findall("\n".join(cells))) for cells in columns]
    wants = [_most("\n".join(cells).split("\n")) for cells in columns]
    room = width - GAP * (len(heads) - 1)
    for bound in range(max(wants), -1, -1):
        found = [max(need, min(want, bound)) for need, want in zip(needs, wants, strict=True)]
        if sum(found) <= room:
            return found
    return None


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[head, *(row[at] for row in rows)] for at, head in enumerate(heads)]


def _most(parts: Sequence[str]) -> int:
    return max(map(cell_len, parts), default=0)
