"""Work that is carried on from is there as it was written, or not at all."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.kept import (
    MARKER,
    PIECE,
    digest,
    file_digest,
    keep,
    kept,
    mark_whole,
    marked,
    sealed,
    stretch_digest,
    unsealed,
)

JSON = st.recursive(
    st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner | st.none()) | st.dictionaries(st.text(), inner | st.none()),
    max_leaves=9,
)


def write(folder: Path, data: bytes, name: str = "tokens") -> Path:
    keep(folder, name, ".x", partial(Path.write_bytes, data=data))
    (file,) = folder.glob(f"{name}-*.x")
    return file


@pytest.mark.parametrize("data", [b"", b"a", b"\n" * 9999])
def test_what_was_kept_is_found_by_its_name_alone(tmp_path, data):
    assert kept(tmp_path / "none", "tokens", ".x") is None
    file = write(tmp_path / "new", data)
    assert kept(tmp_path / "new", "tokens", ".x") == file
    assert file.read_bytes() == data
    assert kept(tmp_path / "new", "token", ".x") is None
    assert kept(tmp_path / "new", "tokens", ".y") is None
    assert list((tmp_path / "new").iterdir()) == [file]


@pytest.mark.parametrize("damage", [*range(24), "cut", "empty", "longer"])
def test_what_has_changed_is_told_of_and_removed(tmp_path, caplog, damage):
    file = write(tmp_path, b"abc")
    data = {"cut": b"ab", "empty": b"", "longer": b"abcd"}.get(damage) if isinstance(damage, str) else None
    if data is None:
        flipped = bytearray(b"abc")
        flipped[damage // 8] ^= 1 << damage % 8
        data = bytes(flipped)
    file.write_bytes(data)
    assert kept(tmp_path, "tokens", ".x") is None
    assert caplog.messages == [f"{file} has changed since it was written: it is made again"]
    assert list(tmp_path.iterdir()) == []


def test_a_whole_one_is_found_beside_one_that_has_changed(tmp_path):
    write(tmp_path, b"one").write_bytes(b"two")
    keep(tmp_path, "tokens", ".x", partial(Path.write_bytes, data=b"three"))
    assert kept(tmp_path, "tokens", ".x").read_bytes() == b"three"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def half(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        keep(tmp_path, "tokens", ".x", half)
    assert list(tmp_path.iterdir()) == []


@given(JSON)
def test_what_is_sealed_is_read_as_it_was(value):
    text = sealed(value)
    assert "\n" not in text
    assert unsealed(text) == unsealed(text.encode()) == value


def test_no_flipped_bit_in_what_is_sealed_gives_another_value():
    value = {"training": "t", "files": {"a": 3}, "fsdp": False}
    whole = sealed(value).encode()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert unsealed(bytes(flipped)) in (None, value), bit


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "{}", '{"xxh3": 1}', '{"value": 1}', "[" * 99_999])
def test_what_nobody_sealed_is_none(text):
    assert unsealed(text) is None


@pytest.mark.parametrize(
    "data", [b"", b"a", b"b", b"ab", b"a\0", b"\0" * (PIECE - 1), b"\0" * PIECE, b"\0" * PIECE + b"a"]
)
def test_a_file_has_the_digest_of_all_its_bytes(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == digest(data)


def test_what_cannot_be_read_just_now_stays(tmp_path, monkeypatch):
    file = write(tmp_path, b"abc")

    def failing(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("mixmerge.kept.file_digest", failing)
    with pytest.raises(OSError, match="Stale file handle"):
        kept(tmp_path, "tokens", ".x")
    assert file.exists()


def test_what_cannot_be_read_is_told_of_and_is_not_there(tmp_path, caplog, monkeypatch):
    file = write(tmp_path, b"abc")

    def failing(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mixmerge.kept.file_digest", failing)
    assert kept(tmp_path, "tokens", ".x") is None
    assert caplog.messages == [f"{file} cannot be read: Input/output error: it is made again"]


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 9), (3, PIECE), (5, 2 * PIECE), (PIECE, 10 * PIECE)])
def test_a_stretch_of_a_file_has_the_digest_of_its_bytes(tmp_path, start, size):
    data = bytes(range(256)) * (2 * PIECE // 256 + 1)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        assert stretch_digest(file.fileno(), start, size) == digest(data[start : start + size])


def test_a_marked_folder_may_be_marked_again_and_tells_what_it_was_told(tmp_path, caplog):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / f"{MARKER}.part").write_bytes(b"left by a kill")
    for told in ("one", "two"):
        mark_whole(tmp_path, {"told": told})
        found = marked(tmp_path)
        assert found["told"] == told
        assert list(found["files"]) == list(found["xxh3"]) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", MARKER]
    (tmp_path / "a").write_bytes(b"2")
    assert marked(tmp_path, read=False) == found
    assert marked(tmp_path) is None
    assert caplog.messages == [f"{tmp_path / 'a'} has changed since it was written: not carried on from"]
    (tmp_path / MARKER).unlink()
    assert marked(tmp_path) is None
    assert len(caplog.messages) == 1, "a kill leaves one without, which is nothing to tell"
