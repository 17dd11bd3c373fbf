"""gc: what no recipe reaches is named with its size, and removed only when asked; nothing else is ever touched."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError
from mixmerge.linking import link_or_copy
from mixmerge.plan.graph import Plan, Step
from mixmerge.run import lease
from mixmerge.run.gc import remove, unreached
from mixmerge.run.plans import read_plan
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan, run_step
from mixmerge.run.store import Store, write_json

KEPT, OLD = Step("merge", "kept", {"density": 0.5}), Step("merge", "old", {"density": 0.7})
PLAN = Plan("wanted", (KEPT,), {})
HOLD = """
import sys
from pathlib import Path
from mixmerge.run.store import Store
with Store(Path(sys.argv[1])).hold(sys.argv[2]) as held:
    print(held, flush=True)
    sys.stdin.read()
"""
RECORDED = len('{\n "id": "0123456789ab"\n}')  # bytes of a record that has nothing but its step's id


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a step that the plan has, and one that it has not."""
    store = Store(tmp_path / "out")
    for step in (KEPT, OLD):
        (store.begin(step).out / "weights").write_text("x" * 1000)
        store.commit(step, {})
    return store


@pytest.fixture
def holding(store, held_by):
    """Let another process hold the lease of a step."""
    return lambda step_id: held_by(sys.executable, "-c", HOLD, str(store.root), step_id)


def titles(garbage) -> list[str]:
    return [entry.title for entry in garbage.found]


def everything(folder: Path) -> set[str]:
    remembered = "fingerprints.json"  # every command that plans may write it
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != remembered}


# A whole study


