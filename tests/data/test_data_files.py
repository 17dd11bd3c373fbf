"""Local files: compressed ones read as the plain ones do, and one that is cut or damaged is one clear error."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from mixmerge.data.files import read_file
from mixmerge.data.loading import load_rows
from mixmerge.data.sources import DataSource
from mixmerge.errors import DataError


def zstd(data):
    import pyarrow as arrow

    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}, «é» नमस्ते"} for i in range(2000)]
TABLE = [("prompt", "completion"), ("one, two", 'said "so"\nand so'), ("é", "b")]


def delimited(mark):
    return "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in TABLE).encode()


PLAIN = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "a.ndjson": "\n".join(json.dumps(row) for row in ROWS[:3]).encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": delimited(","),
    "a.tsv": delimited("\t"),
}


def refusal(file):
    with pytest.raises(DataError) as caught:
        list(read_file(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", PLAIN)
def test_a_compressed_file_gives_the_rows_of_the_plain_one(tmp_path, name, packed):
    plain, file = tmp_path / name, tmp_path / f"{name}{packed}"
    plain.write_bytes(PLAIN[name])
    file.write_bytes(PACK[packed](PLAIN[name]))
    expected = [(where.rpartition(":")[2], record) for where, record in read_file(plain)]
    assert len(expected) > 1
    assert [(where.rpartition(":")[2], record) for where, record in read_file(file)] == expected
    assert next(iter(read_file(file)))[0] == f"{file}:1"


@pytest.mark.parametrize("packed", PACK)
def test_endings_are_read_whatever_their_case(tmp_path, packed):
    file = tmp_path / f"A.JSONL{packed.upper()}"
    file.write_bytes(PACK[packed](b'{"x": 1}\n'))
    assert list(read_file(file)) == [(f"{file}:1", {"x": 1})]


@pytest.mark.parametrize("packed", PACK)
def test_a_bad_row_of_a_compressed_file_is_named_and_may_be_dropped(tmp_path, packed):
    lines = PLAIN["a.jsonl"].splitlines(keepends=True)
    lines[2] = lines[2].replace(b"q", b"\xff")
    lines[4] = b'{"prompt": "q", "completion": ""}\n'
    (tmp_path / f"a.en.jsonl{packed}").write_bytes(PACK[packed](b"".join(lines)))
    source = DataSource(path="a.{lang}.jsonl" + packed)
    with pytest.raises(DataError, match=rf"a\.en\.jsonl{packed}:3: not UTF-8: .*2 bad rows of 2000"):
        load_rows(source, ["en"], tmp_path)
    dropping = DataSource(path="a.{lang}.jsonl" + packed, bad_rows="drop")
    account = load_rows(dropping, ["en"], tmp_path).account
    assert account.kept == {"en": 1998}
    assert account.bad["empty text"].first == f"a.en.jsonl{packed}:5: 'completion' is empty"


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("packed", PACK)
def test_a_compressed_file_that_is_cut_is_one_error_even_where_bad_rows_are_dropped(tmp_path, packed, share):
    # Lines of random letters, so that something is left of every share of the file.
    lines = [json.dumps({"prompt": "q", "completion": os.urandom(200).hex()}) for _ in range(500)]
    data = PACK[packed]("\n".join(lines).encode())
    file = tmp_path / f"a.jsonl{packed}"
    file.write_bytes(data[: int(len(data) * share)])
    message = refusal(file)
    assert f"the {packed} file is cut or damaged" in message
    assert message.startswith(f"{file}:")
    with pytest.raises(DataError, match="cut or damaged"):
        load_rows(DataSource(path=file.name, bad_rows="drop"), ["en"], tmp_path)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", PLAIN)
def test_a_file_that_is_not_what_its_ending_says_is_one_error(tmp_path, name, packed):
    file = tmp_path / f"{name}{packed}"
    file.write_bytes(PLAIN[name])
    assert f"{file}:1: the {packed} file is cut or damaged" in refusal(file)


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_a_changed_byte_inside_a_compressed_file_is_found_by_its_checksum(tmp_path, packed):
    data = bytearray(PACK[packed](os.urandom(5000).hex().encode()))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / f"a.jsonl{packed}").write_bytes(data)
    assert "cut or damaged" in refusal(tmp_path / f"a.jsonl{packed}")


@pytest.mark.parametrize("packed", PACK)
def test_a_limit_stops_before_the_damage_is_reached(tmp_path, packed):
    lines = [json.dumps({"prompt": "q", "completion": os.urandom(500).hex()}) for _ in range(4000)]
    data = PACK[packed]("\n".join(lines).encode())
    (tmp_path / f"a.jsonl{packed}").write_bytes(data[: len(data) - 100])
    assert len(load_rows(DataSource(path=f"a.jsonl{packed}", limit=5), ["en"], tmp_path).rows) == 5


def test_parts_that_were_packed_one_after_another_are_all_read(tmp_path):
    for packed, pack in PACK.items():
        (tmp_path / f"a.jsonl{packed}").write_bytes(pack(b'{"x": 1}\n') + pack(b'{"x": 2}\n'))
        assert [record for _, record in read_file(tmp_path / f"a.jsonl{packed}")] == [{"x": 1}, {"x": 2}]


def test_an_ending_that_is_not_known_is_named_with_those_that_are(tmp_path):
    for name, ending in (("a.xlsx", ".xlsx"), ("a.txt.gz", ".txt.gz"), ("a.gz", ".gz"), ("a.jsonl.zip", ".zip")):
        (tmp_path / name).write_bytes(b"")
        message = refusal(tmp_path / name)
        assert f"{name}: cannot read a '{ending}' file; known: .jsonl, " in message
        assert ".gz, .bz2, .xz, .zst" in message


def test_parquet_is_not_packed_twice(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    assert "a.parquet.gz: Parquet in another compression; unpack it" in refusal(tmp_path / "a.parquet.gz")


def test_a_cell_may_be_as_long_as_a_document(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,completion\nq,{'word ' * 100_000}\n", encoding="utf-8")
    assert len(load_rows(DataSource(path="a.csv"), ["en"], tmp_path).rows[0].completion) == 500_000


def test_a_column_that_stands_twice_in_a_header_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\tcompletion\nq\ta\tb\n", encoding="utf-8")
    assert "a.tsv: column 'completion' stands twice in the header" in refusal(tmp_path / "a.tsv")
