"""Tokenised rows on disk, for whoever trains on the same: a group's processes, a training that carries on, other trainings.

One idea: a file is named by all that its ids follow from and by the digest of its bytes, so it is right or not there; it
appears whole, and is read by mapping it into memory, of which the processes of a machine then share one copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import xxhash

from mixmerge.model.folder import TOKENIZER_FILES
from mixmerge.train import group
from mixmerge.train.tokens import Tokenised, TokenisedPairs

log = logging.getLogger(__name__)
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
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.{uuid4().hex}.part"  # other machines write here too
    with arrow.ipc.new_file(str(partial), table.schema) as out:
        out.write_table(table, max_chunksize=max(1, table.num_rows))  # in one piece, which is read without a copy
    partial.replace(folder / f"{name}-{_digest(_mapped(partial))}.arrow")


def _read(folder: Path, name: str, kind: type[T]) -> T | None:
    import pyarrow as arrow

    for file in folder.glob(f"{name}-*.arrow"):
        with suppress(FileNotFoundError):  # removed since it was listed
            held = _mapped(file)
            if file.stem == f"{name}-{_digest(held)}":  # asked first: of other bytes arrow may crash
                table = arrow.ipc.open_file(held).read_all()
                columns: dict[str, Any] = {column: _rows(table.column(column)) for column in kind.columns}
                return kind(**columns, **json.loads(table.schema.metadata[b"counts"]))
            log.warning("%s has changed since it was written: tokenised again", file)
            file.unlink()
    return None


def _mapped(file: Path) -> Any:
    import pyarrow as arrow

    return arrow.memory_map(str(file)).read_buffer() if file.stat().st_size else arrow.py_buffer(b"")


def _digest(held: Any) -> str:
    return xxhash.xxh3_128(held).hexdigest()


def _rows(column: Any) -> list[Any]:
    """Of a column of lists a numpy array each, int32, none of them copied."""
    rows: list[Any] = []
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        rows += (values[begin:end] for begin, end in pairwise(offsets))
    return rows