def test_a_study_of_which_all_is_reached_keeps_every_file(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    before = everything(study.out)
    status, out, err = mixmerge("gc", study.recipe, "--delete", "--out", study.out)
    assert (status, out, err) == (0, "removed: 0 finished steps and 0 other folders, 0 bytes\n", "")
    assert before - everything(study.out) == set()


def test_what_a_changed_recipe_no_longer_reaches_is_told_first_and_removed_when_asked(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    old = study.finished()
    study.edit("density: 0.5", "density: 0.7")
    before = everything(study.out)
    status, out, _ = mixmerge("gc", study.recipe, "--out", study.out)
    *lines, last = out.splitlines()
    assert status == 0
    assert everything(study.out) == before, "nothing is removed unasked"
    gone = {name for name in old if name.startswith(("merge/", "generate/ties", "judge/ties", "score/", "report/"))}
    assert {"--".join(line.split("  ")[:2]) for line in lines} == gone
    assert last.startswith(f"reached by none of these recipes: {len(gone)} finished steps and 0 other folders, ")
    assert last.endswith("; --delete removes them")
    told = json.loads(mixmerge("gc", study.recipe, "--json", "--out", study.out)[1])
    assert (told["deleted"], {entry["removed"] for entry in told["unreached"]}) == (False, {False})
    assert told["bytes"] == sum(p.stat().st_size for name in gone for p in (study.store / name).iterdir())
    # the study as it was run is kept as well, where its folder is named
    kept = mixmerge("gc", study.recipe, study.out / "runs/tiny", "--out", study.out)[1]
    assert kept == "reached by none of these recipes: 0 finished steps and 0 other folders, 0 bytes\n"
    status, out, _ = mixmerge("gc", study.recipe, "--delete", "--out", study.out)
    assert (status, out.splitlines()[-1].startswith(f"removed: {len(gone)} finished steps")) == (0, True)
    assert study.finished().keys() == old.keys() - gone
    assert list((study.store / ".partial").iterdir()) == []
    assert list((study.store / ".leases").glob("*.json")) == []


def test_a_recipe_with_a_mistake_frees_nothing(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    before = everything(study.out)
    other = study.folder / "other.yaml"
    other.write_text("nome: x")
    assert mixmerge("gc", study.recipe, other, "--delete", "--out", study.out)[0] == 2
    status, _, err = mixmerge("gc", study.folder, "--delete", "--out", study.out)
    assert (status, err.startswith(f"error: {study.folder}: no plan.json in it; name a study's folder")) == (2, True)
    (study.folder / "plan.json").write_text("{}")
    assert mixmerge("gc", study.folder, "--delete", "--out", study.out)[0] == 1
    assert mixmerge("gc")[0] == 2
    (study.folder / "plan.json").unlink()
    assert everything(study.out) == before


# Step by step


def test_partial_work_goes_where_no_recipe_has_its_step_and_stays_where_one_has(store):
    mine, other = Step("train", "mine", {"a": 1}), Step("train", "other", {"a": 2})
    for step in (mine, other):
        (store.begin(step).work / "checkpoint").write_text("y" * 500)
    garbage = unreached(store, [Plan("wanted", (KEPT, mine), {})])
    assert titles(garbage) == ["merge/old", "partial work of train"]
    assert [entry.bytes for entry in garbage.found] == [
        1000 + RECORDED,
        500 + (store.partial(other) / "step.json").stat().st_size,
    ]
    remove(garbage, store)
    assert store.interrupted(mine)
    assert not store.interrupted(other)
    assert store.find(KEPT.id) is not None
    assert store.find(OLD.id) is None


def test_a_step_that_a_live_runner_holds_is_kept_and_goes_once_that_is_dead(store, holding):
    other = Step("train", "other", {"a": 2})
    store.begin(other)
    processes = [holding(OLD.id), holding(other.id)]
    assert titles(unreached(store, [PLAN])) == []
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    garbage = unreached(store, [PLAN])
    assert titles(garbage) == ["merge/old", "partial work of train"]
    remove(garbage, store)
    assert list((store.folder / ".leases").glob("*.json")) == []


def test_a_step_that_a_runner_takes_after_it_was_listed_is_kept(store, holding):
    garbage = unreached(store, [PLAN])
    holding(OLD.id)
    remove(garbage, store)
    assert store.find(OLD.id) is not None
    assert not garbage.found[0].removed
    assert garbage.kept == [f"merge/old {OLD.id} is in the hands of a live runner now: kept"]


def test_all_of_a_study_that_is_running_is_kept_whatever_is_named(store, holding):
    running = Step("merge", "now", {"density": 0.9}, {"model0": OLD.id})
    for name in ("other", "third"):
        (store.root / "runs" / name).mkdir(parents=True)
    write_json(store.root / "runs/other/plan.json", {})
    write_json(store.root / "runs/third/plan.json", Plan("third", (OLD, running), {}).to_json())
    holding(running.id)
    garbage = unreached(store, [PLAN])
    assert garbage.found == []
    assert garbage.kept == ["the study third is running now: all its steps are kept"]


def test_a_link_to_outside_is_never_followed_and_never_removed(store, tmp_path):
    outside = tmp_path / "outside"
    folder = store.find(OLD.id)
    folder.rename(outside)
    folder.symlink_to(outside, target_is_directory=True)
    inner = Step("adopt", "inner", {"b": 1})
    store.begin(inner)
    (store.commit(inner, {}) / "model").symlink_to(outside, target_is_directory=True)
    garbage = unreached(store, [PLAN])
    assert titles(garbage) == ["adopt/inner"]
    assert garbage.kept == [f"{folder} is a link to {outside}: kept"]
    remove(garbage, store)
    assert (outside / "weights").read_text() == "x" * 1000
    assert folder.is_symlink()
    assert store.find(inner.id) is None


def test_files_with_names_elsewhere_give_nothing_back_and_stay_there(store, tmp_path):
    folder = store.find(OLD.id)
    os.link(folder / "weights", tmp_path / "mine")
    assert unreached(store, [PLAN]).bytes == RECORDED
    (tmp_path / "mine").unlink()
    os.link(folder / "weights", folder / "again")
    assert unreached(store, [PLAN]).bytes == 1000 + RECORDED, "two names, both removed"
    os.link(folder / "weights", store.find(KEPT.id) / "linked")
    remove(unreached(store, [PLAN]), store)
    assert (store.find(KEPT.id) / "linked").read_text() == "x" * 1000


def test_a_removal_that_was_cut_short_is_finished_by_the_next(store):
    shutil.move(store.find(OLD.id), store.folder / ".partial" / f"gone-old--{OLD.id}")
    again = Store(store.root)
    garbage = unreached(again, [PLAN])
    assert [(entry.kind, entry.title) for entry in garbage.found] == [("partial", "rest of a removed step")]
    remove(garbage, again)
    assert list((store.folder / ".partial").iterdir()) == []


def test_a_rest_that_may_not_be_removed_is_named_with_its_folder(store, monkeypatch):
    rest = store.folder / ".partial" / f"gone-old--{OLD.id}"
    shutil.move(store.find(OLD.id), rest)
    again = Store(store.root)

    def refused(folder):  # as for a file that is immutable: the system names it alone
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "weights")

    monkeypatch.setattr("mixmerge.run.gc.shutil.rmtree", refused)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(rest))}: no permission to write; "):
        remove(unreached(again, [PLAN]), again)


