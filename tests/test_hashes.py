"""Hashes of files: those of large ones are remembered, and never trusted where the file may have changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmerge import hashes
from mixmerge.hashes import MOST, RACY_NS, REMEMBERED, SMALL, FileHashes, cache_folder, each_sha256, file_sha256

OLD = 10**18  # an mtime of long ago, in ns
LONG_AGO_NS = -(10**12)  # what `RACY_NS` is where files of just now are to count as settled: a ctime cannot be given
WRITER = f"""
import sys
from pathlib import Path
from mixmerge import hashes
from mixmerge.hashes import FileHashes
hashes.RACY_NS = {LONG_AGO_NS}
folder, *files = map(Path, sys.argv[1:])
for file in files:
    hashes = FileHashes(folder)
    hashes(file)
    hashes.save()
"""


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files count as changed long ago."""
    monkeypatch.setattr(hashes, "RACY_NS", LONG_AGO_NS)


@pytest.fixture
def large(tmp_path, settled) -> Path:
    """A file that is worth remembering, and old."""
    return write(tmp_path / "model.safetensors", b"a")


def write(path: Path, first: bytes, mtime: int | None = OLD) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(first + bytes(SMALL))
    if mtime is not None:
        os.utime(path, ns=(mtime, mtime))
    return path


def change_in_place(path: Path, first: bytes) -> None:
    """Other bytes of the same size in the same file, and the same mtime."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(first)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ino,
    )


def make_up(cache: Path, entry: list) -> None:
    """Put this in the place of the one file that is remembered, under a seal that holds."""
    (name,) = json.loads((cache / REMEMBERED).read_text())["files"]
    files = {name: entry}
    (cache / REMEMBERED).write_text(json.dumps({"seal": hashes._seal(files), "files": files}))


def told(folder: Path | None, *files: Path) -> list[str]:
    """What a process of its own would be told of these files."""
    known = FileHashes(folder)
    found = [known(file) for file in files]
    known.save()
    return found


# Hashing


def test_the_hash_of_a_file_is_its_sha256_and_several_keep_their_order(tmp_path):
    files = [tmp_path / str(number) for number in range(30)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * number * 1000)
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert list(each_sha256(files, file_sha256)) == expected
    assert list(each_sha256(files, FileHashes(tmp_path))) == expected
    with pytest.raises(FileNotFoundError):
        list(each_sha256([*files, tmp_path / "gone"], file_sha256))


# Remembering


def test_a_large_old_file_is_read_once(large, tmp_path):
    """Shown by a memory that says something else of it, and is believed."""
    cache = tmp_path / "cache"
    (first,) = told(cache, large)
    (entry,) = json.loads((cache / REMEMBERED).read_text())["files"].values()
    assert entry[-1] == first
    make_up(cache, [*entry[:-1], "made up"])
    assert told(cache, large) == ["made up"], "it was not read"
    assert told(None, large) == [first]


@pytest.mark.parametrize("field", range(5), ids=["size", "mtime", "ctime", "inode", "device"])
def test_what_is_remembered_of_a_file_that_differs_in_one_thing_is_not_believed(large, tmp_path, field):
    cache = tmp_path / "cache"
    right = told(cache, large)
    (entry,) = json.loads((cache / REMEMBERED).read_text())["files"].values()
    entry[field] += 1
    make_up(cache, [*entry[:-1], "made up"])
    assert told(cache, large) == right


def test_what_an_earlier_mixmerge_remembered_without_ctime_is_not_believed(large, tmp_path):
    right = told(tmp_path / "cache", large)
    stat = large.stat()
    make_up(tmp_path / "cache", [stat.st_size, stat.st_mtime_ns, stat.st_ino, "made up"])
    assert told(tmp_path / "cache", large) == right


def test_a_model_unpacked_over_another_of_its_size_and_date_is_read_again(large, tmp_path):
    cache, packed = tmp_path / "cache", tmp_path / "other.tar"
    first = told(cache, large)
    other = write(tmp_path / "other" / large.name, b"b")
    subprocess.run(["tar", "-cf", packed, "-C", other.parent, other.name], check=True)
    before = large.stat()
    subprocess.run(["tar", "-xf", packed, "--overwrite", "-C", large.parent], check=True)
    after = large.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert told(cache, large) == [file_sha256(large)] != first


@pytest.mark.parametrize("how", ["mtime", "size", "inode", "none of these"])
def test_a_file_with_another_mtime_size_or_inode_is_read_again(large, tmp_path, how):
    cache = tmp_path / "cache"
    first = told(cache, large)
    if how == "size":
        with large.open("ab") as file:
            file.write(b"b")
        os.utime(large, ns=(OLD, OLD))
    elif how == "inode":
        other = write(tmp_path / "other", b"b")
        other.replace(large)
    else:
        change_in_place(large, b"b")
        if how == "mtime":
            os.utime(large, ns=(OLD, OLD + 1))
    assert told(cache, large) == [file_sha256(large)] != first


def test_a_file_changed_in_the_tick_in_which_it_was_read_is_not_trusted(tmp_path):
    cache = tmp_path / "cache"
    young = write(tmp_path / "young", b"a", mtime=None)
    told(cache, young)
    change_in_place(young, b"b")
    assert told(cache, young) == [file_sha256(young)]
    assert not (cache / REMEMBERED).exists()


def test_an_old_file_that_came_just_now_is_not_trusted(tmp_path):
    told(tmp_path / "cache", write(tmp_path / "unpacked", b"a"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("ahead", [-RACY_NS // 2, 10 * RACY_NS])
def test_a_file_of_just_now_or_of_the_future_is_not_trusted(tmp_path, ahead):
    cache = tmp_path / "cache"
    file = write(tmp_path / "file", b"a", mtime=time.time_ns() + ahead)
    told(cache, file)
    change_in_place(file, b"b")
    assert told(cache, file) == [file_sha256(file)]


def test_a_file_that_changes_while_it_is_read_is_not_trusted(large, tmp_path, monkeypatch):
    def read_while_it_changes(path: Path) -> str:
        found = file_sha256(path)
        write(path, b"b", mtime=OLD + 1)
        return found

    monkeypatch.setattr(hashes, "file_sha256", read_while_it_changes)
    told(tmp_path / "cache", large)
    assert not (tmp_path / "cache").exists()


def test_a_small_file_is_always_read(tmp_path):
    small = tmp_path / "config.json"
    small.write_bytes(b"a" * (SMALL - 1))
    os.utime(small, ns=(OLD, OLD))
    told(tmp_path / "cache", small)
    assert not (tmp_path / "cache").exists()


def test_one_planning_reads_a_file_once_whatever_its_size(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("a")
    known = FileHashes(None)
    first = known(file)
    file.write_text("b")
    assert known(file) == first
    assert FileHashes(None)(file) != first


def test_a_link_is_remembered_as_the_file_that_it_leads_to(large, tmp_path):
    (tmp_path / "link").symlink_to(large)
    told(tmp_path / "cache", tmp_path / "link")
    assert list(json.loads((tmp_path / "cache" / REMEMBERED).read_text())["files"]) == [str(large)]
    other = write(tmp_path / "other", b"b")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(other)
    assert told(tmp_path / "cache", tmp_path / "link") == [file_sha256(other)]


# Damage, and several at once


def test_a_damaged_memory_costs_time_and_nothing_else(large, tmp_path):
    cache = tmp_path / "cache"
    (right,) = told(cache, large)
    whole = (cache / REMEMBERED).read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (cache / REMEMBERED).write_bytes(damaged)
        assert FileHashes(cache)(large) == right, place
    for text in (
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'{"files": 3}',
        b'{"files": {}}',
        whole[:-9],
        b"[" * 100_000,
        b"\xff",
    ):
        (cache / REMEMBERED).write_bytes(text)
        assert told(cache, large) == [right], text[:20]
        assert (cache / REMEMBERED).read_bytes() == whole, "and it is whole again"


def test_a_memory_that_cannot_be_written_is_done_without(large, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert told(tmp_path / "file" / "cache", large) == [file_sha256(large)]
    (tmp_path / "cache" / REMEMBERED).mkdir(parents=True)
    assert told(tmp_path / "cache", large) == [file_sha256(large)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [REMEMBERED]


def test_processes_that_write_at_once_leave_a_memory_that_is_whole(tmp_path, settled):
    cache = tmp_path / "cache"
    groups = [
        [write(tmp_path / f"{group}-{number}", bytes([group, number])) for number in range(6)] for group in range(4)
    ]
    crowd = [subprocess.Popen([sys.executable, "-c", WRITER, str(cache), *map(str, files)]) for files in groups]
    for process in crowd:
        assert process.wait(120) == 0
    files = [file for group in groups for file in group]
    kept = json.loads((cache / REMEMBERED).read_text())["files"]
    assert kept, "the last writer's at least"
    assert told(cache, *files) == [file_sha256(file) for file in files]
    assert sorted(json.loads((cache / REMEMBERED).read_text())["files"]) == sorted(map(str, files))
    assert [path.name for path in cache.iterdir()] == [REMEMBERED]


def test_what_one_process_learns_is_added_to_what_another_learnt_meanwhile(tmp_path, settled):
    files = [write(tmp_path / name, name.encode()) for name in "ab"]
    one, other = FileHashes(tmp_path), FileHashes(tmp_path)
    one(files[0])
    other(files[1])
    one.save()
    other.save()
    assert len(json.loads((tmp_path / REMEMBERED).read_text())["files"]) == 2


def test_the_memory_keeps_the_newest_and_stays_small(large, tmp_path):
    full = FileHashes(tmp_path)
    full._new = {f"/nowhere/{number}": [1, 2, 3, 4, 5, "x"] for number in range(MOST)}
    full.save()
    told(tmp_path, large)
    kept = json.loads((tmp_path / REMEMBERED).read_text())["files"]
    assert (len(kept), str(large) in kept, "/nowhere/0" in kept) == (MOST, True, False)


# Where


def test_the_folder_is_the_users_or_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MIXMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mixmerge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mixmerge"


def test_a_user_without_a_home_has_no_such_folder():
    code = (
        "import os, sys\nsys.path[:0] = sys.argv[1:]\nfrom mixmerge.hashes import FileHashes, cache_folder\n"
        "os.setuid(54321)\nprint(cache_folder(), FileHashes(cache_folder())(__import__('pathlib').Path('/etc/hosts')) != '')"
    )
    if os.getuid() != 0:
        pytest.skip("only root may become another user")
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    environment.pop("MIXMERGE_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, env=environment)
    assert done.stdout == "None True\n", done.stderr


def test_planning_again_reads_neither_a_large_base_nor_large_data(study, mixmerge, monkeypatch, tmp_path, settled):
    """Shown by a memory that says something else of them: the next planning believes it, a first one does not."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MIXMERGE_CACHE", str(cache))
    base = study.folder / "base"
    original = base.resolve()
    base.unlink()
    base.mkdir()
    for file in original.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    write(base / "extra.json", b"a")
    rows = study.folder / "data/general.en.jsonl"
    rows.write_text(rows.read_text() + "\n" * SMALL)

    def ids() -> list[str]:
        status, out, err = mixmerge("plan", study.recipe, "--json", "--out", study.out)
        assert status == 0, err
        return [step["id"] for step in json.loads(out)["steps"]]

    first = ids()
    files = json.loads((cache / REMEMBERED).read_text())["files"]
    assert set(files) == {str(base / "extra.json"), str(rows)}
    assert ids() == first
    for made_up in files:
        told = files | {made_up: [*files[made_up][:-1], "made up"]}
        (cache / REMEMBERED).write_text(json.dumps({"seal": hashes._seal(told), "files": told}))
        assert ids() != first, made_up
    assert not study.out.exists()
    (cache / REMEMBERED).unlink()
    assert ids() == first
