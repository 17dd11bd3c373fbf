"""Local files of records: JSONL, JSON, CSV, TSV, also compressed, and Parquet.

One idea: a reader yields each row's number with its record, or with a `RowError` where that one row cannot be read; what
is wrong with the file as a whole is a `DataError` and ends the reading. Reading is lazy, except that a JSON array is
read whole. `row` is the line of a JSONL file and the record's 1-based number elsewhere.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixmerge.data.account import RowError
from mixmerge.errors import DataError, reason

Record = dict[str, Any]
BATCH = 1024  # rows of a Parquet file that are decoded at once
LONGEST_CELL = (1 << 31) - 1  # bytes; Python's own limit of 128 KiB is less than a long document
Numbered = Iterator[tuple[int, Any]]  # row, and a record or a RowError


def read_file(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    """Yield (`file:row`, record or what is wrong with it).

    Raises:
        DataError: unknown file type, a file that is damaged or has another shape than its name says.
    """
    kind, packed = _kind(file)
    reader = READERS.get(kind)
    if reader is None:
        do = f"known: {', '.join(READERS)}; all but Parquet also with {', '.join(COMPRESSED)}"
        raise DataError(f"cannot read a '{kind}{packed}' file", where=str(file), do=do)
    if packed and kind == ".parquet":
        raise DataError("Parquet in another compression", where=str(file), do=f"unpack it: Parquet needs no {packed}")
    for row, record in reader(file):
        where = f"{file}:{row}"
        if not isinstance(record, dict | RowError):
            found = f"expected an object, found {type(record).__name__}"
            yield where, RowError(found, kind="not an object", where=where)
        else:
            yield where, record


def _kind(file: Path) -> tuple[str, str]:
    """What a file's name says of its format and its compression: `.jsonl` and `.gz`, or `` for none."""
    last = file.suffix.lower()
    return (Path(file.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines; a byte that is not UTF-8 stays in them as the surrogate that stands for it."""
    packed, number = _kind(file)[1], 0
    try:
        with COMPRESSED[packed](file) if packed else file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                # utf-8-sig on the first line only: spreadsheets write a byte-order mark.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if not packed or isinstance(error, PermissionError):
            raise
        what = f"the {packed} file is cut or damaged ({reason(error)})"
        raise DataError(what, where=f"{file}:{number + 1}", do="fetch or pack it again") from error


def _open_zst(file: Path) -> Any:
    import pyarrow as arrow

    return io.BufferedReader(arrow.input_stream(str(file), compression="zstd"))


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
}


def _undecoded(text: str, where: str) -> RowError | None:
    """The error of a text in which a byte was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        column = len(text[: error.start].encode("utf-8")) + 1
        what = f"not UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x} at column {column}"
        return RowError(what, kind="not UTF-8", where=where, do="save the file as UTF-8")
    return None


class _Twice(dict[str, Any]):
    """An object of which a key was given twice; the last one counts in JSON, and what the writer meant is not known."""

    key = ""


class _Parser:
    """Reads JSON values; `twice` is a key that the last of them, or an object in it, has more than once."""

    def __init__(self) -> None:
        self.twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, text: str) -> Any:
        """A JSON value; ValueError where it is none, or nested or long beyond what Python reads."""
        self.twice = None
        try:
            return self._decoder.decode(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        keys = [key for key, _ in pairs]
        found = _Twice(made)
        self.twice = found.key = next(key for key in keys if keys.count(key) > 1)
        return found


def _key_given_twice(value: Any) -> str | None:
    """A key that an object in a parsed value has more than once."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, _Twice):
            return value.key
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return None


def _twice_error(key: str, where: str) -> RowError:
    return RowError(f"the key '{key}' is given twice in one object", kind="a key given twice", where=where)


def _read_jsonl(file: Path) -> Numbered:
    parser = _Parser()
    for number, line in _lines(file):
        if line.strip():
            yield number, _json_record(parser, line, f"{file}:{number}")


def _json_record(parser: _Parser, line: str, where: str) -> Any:
    if (error := _undecoded(line, where)) is not None:
        return error
    try:
        record = parser.parse(line)
    except ValueError as broken:
        return RowError(f"broken JSON: {_said(broken)}", kind="broken JSON", where=where)
    return record if parser.twice is None else _twice_error(parser.twice, where)


def _said(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json(file: Path) -> Numbered:
    parser, lines = _Parser(), []
    for number, line in _lines(file):
        if (error := _undecoded(line, f"{file}:{number}")) is not None:
            raise error
        lines.append(line)
    try:
        records = parser.parse("".join(lines))
    except ValueError as error:
        line_number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"broken JSON: {_said(error)}", where=f"{file}:{line_number}") from error
    if not isinstance(records, list):
        raise DataError("expected an array of objects", where=f"{file}:1", do="for one object a line, name it .jsonl")
    for row, record in enumerate(records, start=1):
        key = None if parser.twice is None else _key_given_twice(record)
        yield row, record if key is None else _twice_error(key, f"{file}:{row}")


def _read_csv(file: Path) -> Numbered:
    csv.field_size_limit(LONGEST_CELL)
    delimiter = "\t" if _kind(file)[0] == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    row = 0
    try:
        header = next(reader, [])
        if (error := _undecoded(",".join(header), f"{file}:1")) is not None:
            raise DataError(f"the header is {error.what}", where=str(file), do=error.do)
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"column '{twice[0]}' stands twice in the header", where=str(file), do="rename one of them")
        for cells in reader:
            if cells:
                row += 1
                yield row, _csv_record(header, cells, f"{file}:{row}")
    except csv.Error as broken:
        raise DataError(f"broken CSV: {broken}", where=f"{file}:{row + 1}") from broken


def _csv_record(header: list[str], cells: list[str], where: str) -> Record | RowError:
    if (error := _undecoded(",".join(cells), where)) is not None:
        return error
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells under {len(header)} columns", kind="ragged row", where=where)
    return dict(zip(header, cells, strict=True))


def _read_parquet(file: Path) -> Numbered:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except UnicodeDecodeError as error:
        what = f"broken Parquet: text that is not UTF-8 in this row or the {BATCH - 1} after it"
        raise DataError(what, where=f"{file}:{row + 1}", do="store it as UTF-8") from error
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"broken Parquet: {error}", where=f"{file}:{row + 1}") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
