"""Tokenised rows on disk, for whoever trains on the same: a group's processes, a training that carries on, other trainings.

One idea: a file is named by all that its ids follow from and by the digest of its bytes, so it is right or not there; it
appears whole, and is read by mapping it into memory, of which the processes of a machine then share one copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mixmerge.kept import keep, kept
from mixmerge.model.folder import TOKENIZER_FILES
from mixmerge.train import group
from mixmerge.train.tokens import Tokenised, TokenisedPairs

T = TypeVar("T", Tokenised, TokenisedPairs)
FORMAT = 1
COUNTS = ("kept", "truncated", "dropped", "diverging")


def kept_tokens(folder: Path | None, model: Path, told: Sequence[Any], kind: type[T], make: Callable[[], T]) -> T:
    """What `make` gives, from `folder` where it has been made before; of a group the first process makes it for all.

    `told` with the tokenizer of `model` is all that it follows from; without a folder it is made and not kept. A file whose
    bytes have changed since it was written is made anew.
    """
    if folder is None:
        return make()
    name = hashlib.sha256(json.dumps([FORMAT, kind.__name__, *told, _tokenizer(model)]).encode()).hexdigest()
    with group.first_before_others():
        found = _read(folder, name[:32], kind)
        if found is None:
            found = make()
            _write(folder, name[:32], found)
    return found


def _tokenizer(model: Path) -> list[tuple[str, str]]:
    """The files that ids follow from, with their digests."""
    names = (*TOKENIZER_FILES, "chat_template")
    files = sorted(file for file in model.iterdir() if file.is_file() and file.name.startswith(names))
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


def _write(folder: Path, name: str, tokens: Tokenised | TokenisedPairs) -> None:
    import pyarrow as arrow

    lists = arrow.large_list(arrow.int32())
    columns = {name: arrow.array(getattr(tokens, name), type=lists) for name in tokens.columns}
    table = arrow.table(columns).replace_schema_metadata(
        {"counts": json.dumps({name: getattr(tokens, name) for name in COUNTS})}
    )

    def write(file: Path) -> None:
        with arrow.ipc.new_file(str(file), table.schema) as out:
            out.write_table(table, max_chunksize=max(1, table.num_rows))  # in one piece, which is read without a copy

    with suppress(FileNotFoundError):  # a run that ended has thrown the folder away
        keep(folder, name, ".arrow", write)


def _read(folder: Path, name: str, kind: type[T]) -> T | None:
    import pyarrow as arrow

    file = kept(folder, name, ".arrow")  # of bytes that have changed arrow may crash
    if file is None:
        return None
    try:
        table = arrow.ipc.open_file(arrow.memory_map(str(file))).read_all()
    except FileNotFoundError:  # a run that ended has thrown the folder away
        return None
    columns: dict[str, Any] = {column: _rows(table.column(column)) for column in kind.columns}
    return kind(**columns, **json.loads(table.schema.metadata[b"counts"]))


def _rows(column: Any) -> list[Any]:
    """Of a column of lists a numpy array each, int32, none of them copied."""
    rows: list[Any] = []
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        rows += (values[begin:end] for begin, end in pairwise(offsets))
    return rows
