"""The store: whole or not at all, one runner per step, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError, StepError
from mixmerge.plan.graph import Step
from mixmerge.run import store as store_module
from mixmerge.run.store import RECORD, Store, named_os_error, read_record, write_json

STEP = Step("merge", "ties", {"density": 0.5})
HOLD = """
import json, os, sys, time
from pathlib import Path
from mixmerge.plan.graph import Step
from mixmerge.run.store import Store
with Store(Path(sys.argv[1])).lease(Step("merge", "ties", {"density": 0.5})) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lease until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


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
    assert again.latest("merge", "ties") is None
    assert again.interrupted(STEP)
    assert not again.rescue(STEP)


def test_what_an_interrupted_run_left_is_found_by_the_next(store):
    (store.begin(STEP).work / "checkpoint").write_text("half")
    assert (Store(store.root).begin(STEP).work / "checkpoint").read_text() == "half"


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
    assert again.latest("merge", "a--b") == {"name": "a--b"}
    assert again.latest("merge", "a") is None


def test_the_newest_record_of_a_name_is_the_latest(store):
    for number in (1, 2, 3):
        step = Step("merge", "ties", {"number": number})
        store.begin(step)
        folder = store.commit(step, {"number": number})
        os.utime(folder / RECORD, ns=(number * 10**9, (9 - number) * 10**9))
    assert store.latest("merge", "ties") == {"number": 1}
    assert store.latest("merge", "slerp") is None


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
        (errno.ENOSPC, "no space left on the disk; free some and run the same command again"),
        (errno.EDQUOT, "no space left on the disk"),
        (errno.EACCES, "no permission to write; choose another --out folder"),
        (errno.EROFS, "no permission to write"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_an_error_of_the_system_becomes_one_line_with_the_file(code, word):
    error = named_os_error(OSError(code, os.strerror(code), "/some/file"), "/other")
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"/some/file: {word}")
    assert str(named_os_error(OSError(code, os.strerror(code)), "/other")).startswith(f"/other: {word}")


# Leases


def test_a_lease_is_held_by_one_and_free_again_afterwards(store):
    with store.lease(STEP) as first:
        assert first
        with Store(store.root).lease(STEP) as second:
            assert not second
        assert store.running(STEP)["pid"] == os.getpid(), "trying does not take it away"
    assert store.running(STEP) is None
    with store.lease(STEP) as third:
        assert third
    assert files(store.folder) == set()


def test_a_lease_is_free_after_an_error(store):
    with pytest.raises(RuntimeError), store.lease(STEP):
        raise RuntimeError("x")
    assert store.running(STEP) is None


def test_leases_of_other_steps_are_apart(store):
    with store.lease(STEP), store.lease(Step("merge", "ties", {"density": 0.7})) as other:
        assert other


def test_a_live_process_keeps_its_step(store, holder):
    with store.lease(STEP) as held:
        assert not held
    assert store.running(STEP)["pid"] == holder.pid


def test_a_live_process_keeps_its_step_however_long_it_has_been_silent(store, holder):
    lease = store._lease(STEP)
    os.utime(lease, (0, 0))
    with store.lease(STEP) as held:
        assert not held


def test_a_killed_process_loses_its_step_at_once(store, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store._lease(STEP).exists()
    assert store.running(STEP) is None
    with store.lease(STEP) as held:
        assert held
        assert store.running(STEP)["pid"] == os.getpid()


def test_a_killed_process_that_nobody_has_waited_for_is_dead_too(store, holder):
    holder.send_signal(signal.SIGKILL)
    while store.running(STEP) is not None:  # a zombie until we wait for it
        time.sleep(0.01)
    with store.lease(STEP) as held:
        assert held


def test_a_pid_that_was_given_to_another_process_is_no_owner(store):
    with store.lease(STEP):
        owner = json.loads(store._lease(STEP).read_text())
    write_json(store._lease(STEP), owner | {"born": owner["born"] - 100})
    assert store.running(STEP) is None


@pytest.mark.parametrize(("age", "held"), [(0, False), (30, False), (3600, True)])
def test_a_lease_of_another_machine_lasts_while_it_beats(store, age, held):
    lease = store._lease(STEP)
    lease.parent.mkdir(parents=True)
    write_json(lease, {"host": "elsewhere", "pid": 1, "born": 1.0})
    os.utime(lease, (time.time() - age, time.time() - age))
    assert (store.running(STEP) is None) == held
    with store.lease(STEP) as got:
        assert got == held


def test_a_lease_beats_while_it_is_held(store, monkeypatch):
    monkeypatch.setattr(store_module, "HEARTBEAT_S", 0.01)
    with store.lease(STEP):
        os.utime(store._lease(STEP), (0, 0))
        while store._lease(STEP).stat().st_mtime == 0:
            time.sleep(0.01)
    assert not store._lease(STEP).exists()


def test_a_lease_that_cannot_be_read_is_given_a_minute(store):
    lease = store._lease(STEP)
    lease.parent.mkdir(parents=True)
    lease.write_text("{")
    with store.lease(STEP) as held:
        assert not held
    os.utime(lease, (0, 0))
    with store.lease(STEP) as held:
        assert held


def test_of_two_that_find_a_dead_lease_only_one_takes_it(store, tmp_path):
    store._lease(STEP).parent.mkdir(parents=True)
    code = """
import os, sys, time
from pathlib import Path
from mixmerge.plan.graph import Step
from mixmerge.run.store import Store
root = Path(sys.argv[1])
store = Store(root)
for number in range(40):
    step = Step("merge", "x", {"number": number})
    (root / f"here-{number}-{os.getpid()}").touch()
    while len(list(root.glob(f"here-{number}-*"))) < 4:
        pass
    with store.lease(step) as held:
        if held:
            (root / f"held-{number}-{os.getpid()}").touch()
            while len(list(root.glob(f"tried-{number}-*"))) < 3:
                time.sleep(0.0005)
        else:
            (root / f"tried-{number}-{os.getpid()}").touch()
"""
    for number in range(40):
        dead = {"host": socket.gethostname(), "pid": os.getpid(), "born": 1.0}
        write_json(store._lease(Step("merge", "x", {"number": number})), dead)
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    try:
        for process in crowd:
            assert process.wait(120) == 0
    finally:
        for process in crowd:
            process.kill()
    held = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("held-*"))
    assert held == list(range(40)), "each dead lease is taken over once"
