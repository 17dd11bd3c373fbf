"""The store: whole or not at all, one runner per step, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError, StepError
from mixmerge.plan.graph import Step
from mixmerge.run.history import History
from mixmerge.run.record import files_of, sealed
from mixmerge.run.store import RECORD, Store, named_os_error, read_record, write_json

STEP = Step("merge", "ties", {"density": 0.5})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Folders and records


def test_a_step_is_there_only_once_it_is_committed(store):
    folders = store.begin(STEP)
    (folders.out / "weights").write_text("w")
    (folders.work / "scratch").write_text("s")
    assert store.find(STEP.id) is None
    assert Store(store.root).find(STEP.id) is None
    final = store.commit(STEP, {"id": STEP.id})
    assert store.find(STEP.id) == Store(store.root).find(STEP.id) == final
    assert final == store.folder / "merge" / f"ties--{STEP.id}"
    assert files(store.folder) == {f"merge/ties--{STEP.id}/weights", f"merge/ties--{STEP.id}/{RECORD}"}


def test_a_kill_before_the_record_leaves_nothing_that_counts(store):
    (store.begin(STEP).out / "weights").write_text("w")
    again = Store(store.root)
    assert again.find(STEP.id) is None
    assert History(again).named("merge", "ties") == []
    assert again.interrupted(STEP)
    assert not again.rescue(STEP)


def test_what_an_interrupted_run_left_is_found_by_the_next(store):
    (store.begin(STEP).work / "checkpoint").write_text("half")
    assert (Store(store.root).begin(STEP).work / "checkpoint").read_text() == "half"


def test_a_file_that_was_being_written_when_a_kill_came_is_no_part_of_the_step(store):
    (store.begin(STEP).out / f".{RECORD}.0123").write_text("{")
    (store.begin(STEP).out / "rows.jsonl").write_text("kept")
    final = Store(store.root).commit(STEP, files_of(store.begin(STEP).out))
    assert files(final) == {RECORD, "rows.jsonl"}


COPY = """
import sys, time
from pathlib import Path
from mixmerge.model import prepare
prepare.copy_model = lambda *_: (print("half", flush=True), time.sleep(3600))
prepare.prepare_base(Path(sys.argv[1]), None, Path(sys.argv[2]), trim=None, chat_template=None)
"""
MERGE = """
import sys, time
from pathlib import Path
from mixmerge.merge.checkpoint import Tensor
from mixmerge.merge.writer import CheckpointWriter
with CheckpointWriter(Path(sys.argv[2]), {"w": Tensor("U8", (8,))}, job="j", shard_bytes=8):
    print("half", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize(("code", "kept"), [(COPY, set()), (MERGE, {".out.partial"})], ids=["copy", "merge"])
def test_half_a_copy_that_a_kill_left_is_removed_and_half_a_merge_is_kept(store, tiny_base, code, kept):
    out = store.begin(STEP).out
    with subprocess.Popen([sys.executable, "-c", code, tiny_base, out], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert list(out.parent.glob(".out.*"))
    store.begin(STEP)
    assert {path.name for path in out.parent.iterdir()} == {"out", "work", "step.json"} | kept


def test_a_kill_between_the_record_and_the_place_is_made_good(store):
    write_json(store.begin(STEP).out / RECORD, {"id": STEP.id})
    again = Store(store.root)
    assert again.find(STEP.id) is None
    assert again.rescue(STEP)
    assert again.record(STEP.id) == {"id": STEP.id}
    assert not again.interrupted(STEP)


def test_a_kill_after_the_place_leaves_rubbish_that_is_tidied(store):
    store.begin(STEP)
    store.commit(STEP, {})
    (store.partial(STEP) / "work").mkdir(parents=True)
    store.tidy(STEP)
    assert not store.partial(STEP).exists()
    assert store.find(STEP.id) is not None


def test_tidying_keeps_the_work_of_a_step_that_is_not_done(store):
    store.begin(STEP)
    store.tidy(STEP)
    assert store.interrupted(STEP)


def test_a_folder_without_its_record_counts_as_absent_and_is_replaced(store):
    store.begin(STEP)
    final = store.commit(STEP, {"try": 1})
    (final / RECORD).unlink()
    (final / "old").write_text("x")
    again = Store(store.root)
    assert again.find(STEP.id) is None
    again.begin(STEP)
    assert again.commit(STEP, {"try": 2}) == final
    assert files(final) == {RECORD}


def test_of_two_that_make_the_same_step_the_first_is_kept_and_nothing_is_left_of_the_second(store):
    late = Store(store.root)
    assert late.find(STEP.id) is None
    begun = late.begin(STEP)
    (begun.out / "weights").write_text("2")
    begun.out.rename(store.root / "aside")  # both cannot write in one place, unless one stood still meanwhile
    (store.begin(STEP).out / "weights").write_text("1")
    final = store.commit(STEP, {"files": {"weights": 1}, "by": "first"})
    store.partial(STEP).mkdir(parents=True)
    (store.root / "aside").rename(begun.out)
    assert late.commit(STEP, {"files": {"weights": 1}, "by": "second"}) == final
    assert (late.record(STEP.id)["by"], (final / "weights").read_text()) == ("first", "1")
    assert not late.partial(STEP).exists()


def test_a_damaged_step_gives_way_to_the_one_that_is_made_again(store):
    (store.begin(STEP).out / "weights").write_text("12")
    final = store.commit(STEP, {"files": {"weights": 2}})
    (final / "weights").write_text("1")
    (store.begin(STEP).out / "weights").write_text("34")
    assert store.commit(STEP, {"files": {"weights": 2}}) == final
    assert (final / "weights").read_text() == "34"
    assert list((store.folder / ".partial").iterdir()) == []


def test_a_partial_step_that_lost_a_file_after_its_record_is_not_put_into_its_place(store):
    out = store.begin(STEP).out
    (out / "weights").write_text("1")
    write_json(out / RECORD, {"id": STEP.id, "files": {"weights": 2}})
    assert not Store(store.root).rescue(STEP)
    assert Store(store.root).find(STEP.id) is None


def test_a_step_that_is_begun_again_does_not_write_into_the_files_of_its_inputs(store, tmp_path):
    (tmp_path / "tokenizer.json").write_text("of the input")
    out = store.begin(STEP).out
    (out / "deep").mkdir()
    (out / "rows.jsonl").write_text("kept")
    for name in ("tokenizer.json", "deep/tokenizer.json"):
        os.link(tmp_path / "tokenizer.json", out / name)
    store.begin(STEP)
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["rows.jsonl"]
    assert (tmp_path / "tokenizer.json").read_text() == "of the input"


@pytest.mark.parametrize("damage", ["none", "flipped", "lost", "record"])
def test_a_partial_step_whose_bytes_changed_after_its_record_is_told_of_and_made_again(store, caplog, damage):
    out = store.begin(STEP).out
    (out / "weights").write_text("12")
    write_json(out / RECORD, sealed({"id": STEP.id, **files_of(out)}))
    if damage == "flipped":
        (out / "weights").write_text("13")
    elif damage == "lost":
        (out / "weights").unlink()
    elif damage == "record":
        (out / RECORD).write_text((out / RECORD).read_text().replace("weights", "weighty"))
    again = Store(store.root)
    assert again.rescue(STEP) == (damage == "none")
    assert (again.find(STEP.id) is not None) == (damage == "none")
    told = {
        "flipped": "weights has changed since it was written",
        "lost": "weights is missing",
        "record": "record.json has changed since it was written",
    }
    assert caplog.messages == ([] if damage == "none" else [f"{out}: {told[damage]}: the step is made again"])
    assert not again.rescue(STEP), "there is none any more"
    assert len(caplog.messages) == (damage != "none")


def test_a_step_is_found_by_its_id_whatever_it_was_called(store):
    store.begin(STEP)
    folder = store.commit(STEP, {})
    renamed = Step("merge", "other-name", STEP.what)
    assert store.find(renamed.id) == folder


def test_names_with_dashes_do_not_confuse_the_ids(store):
    step = Step("merge", "a--b", {})
    store.begin(step)
    store.commit(step, {"name": "a--b"})
    again = Store(store.root)
    assert again.find(step.id) is not None
    assert History(again).named("merge", "a--b")[0]["name"] == "a--b"
    assert History(again).named("merge", "a") == []


def test_the_newest_record_of_a_name_comes_first(store):
    for number in (1, 2, 3):
        step = Step("merge", "ties", {"number": number})
        store.begin(step)
        folder = store.commit(step, {"number": number})
        os.utime(folder / RECORD, ns=(number * 10**9, (9 - number) * 10**9))
    assert History(store).named("merge", "ties")[0]["number"] == 1
    assert History(store).named("merge", "slerp") == []


def test_other_processes_work_is_seen_after_a_refresh(store):
    assert store.find(STEP.id) is None
    other = Store(store.root)
    other.begin(STEP)
    other.commit(STEP, {})
    assert store.find(STEP.id) is None
    store.refresh()
    assert store.find(STEP.id) is not None


def test_an_input_that_was_deleted_is_named(store):
    with pytest.raises(StepError, match=rf"the output of step {STEP.id} is not in .*; run the same command again"):
        store.path(STEP.id)


@pytest.mark.parametrize("text", ["", "{", "[1", "\x00\x00"])
def test_a_damaged_record_is_named_and_its_step_counts_as_not_done(store, text):
    store.begin(STEP)
    folder = store.commit(STEP, {})
    (folder / RECORD).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_record(folder)
    assert str(caught.value).startswith(f"{folder / RECORD}: the file is damaged: ")
    assert str(caught.value).endswith(f"; remove the folder {folder} and run the same command again")
    assert store.find(STEP.id) is None
    assert store.damage(STEP.id) == "record.json cannot be read"


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_record_that_names_what_no_file_can_be_called_is_damage(store, name):
    store.begin(STEP)
    folder = store.commit(STEP, {})
    (folder / RECORD).write_text(json.dumps({"id": STEP.id, "files": {name: 3}}))
    store.refresh()
    assert store.find(STEP.id) is None
    assert store.damage(STEP.id) == f"{name} is missing"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"}
    assert "é" in path.read_text(), "people read it"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (
            errno.ENOSPC,
            "no space left on the disk; free some (`mixmerge gc RECIPE`, with the same --out, lists what no recipe needs) and run the same",
        ),
        (errno.EDQUOT, "no space left on the disk"),
        (
            errno.EACCES,
            "no permission to write; let this user write there to go on, or start anew in another --out folder",
        ),
        (errno.EPERM, "no permission to write"),
        (errno.EROFS, "the file system is read-only; mount it writable to go on; `show`, `report` and `verify` read"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_an_error_of_the_system_becomes_one_line_with_the_file(code, word):
    error = named_os_error(OSError(code, os.strerror(code), "/some/file"), "/other")
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"/some/file: {word}")
    assert str(named_os_error(OSError(code, os.strerror(code)), "/other")).startswith(f"/other: {word}")


def test_a_file_that_was_to_get_its_name_later_is_named_by_its_folder(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}/gone: No such file or directory$"):
        write_json(tmp_path / "gone" / "plan.json", {})
    for name in (".leases", "plan.json", "train-a.b"):
        assert str(named_os_error(OSError(errno.EROFS, "", str(tmp_path / name)), "")).startswith(
            f"{tmp_path}/{name}: "
        )
