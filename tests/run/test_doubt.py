"""Doubt: all that may have read bytes which had changed is named and removed with them, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from damage import LAST, READER, STEP, flip, in_silence, made

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run import lease
from mixmerge.run.doubt import made_from, mend, stamps_of
from mixmerge.run.plans import read_plan
from mixmerge.run.record import sealed
from mixmerge.run.store import RECORD, Store, read_json, write_json
from mixmerge.run.verify import verify_steps


def test_what_read_changed_bytes_is_named_and_removed_with_them(tmp_path, mixmerge):
    store = Store(tmp_path)
    folders = [made(store, step, file="some text") for step in (STEP, READER, LAST)]
    assert mixmerge("verify", "--store", "--out", tmp_path)[:2] == (0, "3 finished steps: 3 whole, 0 damaged\n")
    in_silence(folders[0] / "file")
    status, out, _ = mixmerge("verify", "--store", "--out", tmp_path)
    assert status == 1
    assert "made from merge/ties, perhaps after that had changed" in out
    assert "made from generate/ties.general, perhaps after that had changed" in out
    assert out.endswith("3 finished steps: 0 whole, 1 damaged, 2 made from these\n")
    found = json.loads(mixmerge("verify", "--store", "--out", tmp_path, "--json", "--mend")[1])
    assert (found["ok"], found["damaged"], found["doubtful"]) == (True, 1, 2)
    assert not any(folder.exists() for folder in folders)


def test_dates_of_files_which_may_be_those_of_a_copy_take_no_doubt_away(tmp_path, mixmerge):
    store = Store(tmp_path)
    merge, *readers = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    flip(merge / "file")
    later = (readers[-1] / RECORD).stat().st_mtime_ns + 10**9
    os.utime(merge / "file", ns=(later, later))
    status, out, _ = mixmerge("verify", "--store", "--out", tmp_path, "--mend")
    assert status == 0
    assert out.endswith("3 finished steps: 0 whole, 1 damaged, 2 made from these\n")
    assert not any(folder.exists() for folder in (merge, *readers))


def test_what_a_link_was_made_from_stays_as_long_as_the_link_does(tmp_path, mixmerge):
    store = Store(tmp_path / "out")
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    outside = tmp_path / "outside"
    reader.rename(outside)
    reader.symlink_to(outside, target_is_directory=True)
    for _ in range(2):
        status, out, _ = mixmerge("verify", "--store", "--out", store.root, "--mend")
        assert status == 1
        assert f"{reader} is a link to {outside}: look there, or remove the link" in out
        assert "it stays as long as generate/ties.general does, which was made from it" in out
        assert (merge.exists(), last.exists()) == (True, False)
    reader.unlink()
    assert mixmerge("verify", "--store", "--out", store.root, "--mend")[0] == 0
    assert (merge.exists(), outside.exists()) == (False, True)


def test_a_kind_of_steps_that_is_in_another_place_is_left_there(tmp_path, mixmerge):
    store = Store(tmp_path / "out")
    folder = made(store, file="some text")
    folder.parent.rename(tmp_path / "disk")
    folder.parent.symlink_to(tmp_path / "disk", target_is_directory=True)
    in_silence(folder / "file")
    status, out, _ = mixmerge("verify", "--store", "--out", store.root, "--mend")
    assert (status, folder.exists()) == (1, True)
    assert f"{folder.parent} is a link to {tmp_path / 'disk'}: look there, or remove the link" in out


WHILE = Step("generate", "ties.harmful", {"seed": 0}, {"model": STEP.id})
OTHER = Step("judge", "mix.general.harm", {"seed": 1})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", ["unreadable", "other inputs", "its own input", "sealed anew", "as of an older one"])
def test_doubt_goes_past_a_record_that_is_damaged_itself(tmp_path, known, how):
    store = Store(tmp_path)
    merge, reader, _, other = (made(store, step, file="some text") for step in (STEP, READER, LAST, OTHER))
    in_silence(merge / "file")
    record = read_json(reader / RECORD)
    changed = record | {"inputs": {"model": {"id": READER.id}} if how == "its own input" else {}}
    if how == "sealed anew":
        changed = sealed(changed)
    elif how == "as of an older one":
        changed = {key: value for key, value in changed.items() if key not in ("seal", "sha256")}
    (reader / RECORD).write_text("{" if how == "unreadable" else json.dumps(changed))
    found = verify_steps(store.folders())
    plans = [Plan("ties", (STEP, READER, LAST), {})] if known else []
    doubtful = made_from(found, Store(tmp_path), plans)
    assert [step.step for step in doubtful] == [LAST.id]
    assert {step.step: list(step.roots) for step in found if step.roots} == {READER.id: [STEP.id]}
    (bad,) = (step for step in found if step.step == READER.id)
    assert bad.problems[-1] == "perhaps " * (not known) + "made from merge/ties, perhaps after that had changed"
    mend([*(step for step in found if step.problems), *doubtful], store)
    assert [*Store(tmp_path).folders().values()] == [other]


def test_a_plan_that_was_written_over_takes_no_doubt_away(copy, mixmerge):
    plan = copy.out / "runs/tiny/plan.json"
    told = read_json(plan)
    for step in told["steps"]:
        step["inputs"] = {}
    write_json(plan, told)
    flip(copy.only("mixture/mix--*/rows.jsonl"))
    for words in ((copy.recipe,), ("--store",)):
        found = json.loads(mixmerge("verify", *words, "--out", copy.out, "--json")[1])
        assert (found["damaged"], found["doubtful"]) == (1, 16)


def test_records_that_lead_in_a_circle_or_through_a_thousand_steps_end(tmp_path):
    chain = [STEP]
    for number in range(1000):
        chain.append(Step("merge", f"m{number}", {}, {"model": chain[-1].id}))
    store = Store(tmp_path)
    plans = [Plan("long", tuple(chain), {})]
    folders = [made(store, step, file="some text") for step in (chain[0], chain[-1])]
    in_silence(folders[0] / "file")
    (doubtful,) = made_from(verify_steps(store.folders()), store, plans)
    assert (doubtful.folder, doubtful.generation) == (folders[-1], 1000)
    write_json(folders[0] / RECORD, sealed(read_json(folders[0] / RECORD) | {"inputs": {"a": {"id": READER.id}}}))
    made(store, READER, file="some text")
    found = verify_steps(store.folders())
    assert {step.step for step in made_from(found, store)} == {READER.id, chain[-1].id}


def test_what_a_reader_of_a_step_may_have_taken_in_beside_its_files_is_as_a_change(tmp_path, mixmerge):
    store = Store(tmp_path)
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    (merge / "adapter_config.json").write_text("{}")
    status, out, _ = mixmerge("verify", "--store", "--out", tmp_path, "--mend")
    assert "adapter_config.json is extra: its record does not name it" in out
    assert (status, out.splitlines()[-1]) == (0, "3 finished steps: 0 whole, 1 damaged, 2 made from these")
    assert not any(folder.exists() for folder in (merge, reader, last))


def test_what_was_removed_or_made_again_since_it_was_read_is_left(tmp_path):
    store = Store(tmp_path)
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    stamps = stamps_of(store)
    found = verify_steps(store.folders())
    for folder in (merge, reader):
        shutil.rmtree(folder)
    time.sleep(0.02)  # the dates of folders are no finer than the clock of the kernel
    for step in (STEP, READER):
        made(store, step, file="some text")
    other = made(store, WHILE, file="some text")  # for the first time, and not of what had changed
    found += made_from(found, store)
    shutil.rmtree(last)
    mend(found, store, stamps)
    assert {step.step: (step.mended, step.mend) for step in found if step.problems} == {
        WHILE.id: (False, "it was made again meanwhile; verify again"),
        LAST.id: (True, "removed; the next run makes it again"),
        READER.id: (False, "it was made again meanwhile; verify again"),
        STEP.id: (False, "it stays as long as generate/ties.general does, which was made from it"),
    }
    assert (merge / "file").exists()
    assert (reader / "file").exists()
    assert (other / "file").exists()


def test_a_copy_of_a_step_that_lies_beside_it_is_none_of_the_stores(tmp_path, mixmerge):
    store = Store(tmp_path)
    merge, reader = (made(store, step, file="some text") for step in (STEP, READER))
    copy = merge.with_name(f"{merge.name}.bak")
    shutil.copytree(merge, copy)
    in_silence(merge / "file")
    status, out, _ = mixmerge("verify", "--store", "--mend", "--out", tmp_path)
    assert (status, out.splitlines()[-1]) == (0, "2 finished steps: 0 whole, 1 damaged, 1 made from these")
    assert (merge.exists(), reader.exists(), copy.exists()) == (False, False, True)


@pytest.mark.parametrize(
    ("what", "problem"),
    [({}, "record.json is that of step "), ({"x": float("inf")}, "record.json is no record of a step")],
)
def test_a_record_without_inputs_that_is_none_of_its_step_tells_nothing_of_them(tmp_path, what, problem):
    store = Store(tmp_path)
    merge, reader = (made(store, step, file="some text") for step in (STEP, READER))
    in_silence(merge / "file")
    write_json(reader / RECORD, {"id": READER.id, "what": what})
    found = verify_steps(store.folders())
    assert made_from(found, store) == []
    (bad,) = (step for step in found if step.step == READER.id)
    assert bad.problems[0].startswith(problem)
    assert bad.problems[-1] == "perhaps made from merge/ties, perhaps after that had changed"


def test_a_lease_that_was_watched_and_found_dead_goes(tmp_path, monkeypatch, mixmerge):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    store = Store(tmp_path)
    folder = made(store, file="some text")
    flip(folder / "file")
    left = store.leases.path("run-0123456789ab-0123")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t"}))
    os.utime(left, (1e9, 1e9))
    assert mixmerge("verify", "--store", "--mend", "--out", tmp_path)[0] == 0
    assert (folder.exists(), left.exists()) == (False, False)


@pytest.mark.parametrize("how", ["removed", "unmounted", "damaged link", "partial work that says nothing"])
def test_doubt_goes_past_a_step_that_is_gone_or_out_of_reach_and_keeps_what_tells_of_it(tmp_path, how):
    store = Store(tmp_path / "out")
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    plans = [Plan("ties", (STEP, READER, LAST), {})]
    if how == "removed":
        shutil.rmtree(reader)
    elif how == "partial work that says nothing":
        shutil.rmtree(reader)
        store.begin(READER)
        (store.partial(READER) / "step.json").write_text('{"inputs": 5}')
    else:
        reader.rename(tmp_path / "disk")
        reader.symlink_to(tmp_path / "disk")
    if how == "unmounted":
        (tmp_path / "disk").rename(tmp_path / "away")
    elif how == "damaged link":
        (tmp_path / "disk" / "README").write_text("more")
    found = verify_steps(store.folders())
    if how.startswith("partial"):
        assert [step.folder for step in made_from(found, store)] == [last, store.partial(READER)], (
            "of what nobody knows"
        )
    doubtful = made_from(found, store, plans)
    assert last in [step.folder for step in doubtful]
    mend([*(step for step in found if step.problems), *doubtful], store)
    assert not last.exists()
    assert merge.exists() == reader.is_symlink(), "while the link is there, what it was made from tells of it"
    assert not store.partial(READER).exists()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_what_has_changed_stays_while_a_link_may_be_made_from_it_through_a_step_that_is_gone(tmp_path, known, begun):
    store = Store(tmp_path / "out")
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    shutil.rmtree(reader)
    if begun:
        store.begin(READER)
    last.rename(tmp_path / "disk")
    last.symlink_to(tmp_path / "disk")
    for _ in range(2):
        found = verify_steps(store.folders())
        found += made_from(found, store, [Plan("ties", (STEP, READER, LAST), {})] if known else [])
        mend(found, store)
        assert {step.step for step in found if step.problems and not step.partial} == {STEP.id, LAST.id}
        assert (merge.exists(), last.exists(), store.partial(READER).exists()) == (True, True, False)
    last.unlink()
    mend([*(step for step in verify_steps(store.folders()) if step.problems)], store)
    assert not merge.exists()


def test_what_was_made_from_changed_bytes_and_is_on_a_disk_that_is_away_is_in_doubt_when_it_is_back(tmp_path):
    store = Store(tmp_path / "out")
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    disk, kind = tmp_path / "disk", reader.parent
    kind.rename(tmp_path / "away")
    kind.symlink_to(disk)
    plans = [Plan("ties", (STEP, READER, LAST), {})]
    found = verify_steps(store.folders())
    doubtful = made_from(found, store, plans)
    mend([*(step for step in found if step.problems), *doubtful], store)
    assert (merge.exists(), last.exists()) == (True, False)
    (tmp_path / "away").rename(disk)
    assert reader in [step.folder for step in made_from(verify_steps(store.folders()), store, plans)]


def test_what_was_made_between_the_reading_and_the_removal_keeps_what_has_changed(tmp_path):
    store = Store(tmp_path)
    merge = made(store, STEP, file="some text")
    in_silence(merge / "file")
    stamps = stamps_of(store)
    found = verify_steps(store.folders())
    found += made_from(found, store)
    made(store, READER, file="some text")
    mend(found, store, stamps)
    assert (merge.exists(), found[0].mend) == (True, "steps were made meanwhile, perhaps from it; verify again")
    found = verify_steps(store.folders())
    found += made_from(found, store)
    mend(found, store)
    assert Store(tmp_path).folders() == {}


def test_work_that_was_begun_between_the_reading_and_the_removal_keeps_what_has_changed(tmp_path):
    store = Store(tmp_path)
    merge = made(store, STEP, file="some text")
    in_silence(merge / "file")
    stamps = stamps_of(store)
    found = verify_steps(store.folders())
    found += made_from(found, store)
    store.begin(READER)  # by a run that has ended by now
    mend(found, store, stamps)
    assert (merge.exists(), found[0].mend) == (True, "steps were made meanwhile, perhaps from it; verify again")


def test_what_a_live_run_makes_meanwhile_does_not_keep_what_no_step_of_it_reads(tmp_path):
    store = Store(tmp_path)
    apart = Step("merge", "linear", {"weight": 0.5})
    merge, other = (made(store, step, file="some text") for step in (STEP, apart))
    in_silence(merge / "file")
    (store.root / "runs/while").mkdir(parents=True)
    write_json(store.root / "runs/while/plan.json", Plan("while", (apart,), {}).to_json())
    with store.at_work("while"):
        stamps = stamps_of(store)
        found = verify_steps({STEP.id: merge})
        found += made_from(found, store)
        shutil.rmtree(other)
        made(store, apart, file="some text")
        mend(found, store, stamps)
    assert (merge.exists(), other.exists()) == (False, True)


def test_a_step_that_cannot_be_removed_is_told_with_the_rest_and_keeps_what_it_was_made_of(
    tmp_path, mixmerge, monkeypatch
):
    out = tmp_path / "out"
    store = Store(out)
    merge, reader, last = (made(store, step, file="some text") for step in (STEP, READER, LAST))
    in_silence(merge / "file")
    remove = Store.remove

    def busy(store: Store, folder: Path) -> None:
        if folder == reader:
            raise CheckpointError("device or resource busy", where=str(folder))
        remove(store, folder)

    monkeypatch.setattr(Store, "remove", busy)
    status, told, err = mixmerge("verify", "--store", "--mend", "--out", out)
    assert (status, err) == (1, "")
    assert f"to mend it: it cannot be removed: {reader}: device or resource busy" in told
    assert "it stays as long as generate/ties.general does, which was made from it" in told
    assert (merge.exists(), reader.exists(), last.exists()) == (True, True, False)
    monkeypatch.undo()
    assert mixmerge("verify", "--store", "--mend", "--out", out)[0] == 0
    assert store.folders() == {}


def test_a_store_that_cannot_be_written_is_read_and_told_of_all_the_same(tmp_path, mixmerge):
    out = tmp_path / "out"
    merge = made(Store(out), STEP, file="some text")
    shutil.rmtree(out / "store" / ".leases", ignore_errors=True)
    (out / "store" / ".leases").write_text("no folder, and root may write anywhere")
    assert mixmerge("verify", "--store", "--mend", "--out", out)[:2] == (0, "1 finished steps: 1 whole, 0 damaged\n")
    in_silence(merge / "file")
    status, told, err = mixmerge("verify", "--store", "--mend", "--out", out)
    assert (status, err) == (1, "")
    assert "merge/ties" in told
    assert f"to mend it: nothing can be removed: {out / 'store' / '.leases'}" in told
    assert merge.exists()


def test_unfinished_work_is_counted_apart_from_finished_steps(tmp_path, mixmerge):
    out = tmp_path / "out"
    store = Store(out)
    in_silence(made(store, STEP, file="some text") / "file")
    store.begin(READER)
    told = mixmerge("verify", "--store", "--out", out)[1]
    assert told.endswith("1 finished steps: 0 whole, 1 damaged, 0 made from these; 1 unfinished begun from these\n")
    steps = json.loads(mixmerge("verify", "--store", "--json", "--out", out)[1])["steps"]
    assert [(step["step"], step["partial"]) for step in steps] == [
        ("merge/ties", False),
        ("partial work of generate", True),
    ]


def test_a_name_of_a_file_that_would_steer_the_terminal_is_printed_as_its_escape(tmp_path, mixmerge):
    merge = made(Store(tmp_path / "out"), STEP, file="some text")
    (merge / "x\n\x1b[31mred").write_text("extra")
    told = mixmerge("verify", "--store", "--out", tmp_path / "out")[1]
    assert "\x1b" not in told
    assert r"x\n\x1b[31mred is extra: its record does not name it" in told


def test_while_a_run_is_live_whose_plan_is_nowhere_nothing_is_removed(tmp_path, mixmerge):
    store = Store(tmp_path / "out")
    merge = made(store, file="some text")
    in_silence(merge / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store").symlink_to(store.folder)
    with store.at_work("ties"):
        status, out, _ = mixmerge("verify", "--store", "--mend", "--out", tmp_path / "other")
        assert (status, merge.exists()) == (1, True)
        assert "a live run whose plan is not in this --out is at this store; wait until that has ended" in out
    assert mixmerge("verify", "--store", "--mend", "--out", tmp_path / "other")[0] == 0
    assert not merge.exists()


def test_a_disk_that_answers_with_an_error_is_a_problem_of_the_step_alone(tmp_path, monkeypatch):
    store = Store(tmp_path)
    merge, reader = (made(store, step, file="some text") for step in (STEP, READER))
    stat = os.stat

    def bad(path, *words, **more):
        if str(path) == str(merge / "file"):
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN), str(path))
        return stat(path, *words, **more)

    monkeypatch.setattr(os, "stat", bad)
    found = verify_steps(Store(tmp_path).folders())
    assert {step.folder: step.problems for step in found} == {
        merge: ["file cannot be read: Structure needs cleaning"],
        reader: [],
    }


def test_of_partial_work_only_what_was_begun_from_changed_bytes_goes(finished, copy, mixmerge):
    partial = copy.store / ".partial"
    plan = read_plan(copy.out / "runs/tiny/plan.json")
    bad, reader, other = (plan.find(title) for title in ("merge/ties", "generate/ties.general", "generate/mix.general"))
    in_silence(Store(copy.out).path(bad.id) / "model.safetensors")
    for step in (reader, other):
        shutil.rmtree(Store(copy.out).path(step.id))
        Store(copy.out).begin(step)
    gone = partial / "gone-1234-ties--000000000000"  # of a removal that was killed
    shutil.copytree(Store(copy.out).path(bad.id), gone)
    assert gone not in [*Store(copy.out).folders().values()]
    assert Store(copy.out).find("000000000000") is None
    (copy.store / ".tokens").mkdir()
    status, out, _ = mixmerge("verify", copy.recipe, "--out", copy.out, "--mend")
    assert status == 0
    assert f"partial work of generate/ties.general  {reader.id}  made from merge/ties" in out
    assert {folder.name for folder in partial.iterdir()} == {f"generate-{other.id}"}
    assert not (copy.store / ".tokens").exists(), "rows as a training read them"


def test_what_a_live_run_is_made_of_is_not_removed_from_under_it(copy, mixmerge):
    store = Store(copy.out)
    in_silence(copy.only("merge/ties--*/model.safetensors"))
    before = copy.finished()
    shown = copy.out / "runs/tiny/plan.json"
    shown.rename(
        shown.with_name(".plan-0123456789ab.json")
    )  # as another run of the study leaves it, which had other settings
    shown.write_text(json.dumps({"study": "tiny", "steps": [], "models": {}}))
    with store.at_work("tiny"):
        status, out, _ = mixmerge("verify", copy.recipe, "--out", copy.out, "--mend")
    assert (status, copy.finished()) == (1, before)
    assert "a live run has it; wait until that has ended" in out
    assert mixmerge("verify", copy.recipe, "--out", copy.out, "--mend")[0] == 0
    assert len(copy.finished()) < len(before)


def test_a_removal_that_is_cut_short_forgets_nothing_of_what_is_in_doubt(tmp_path, monkeypatch):
    store = Store(tmp_path)
    folders = {step.id: made(store, step, file="some text") for step in (STEP, READER, LAST)}
    in_silence(folders[STEP.id] / "file")
    removed = []

    def remove(self, folder):
        removed.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "remove", remove)
    for left in ([STEP.id, READER.id, LAST.id], [STEP.id, READER.id], [STEP.id]):
        found = verify_steps(folders)
        doubtful = made_from(found, Store(tmp_path))
        assert [step.step for step in doubtful] == left[1:]
        with pytest.raises(KeyboardInterrupt):
            mend([*(step for step in found if step.problems), *doubtful], Store(tmp_path))
        assert removed.pop() == folders[left[-1]]
        shutil.rmtree(folders.pop(left[-1]))


def test_bytes_that_changed_and_were_read_leave_no_wrong_scores(copy, finished, mixmerge):
    in_silence(copy.only("merge/ties--*/model.safetensors"))
    for pattern in ("generate/ties.general--*", "judge/ties.general*", "score/*", "report/*"):
        for folder in copy.store.glob(pattern):
            shutil.rmtree(folder)
    assert copy.call("run").returncode == 0
    status, out, _ = mixmerge("verify", copy.recipe, "--out", copy.out, "--mend")
    assert status == 0
    assert "generate/ties.general" in out
    assert copy.call("run").returncode == 0
    assert mixmerge("verify", copy.recipe, "--out", copy.out)[:2] == (0, "32 finished steps: 32 whole, 0 damaged\n")
    assert copy.scores() == finished.study.scores()
