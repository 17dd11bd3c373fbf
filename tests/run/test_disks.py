"""A disk that is full or may not be written, and clocks that jump: named in one line, and recovered from by the same command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError, FullDiskError
from mixmerge.merge.checkpoint import Tensor
from mixmerge.merge.writer import CheckpointWriter
from mixmerge.plan.graph import Step
from mixmerge.run.store import Store

STEP = Step("merge", "ties", {"density": 0.5})
NO_TRAINING = """\
name: still
base: ./base
languages: [en, fr]
data:
  general: {objective: general, path: "data/general.{lang}.jsonl"}
budget: {rows: 8}
merges:
  same: {method: linear, models: {base: {weight: 1.0}}, dtype: float32}
evaluation:
  prompts:
    general: {purpose: general, path: "prompts/general.{lang}.jsonl"}
  max_new_tokens: 4
statistics: {draws: 100}
"""


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size; unmounted with the test."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
            )
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            pytest.skip("a small disk cannot be mounted here (that needs root)")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_study_goes_on_once_there_is_room(study, small_disk):
    disk = small_disk("260k")  # room for the base and not for the merge
    study.recipe.write_text(NO_TRAINING)
    command = [*study.command("run")[:-1], str(disk / "out")]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "error: merge/same: " in full.stderr
    assert re.search(r": the merge needs \d+ kB and \d+ kB are free; free space", full.stderr)
    assert list((disk / "out" / "store" / "base").glob("*/record.json"))
    assert not list((disk / "out" / "store").glob("merge/*/*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "still: 9 steps, 3 already there, 6 to run" in again.stderr


def test_a_disk_that_fills_while_training_is_named_too(study, small_disk):
    disk = small_disk("500k")  # room for the base and not for a training's checkpoints
    command = [*study.command("run", "--set", "merges={}", "--set", "baselines={}")[:-1], str(disk / "out")]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr
    first, last = (line for line in full.stderr.splitlines() if line.startswith("error: "))
    assert first.startswith("error: train/general: ")
    assert "no space left on the disk" in first
    assert last.startswith("error: 1 step(s) failed, "), "one line, not one for every step that is left"
    assert "Traceback" not in full.stderr


def test_a_disk_that_fills_while_the_base_is_copied_is_named_and_the_model_is_not_blamed(study, small_disk, tiny_base):
    out = small_disk("120k") / "out"
    full = subprocess.run([*study.command("run")[:-1], str(out)], capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr
    first, last = (line for line in full.stderr.splitlines() if line.startswith("error: "))
    assert first.startswith(f"error: base/base: {out / 'store'}: no space left on the disk; free some (`mixmerge gc ")
    assert last.startswith("error: 1 step(s) failed, ")
    assert full.stderr.count("as the disk is full") == 1
    assert str(tiny_base) not in full.stderr


def test_a_disk_that_fills_under_a_merge_is_full_for_every_step(small_disk):
    disk = small_disk("256k")
    what = {"tensors": {"w": Tensor("U8", (1 << 17,))}, "job": "j", "shard_bytes": 1 << 20}
    writer = CheckpointWriter(disk / "out", **what)
    fill(disk)
    with pytest.raises(FullDiskError, match="cannot write: No space left on device; free space"), writer:
        pass
    (disk / "filler").unlink()
    with CheckpointWriter(disk / "out", **what) as again:
        assert again.finished == {}, "the same process may try again"


def test_a_recipe_that_has_no_room_is_named_and_left_as_it_is(study, small_disk, mixmerge):
    disk = small_disk("64k")
    recipe = disk / "recipe.yaml"
    text = study.recipe.read_text()
    recipe.write_text(text)
    with suppress(OSError):
        (disk / "fill").write_bytes(bytes(1 << 17))
    said = "No space left on device\n"
    assert mixmerge("init", disk / "new.yaml") == (1, "", f"error: {disk / 'new.yaml'}: {said}")
    assert mixmerge("adopt", "poet", "org/poet", "--recipe", recipe) == (1, "", f"error: {recipe}: {said}")
    assert sorted(path.name for path in disk.iterdir()) == ["fill", "recipe.yaml"]
    assert recipe.read_text() == text
    (disk / "fill").unlink()
    assert mixmerge("init", disk / "new.yaml")[0] == 0


def test_a_disk_that_is_full_from_the_start_is_named(study, small_disk):
    disk = small_disk("16k")
    ran = subprocess.run([*study.command("run")[:-1], str(disk / "out")], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert "no space left on the disk" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_lease_that_has_no_room_is_named_and_one_that_is_held_can_be_let_go(small_disk):
    store = Store(small_disk("64k"))
    with store.lease(STEP) as held:
        assert held
        with pytest.raises(OSError, match="No space left"):
            (store.root / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(FullDiskError, match="no space left on the disk; free some"), store.hold("other"):
            pass
    assert list(store.leases.folder.iterdir()) == []
    with store.lease(STEP) as held:
        assert held, "in the room that it gave back"


def fill(disk: Path) -> None:
    """Take the last block."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(b"x")
    (disk / "more").unlink()