def test_tokenised_rows_go_once_no_training_is_to_come_and_nothing_runs(store, holding):
    store.tokens.mkdir()
    (store.tokens / "rows").write_text("12345")
    training = Step("train", "x", {})
    assert "tokenised rows" not in titles(unreached(store, [Plan("wanted", (KEPT, OLD, training), {})]))
    process = holding(KEPT.id)
    assert unreached(store, [PLAN, Plan("o", (OLD,), {})]).found == []
    process.kill()
    process.wait()
    garbage = unreached(store, [PLAN])
    assert titles(garbage) == ["merge/old", "tokenised rows"]
    remove(garbage, store)
    assert not store.tokens.exists()


def test_answers_and_unknown_folders_stay_and_an_empty_store_is_no_mistake(store, study, mixmerge):
    store.answers.write_text("paid for")
    (store.folder / "notes").mkdir()
    (store.folder / "notes" / "mine.txt").write_text("x")
    remove(unreached(store, [PLAN]), store)
    assert store.answers.read_text() == "paid for"
    assert (store.folder / "notes" / "mine.txt").exists()
    none = study.folder / "none"
    status, out, _ = mixmerge("gc", study.recipe, "--out", none)
    assert (status, out) == (0, "reached by none of these recipes: 0 finished steps and 0 other folders, 0 bytes\n")
    assert not none.exists()


# Beside a runner, and in odd places

RUNNER = """
import json, sys
from pathlib import Path
from mixmerge.plan.graph import Plan
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
plan = Plan.from_json(json.loads(sys.argv[2]))
outcome = run_plan(plan, Path(sys.argv[1]), jobs=1, threads=1, progress=Progress())
sys.exit(len(outcome.failed) + len(outcome.blocked))
"""


def test_a_runner_at_work_loses_nothing_to_one_that_removes_again_and_again(chain, store):
    command = [sys.executable, "-c", RUNNER, str(store.root), json.dumps(chain.to_json())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as runner:
        while runner.poll() is None:
            remove(unreached(store, [PLAN]), store)
        assert runner.returncode == 0, runner.stderr.read()
    told = (store.root / "runs/chain/events.jsonl").read_text().splitlines()
    assert sorted(e["step"] for e in map(json.loads, told) if e["event"] == "start") == sorted(chain.by_id)
    assert list(store.leases.folder.iterdir()) == []


def test_a_folder_that_has_no_store_gets_none(tmp_path):
    store = Store(tmp_path / "typo")
    garbage = unreached(store, [PLAN])
    remove(garbage, store)
    assert (garbage.found, garbage.kept, list(tmp_path.iterdir())) == ([], [], [])


def test_a_runner_that_has_no_step_in_its_hands_keeps_its_study_all_the_same(store):
    (store.root / "runs/old").mkdir(parents=True)
    write_json(store.root / "runs/old/plan.json", Plan("old", (OLD,), {}).to_json())
    before = unreached(store, [PLAN])
    with store.at_work("old"):
        garbage = unreached(store, [PLAN])
        assert (garbage.found, garbage.kept) == ([], ["the study old is running now: all its steps are kept"])
        remove(before, store)
        assert before.kept == [f"merge/old {OLD.id} is of a study that is running now: kept"]
    assert store.find(OLD.id) is not None
    assert titles(unreached(store, [PLAN])) == ["merge/old"]


def test_the_lease_of_a_dead_run_on_another_machine_is_removed_by_the_first_that_has_watched_it(
    store, monkeypatch, mixmerge, study
):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    elsewhere = {"host": "elsewhere", "boot": "x", "namespace": "y", "pid": 1, "born": 2}
    dead, young = (store.leases.path(f"run-0123456789ab-{name}") for name in ("dead", "young"))
    dead.parent.mkdir(exist_ok=True)
    for path in (dead, young):
        path.write_text(json.dumps({**elsewhere, "token": path.stem}))
    os.utime(dead, (1e9, 1e9))
    store.leases.sweep()
    assert dead.exists(), "nobody has watched it"
    assert mixmerge("gc", study.recipe, "--out", store.root)[0] == 0
    assert list(store.leases.folder.iterdir()) == [young]


def test_a_runner_has_its_plan_written_before_anybody_can_see_that_it_is_there(chain, store, monkeypatch):
    class SeenError(Exception):
        pass

    def seen(self: Store, study: str, waits: object = None) -> None:
        assert read_plan(self.root / "runs" / study / "plan.json").by_id == chain.by_id
        raise SeenError

    (store.root / "runs/chain").mkdir(parents=True)
    write_json(store.root / "runs/chain/plan.json", Plan("chain", (OLD,), {}).to_json())
    monkeypatch.setattr(Store, "at_work", seen)
    with pytest.raises(SeenError):
        run_plan(chain, store.root, jobs=1, threads=1, progress=Progress())
    with pytest.raises(SeenError):
        run_step(chain, chain.steps[0], store.root, threads=1, progress=Progress())


def test_a_runner_that_was_thought_dead_says_anew_that_it_is_there(store, monkeypatch, helpers):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    with store.at_work("old"):
        for _ in range(2):
            (first,) = store.leases.folder.glob("run-*.json")
            first.unlink()
            helpers.wait(lambda: list(store.leases.folder.glob("run-*.json")), "its lease")
        assert not first.exists()
    assert list(store.leases.folder.iterdir()) == []


def test_a_runner_waits_for_a_removal_and_two_removals_do_not_meet(store, holding):
    process = holding("gc")
    garbage = unreached(store, [PLAN])
    remove(garbage, store)
    assert garbage.kept == ["another one removes from this store now: nothing is removed"]
    began = threading.Event()

    def run() -> None:
        with store.at_work("x"):
            began.set()

    runner = threading.Thread(target=run)
    runner.start()
    assert not began.wait(0.5)
    process.kill()
    process.wait()
    assert began.wait(30)
    runner.join()


def test_a_runner_says_once_for_whose_removal_it_waits(store, holding):
    process, told = holding("gc"), []

    def waits(who: str) -> None:
        told.append(who)
        process.kill()
        process.wait()

    with store.at_work("x", waits):
        pass
    assert told == [f"process {process.pid} on {socket.gethostname()}"]
    assert not store.leases.path("gc").exists()


@pytest.mark.parametrize("age", [0.0, 3600.0, -(10.0**9)])
def test_a_removal_on_another_machine_that_is_dead_is_waited_for_and_its_lease_removed(store, monkeypatch, age):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    path, told = store.leases.path("gc"), []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "boot": "x", "namespace": "y", "pid": 1, "born": 2, "token": "z"}))
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    with store.at_work("x", told.append):
        assert not path.exists()
    assert len(told) == 1
    if not age:
        assert told == ["process 1 on elsewhere"]
    assert list(store.leases.folder.iterdir()) == []


