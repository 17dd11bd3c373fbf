"""A file under a second name: linked where that can be, copied where not, and noticed when somebody writes to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixmerge.hashes import file_sha256
from mixmerge.linking import WORTH, link_equal, link_or_copy, stamps


def reflinks(folder: Path) -> bool:
    """Whether two files here can share their blocks and be apart."""
    (folder / "probe").write_bytes(b"x" * 4096)
    link_or_copy(folder / "probe", folder / "probed")
    return not (folder / "probed").samefile(folder / "probe") and (folder / "probed").stat().st_blocks > 0


def large(path: Path, first: bytes = b"a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(first + bytes(WORTH))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_a_second_name_takes_no_room_where_links_can_be_made(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert (tmp_path / "b").samefile(tmp_path / "a") or reflinks(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"] or reflinks(tmp_path)


def test_a_link_into_a_hub_cache_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "snapshot").symlink_to(tmp_path / "blob")
    link_or_copy(tmp_path / "snapshot", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == b"weights"
    (tmp_path / "blob").unlink()
    assert (tmp_path / "copy").read_bytes() == b"weights", "the cache may be emptied"


def test_where_no_link_can_be_made_the_bytes_are_copied(tmp_path):
    target = Path("/dev/shm")
    if not target.is_dir() or target.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to copy to")
    large(tmp_path / "a")
    copy = target / f"mixmerge-test-{os.getpid()}"
    try:
        link_or_copy(tmp_path / "a", copy)
        assert copy.read_bytes() == (tmp_path / "a").read_bytes()
        assert copy.stat().st_nlink == 1
    finally:
        copy.unlink(missing_ok=True)


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"


def test_equal_large_files_become_one_and_all_others_stay(tmp_path):
    made, other = tmp_path / "made", tmp_path / "other"
    for name, first in (("same", b"s"), ("changed", b"c"), ("own", b"o")):
        large(made / name, first)
    large(other / "named otherwise", b"s")
    large(other / "changed", b"d")
    for folder in (made, other):
        (folder / "small").write_text("the same, and not worth it")
    said = hashes(other) | {"gone": file_sha256(made / "own")}
    assert link_equal(made, hashes(made), [(other, said)]) == WORTH + 1
    assert (made / "same").samefile(other / "named otherwise") or reflinks(tmp_path)
    assert (made / "small").stat().st_nlink == 1
    assert sorted(path.name for path in made.iterdir()) == ["changed", "own", "same", "small"]
    assert [(made / name).read_bytes()[:1] for name in ("same", "changed", "own")] == [b"s", b"c", b"o"]


def test_a_file_that_is_no_longer_what_its_record_says_replaces_none(tmp_path):
    made, other = tmp_path / "made", tmp_path / "other"
    large(made / "weights")
    said = hashes(made)
    large(other / "weights", b"flipped")
    assert link_equal(made, said, [(other, said)]) == 0
    assert hashes(made) == said


def test_what_is_written_under_another_name_changes_the_stamp(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "alone").write_text("1")
    os.link(tmp_path / "a", tmp_path / "b")
    before = stamps(tmp_path, ["a", "alone"])
    assert before.keys() == {"a"}
    os.utime(tmp_path / "b", (0, 0))
    assert stamps(tmp_path, ["a"]) != before