def test_what_no_recipe_needs_can_be_removed_from_a_disk_that_is_full(finished, tmp_path, small_disk, mixmerge):
    study, disk = finished.copy(tmp_path / "study"), small_disk("16m")
    shutil.copytree(study.out, disk / "out", symlinks=True)
    study.edit("density: 0.5", "density: 0.25")
    fill(disk)
    status, out, err = mixmerge("gc", study.recipe, "--delete", "--out", disk / "out")
    assert (status, err) == (0, "")
    assert "merge/ties" in out
    assert not list((disk / "out/store/merge").iterdir())
    assert not list((disk / "out/store/.leases").iterdir())
    assert shutil.disk_usage(disk).free > 0
    assert list((disk / "out/store/train").glob("*/record.json")), "the rest is there"
    command = [*study.command("run", "--only", "merge/ties")[:-1], str(disk / "out")]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_an_empty_lease_on_a_full_disk_keeps_others_away_until_it_is_let_go(small_disk):
    disk = small_disk("64k")
    store, other = Store(disk), Store(disk)
    with store.lease(STEP):
        pass
    fill(disk)
    with store.hold("gc", roomless=True) as held:
        assert held
        assert store.leases.path("gc").stat().st_size == 0
        assert other.leases.holder("gc") == {}
        assert other.leases.live() == {"gc"}
        with other.hold("gc", roomless=True) as second:
            assert not second
        with (
            pytest.raises(FullDiskError, match="`mixmerge gc RECIPE`, with the same --out, lists what no recipe needs"),
            store.lease(STEP),
        ):
            pass
    assert list(store.leases.folder.iterdir()) == []
    (disk / "filler").unlink()
    with other.hold("gc") as held:
        assert held


def test_a_dead_lease_is_taken_over_on_a_full_disk_too(small_disk, monkeypatch):
    monkeypatch.setattr("mixmerge.run.lease.HEARTBEAT_S", 0.01)
    disk = small_disk("64k")
    store = Store(disk)
    store.leases.folder.mkdir(parents=True)
    store.leases.path("gc").touch()
    os.utime(store.leases.path("gc"), (1e9, 1e9))
    before = store.leases.path("gc").stat().st_ino
    fill(disk)
    with store.hold("gc", roomless=True) as held:
        assert held
        assert store.leases.path("gc").stat().st_ino != before
        with Store(disk).hold("gc", roomless=True) as second:
            assert not second
    assert list(store.leases.folder.iterdir()) == []


# A disk that may not be written


@pytest.fixture
def read_only():
    """Let a folder be read and not written, by root neither; `again` lets it be written."""
    mounted = []

    class ReadOnly:
        def __call__(self, folder: Path) -> None:
            bind = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
            if bind.returncode:
                pytest.skip("a folder cannot be made read-only here (that needs root)")
            mounted.append(folder)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

        def again(self) -> None:
            while mounted:
                subprocess.run(["umount", str(mounted.pop())], check=True)

    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    yield ReadOnly()
    ReadOnly().again()


def test_a_finished_study_on_a_read_only_disk_can_be_asked_everything(finished, copy, read_only, mixmerge):
    read_only(copy.out)
    where = ("--out", copy.out)
    assert mixmerge("plan", copy.recipe, *where)[1].endswith("32 steps: 32 done, 0 to run\n")
    assert mixmerge("status", copy.recipe, *where)[1] == "tiny: 32 done\n"
    assert mixmerge("show", copy.recipe, "merge/ties", *where)[0] == 0
    assert mixmerge("lineage", copy.recipe, "ties", *where)[0] == 0
    assert mixmerge("verify", copy.recipe, *where) == (0, "32 finished steps: 32 whole, 0 damaged\n", "")
    assert mixmerge("gc", copy.recipe, *where)[0] == 0
    told = mixmerge("report", copy.recipe, *where)[1].splitlines()
    assert told[:-1] == finished.printed.splitlines()[:-1]


def test_a_read_only_store_is_named_and_the_run_goes_on_once_it_may_be_written(copy, read_only):
    shutil.rmtree(copy.only("report/*"))
    read_only(copy.store)
    ran = copy.call("run")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "the file system is read-only; mount it writable to go on" in ran.stderr
    assert not re.search(r"/\.[^/\s]+\.[0-9a-f]{8}", ran.stderr), "no file that never was is named"
    copy.edit("density: 0.5", "density: 0.7")
    removing = copy.call("gc", "--delete")
    assert removing.returncode == 1
    assert removing.stderr.startswith("error: ")
    assert "the file system is read-only" in removing.stderr
    assert len(copy.records()) == 31
    read_only.again()
    copy.edit("density: 0.7", "density: 0.5")
    ran = copy.call("run")
    assert (ran.returncode, len(copy.records())) == (0, 32)


def test_a_lease_of_a_live_runner_is_seen_on_a_read_only_disk(tmp_path, read_only):
    store = Store(tmp_path)
    with store.lease(STEP):
        read_only(tmp_path)
        other = Store(tmp_path)
        assert other.running(STEP)["pid"] == os.getpid()
        assert other.leases.live() == {STEP.id}
        with pytest.raises(CheckpointError, match="the file system is read-only"), other.hold("more"):
            pass
        read_only.again()
    assert store.running(STEP) is None


# Clocks


@pytest.mark.parametrize("when", [0, 4 * 10**9], ids=["1970", "2096"])
def test_files_with_dates_that_cannot_be_are_what_they_are(finished, copy, when):
    for path in [*copy.out.rglob("*"), copy.recipe, *(copy.folder / "data").iterdir()]:
        if not path.is_symlink():
            os.utime(path, (when, when))
    before = copy.finished()
    ran = copy.call("run")
    assert (ran.returncode, ran.stderr) == (0, "tiny: 32 steps, 32 already there, 0 to run\n")
    shutil.rmtree(copy.only("report/*"))
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    after = copy.finished()
    assert [name for name in before if after.get(name) != before[name]] == [
        n for n in before if n.startswith("report/")
    ]
    assert ran.stdout.splitlines()[:-1] == finished.printed.splitlines()[:-1]