def test_a_run_tells_the_person_that_it_waits_for_a_removal_before_anything_else(copy):
    path = copy.store / ".leases" / "gc.json"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (1e9, 1e9))
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    told = "waiting for `mixmerge gc` or `verify --mend` to end, which removes from this store (a process that its lease does not name)"
    assert (ran.stderr + ran.stdout).splitlines()[0] == told
    assert not path.exists()


def test_a_runner_that_waits_for_nobody_says_nothing(store):
    told = []
    with store.at_work("x", told.append):
        pass
    assert told == []


def test_a_store_that_is_a_link_is_freed_as_any_other_and_a_kind_that_is_one_is_kept(store, tmp_path):
    moved = tmp_path / "large disk"
    store.folder.rename(moved)
    store.folder.symlink_to(moved, target_is_directory=True)
    again = Store(store.root)
    remove(unreached(again, [PLAN]), again)
    assert (again.find(OLD.id), again.find(KEPT.id) is not None) == (None, True)
    outside = tmp_path / "outside"
    (moved / "merge").rename(outside)
    (moved / "merge").symlink_to(outside, target_is_directory=True)
    garbage = unreached(Store(store.root), [])
    assert garbage.found == []
    assert garbage.kept == [f"{store.folder}/merge/kept--{KEPT.id} is in another place, by a link: kept"]


def test_a_recipe_that_was_moved_away_frees_nothing_and_one_root_knows_nothing_of_another(
    finished, mixmerge, tmp_path, store
):
    study = finished.copy(tmp_path / "study")
    before = everything(study.out)
    status, out, err = mixmerge("gc", study.folder / "moved.yaml", "--delete", "--out", study.out)
    assert (status, out, err.startswith("error: ")) == (2, "", True)
    assert mixmerge("gc", study.recipe, "--delete", "--out", store.root)[0] == 0
    assert list(store.folder.glob("merge/*")) == []
    assert everything(study.out) == before


def test_a_folder_that_was_adopted_is_whole_after_its_step_has_gone(store, tmp_path):
    mine, step = tmp_path / "mine", Step("adopt", "poet", {"content": "x"})
    mine.mkdir()
    (mine / "model.safetensors").write_text("weights")
    link_or_copy(mine / "model.safetensors", store.begin(step).out / "model.safetensors")
    store.commit(step, {})
    remove(unreached(store, [PLAN]), store)
    assert store.find(step.id) is None
    assert (mine / "model.safetensors").read_text() == "weights"
