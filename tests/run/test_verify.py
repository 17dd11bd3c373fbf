"""verify: every kind of damage of a finished study is found, said step by step, and mended by the next run."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3

import pytest
from damage import STEP, flip, made

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.answers import Answers, Reply, Spent, request_key
from mixmerge.hashes import file_sha256
from mixmerge.plan.graph import Step
from mixmerge.run.record import files_of, seal_of, sealed, step_files
from mixmerge.run.store import RECORD, Store, write_json
from mixmerge.run.verify import verify_answers, verify_steps

# Records


def test_every_record_of_a_study_has_the_hash_of_each_file_and_a_seal(finished):
    for path in finished.study.records().values():
        record = json.loads(path.read_text())
        assert record["sha256"] == {name: file_sha256(file) for name, file in step_files(path.parent).items()}
        assert record["files"].keys() == record["sha256"].keys()
        assert record["seal"] == seal_of(record)


def test_a_seal_is_the_same_before_writing_and_after_reading():
    record = {"a": (1, 2.5e-7, "é"), "b": {1: None}, "c": [True, float("inf")]}
    read = json.loads(json.dumps(sealed(record)))
    assert seal_of(read) == seal_of(record) == read["seal"]
    assert seal_of(read | {"a": [1, 2.5e-7, "e"]}) != read["seal"]


# A whole study, by the command line


def test_a_whole_study_is_whole_and_nothing_of_it_is_touched(finished, mixmerge):
    study = finished.study
    before = study.finished()
    status, out, err = mixmerge("verify", study.recipe, "--out", study.out)
    assert (status, out, err) == (0, "32 finished steps: 32 whole, 0 damaged\n", "")
    status, out, _ = mixmerge("verify", "--store", "--out", study.out, "--json")
    found = json.loads(out)
    assert (status, found["ok"], found["whole"], found["not_done"]) == (0, True, 32, 0)
    assert {step["state"] for step in found["steps"]} == {"whole"}
    assert study.finished() == before


def test_each_kind_of_damage_is_named_with_its_step_and_mended_by_the_next_run(finished, copy, mixmerge):
    responses = copy.only("generate/base.general--*/responses.jsonl")
    whole = responses.read_bytes()
    flip(responses)
    copy.only("judge/mix.general.quality--*/verdicts.jsonl").unlink()
    (copy.only("score/*") / "more.json").write_text("{}")
    page = copy.only("report/*/report.html")
    page.write_bytes(page.read_bytes()[:-10])
    cut = copy.only("mixture/mix--*/record.json")
    cut.write_text(cut.read_text()[:-40])
    record = copy.only("mixture/general--*/record.json")
    record.write_text(record.read_text().replace('"host": "', '"host": "x'))
    status, out, err = mixmerge("verify", copy.recipe, "--out", copy.out)
    assert (status, err) == (1, "")
    size = page.stat().st_size
    for words in (
        "generate/base.general  ",
        "responses.jsonl has changed: sha256 ",
        "verdicts.jsonl is missing",
        "more.json is extra: its record does not name it",
        f"report.html has {size:,} bytes, its record says {size + 10:,}",
        "mixture/mix  ",
        "record.json cannot be read: it was cut short, or changed",
        "record.json has changed since it was written: its seal does not fit",
        f"  to mend it: remove the folder {responses.parent} and what was made from it (--mend does) and run the same command again\n",
    ):
        assert words in out
    assert out.endswith("32 finished steps: 23 whole, 6 damaged, 3 made from these\n")
    status, out, _ = mixmerge("verify", copy.recipe, "--mend", "--out", copy.out)
    assert status == 0
    assert out.count("  removed; the next run makes it again\n") == 9
    assert not responses.exists()
    status, out, _ = mixmerge("verify", copy.recipe, "--out", copy.out)
    assert (status, out) == (0, "23 finished steps: 23 whole, 0 damaged, 9 not done\n")
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    assert "9 to run" in ran.stderr
    assert responses.read_bytes() == whole
    assert ran.stdout.splitlines()[:-1] == finished.printed.splitlines()[:-1]
    assert mixmerge("verify", copy.recipe, "--out", copy.out)[0] == 0


def test_neither_or_both_of_recipe_and_store_are_refused_and_so_is_no_store(mixmerge, study, tmp_path):
    said = "error: mixmerge verify: give a recipe, or --store for everything that is in --out\n"
    assert mixmerge("verify") == (2, "", said)
    assert mixmerge("verify", study.recipe, "--store") == (2, "", said)
    status, _, err = mixmerge("verify", "--store", "--out", tmp_path / "none")
    assert (status, "no store" in err) == (2, True)
    status, out, _ = mixmerge("verify", study.recipe, "--mend", "--out", tmp_path / "none")
    assert (status, out) == (0, "0 finished steps: 0 whole, 0 damaged, 32 not done\n")
    assert not (tmp_path / "none").exists()
    status, _, err = mixmerge("verify", "--store", "--set", "seed=1", "--out", study.out)
    assert (status, err) == (2, "error: mixmerge verify: --set goes with a recipe, and --store reads what is there\n")
    status, out, _ = mixmerge("verify", study.recipe, "--out", study.out)
    assert (status, out) == (0, "0 finished steps: 0 whole, 0 damaged, 32 not done\n")


# Step by step


def test_one_changed_bit_anywhere_in_a_file_or_its_record_is_found(tmp_path):
    store = Store(tmp_path)
    folder = made(store, weights="some weights", config="{}")
    record = (folder / RECORD).read_bytes()
    for name in ("weights", "config", RECORD):
        data = (folder / name).read_bytes()
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1
            (folder / name).write_bytes(changed)
            (found,) = verify_steps({STEP.id: folder})
            same = name == RECORD and _json(changed) == json.loads(record)  # a bit of the layout of the file
            assert bool(found.problems) != same, (name, place)
        (folder / name).write_bytes(data)
    assert verify_steps({STEP.id: folder})[0].problems == []


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_record_in_the_place_of_another_step_is_named(tmp_path):
    store = Store(tmp_path)
    other = Step("merge", "ties", {"density": 0.7})
    folder, elsewhere = made(store, weights="a"), made(store, other, weights="a")
    shutil.copy(elsewhere / RECORD, folder / RECORD)
    (found,) = verify_steps({STEP.id: folder})
    assert found.problems == [f"record.json is that of step {other.id}"]


def test_a_folder_without_its_record_is_damaged_and_a_file_below_a_folder_is_compared(tmp_path):
    store = Store(tmp_path)
    folders = store.begin(STEP)
    (folders.out / "checkpoint").mkdir()
    (folders.out / "checkpoint" / "state").write_text("abc")
    folder = store.commit(STEP, sealed({"id": STEP.id, **files_of(folders.out)}))
    assert json.loads((folder / RECORD).read_text())["files"] == {"checkpoint/state": 3}
    (folder / "checkpoint" / "state").write_text("abd")
    assert verify_steps(store.folders())[0].problems[0].startswith("checkpoint/state has changed: ")
    (folder / RECORD).unlink()
    assert verify_steps(store.folders())[0].problems == ["record.json is missing"]


def test_a_record_of_an_older_mixmerge_is_named_and_its_sizes_are_compared(tmp_path, mixmerge):
    store = Store(tmp_path)
    (store.begin(STEP).out / "weights").write_text("abc")
    folder = store.commit(STEP, {"files": {"weights": 3}})
    status, out, _ = mixmerge("verify", "--store", "--out", tmp_path)
    assert (status, out.splitlines()[0]) == (0, "1 finished steps: 1 whole, 0 damaged")
    assert out.splitlines()[1] == (
        "made by an older mixmerge, which kept no hashes, so only names and sizes were compared: merge/ties (1 in all)"
    )
    (step,) = json.loads(mixmerge("verify", "--store", "--out", tmp_path, "--json")[1])["steps"]
    assert (step["state"], step["hashed"]) == ("whole", False)
    (folder / "weights").write_text("ab")
    assert mixmerge("verify", "--store", "--out", tmp_path)[0] == 1


def test_a_base_that_changed_by_another_name_of_its_file_is_found_by_its_recipe(study, own_base, mixmerge):
    assert study.call("run", "--only", "base/base").returncode == 0
    weights = own_base / "model.safetensors"
    if weights.stat().st_nlink == 1:
        pytest.skip("this file system links no files")
    with weights.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    status, out, _ = mixmerge("verify", study.recipe, "--out", study.out)
    assert status == 1
    assert "model.safetensors has changed (and so has each of its other names: hard links)" in out


def test_a_file_that_goes_away_while_others_are_read_is_damage_and_no_traceback(tmp_path):
    store = Store(tmp_path)
    folder = made(store, a="some text", b="some text")
    for name in ("a", "b"):
        flip(folder / name)
    (found,) = verify_steps(store.folders(), lambda done, total: shutil.rmtree(folder, ignore_errors=True))
    assert [problem.partition(" ")[0] for problem in found.problems] == ["a", "b"]


def test_a_changed_file_with_other_names_says_that_these_are_changed_too(tmp_path):
    store = Store(tmp_path)
    folder = made(store, weights="abc")
    os.link(folder / "weights", tmp_path / "outside")
    (tmp_path / "outside").write_text("abd")
    (found,) = verify_steps({STEP.id: folder})
    assert found.problems[0].startswith("weights has changed (and so has each of its other names: hard links): ")


def test_a_record_that_is_no_record_is_damage_and_no_traceback(tmp_path):
    store = Store(tmp_path)
    folder = made(store, weights="abc")
    for value in ({"files": [1, 2]}, {"what": {}, "inputs": 3}, {"what": {"x": {}}, "inputs": {}}):
        write_json(folder / RECORD, value)
        assert verify_steps({STEP.id: folder})[0].problems == ["record.json is no record of a step"]
    for text in (
        "[]",
        "{}",
        "3",
        "",
        json.dumps({"id": STEP.id, "seal": ""})[:-1] + ', "x": ' + "[" * 950 + "]" * 950 + "}",
    ):
        (folder / RECORD).write_text(text)
        assert verify_steps({STEP.id: folder})[0].problems


def test_a_damaged_step_that_a_live_runner_has_is_not_removed(tmp_path, mixmerge):
    store = Store(tmp_path)
    folder = made(store, weights="abc")
    flip(folder / "weights", 0)
    with store.lease(STEP):
        status, out, _ = mixmerge("verify", "--store", "--mend", "--out", tmp_path)
    assert status == 1
    assert "a live run has it; wait until that has ended" in out
    assert folder.is_dir()
    assert mixmerge("verify", "--store", "--mend", "--out", tmp_path)[0] == 0
    assert not folder.exists()
    assert sorted(path.name for path in (store.folder / ".partial").iterdir()) == []


def test_a_damaged_step_that_is_a_link_to_outside_is_never_removed(tmp_path, mixmerge):
    store = Store(tmp_path / "out")
    folder = made(store, weights="abc")
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside, target_is_directory=True)
    assert mixmerge("verify", "--store", "--out", store.root)[0] == 0
    flip(outside / "weights", 0)
    status, out, _ = mixmerge("verify", "--store", "--mend", "--out", store.root)
    assert status == 1
    assert f"{folder} is a link to {outside}: look there, or remove the link" in out
    assert (outside / "weights").exists()


def test_a_file_that_nobody_may_read_is_named(tmp_path):
    store = Store(tmp_path)
    folder = made(store, weights="abc")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(folder / "gone")
    assert verify_steps({STEP.id: folder})[0].problems == ["weights is missing"]
    (folder / "weights").unlink()
    made_folder = folder / "weights"
    made_folder.mkdir()
    assert verify_steps({STEP.id: folder})[0].problems == ["weights is missing"]


def test_what_nfs_leaves_of_an_open_file_is_not_extra(tmp_path):
    folder = made(Store(tmp_path), weights="abc")
    (folder / ".nfs000000000123").write_text("x")
    assert verify_steps({STEP.id: folder})[0].problems == []


# Answers of servers


def test_a_damaged_file_of_answers_is_found_and_advice_is_given(tmp_path, mixmerge):
    store = Store(tmp_path)
    made(store, weights="abc")
    assert verify_answers(store.answers) is None
    connection = sqlite3.connect(store.answers)
    connection.execute("CREATE TABLE answers (key BLOB PRIMARY KEY, body BLOB) WITHOUT ROWID")
    connection.executemany("INSERT INTO answers VALUES (?, ?)", [(os.urandom(32), os.urandom(900)) for _ in range(99)])
    connection.commit()
    connection.close()
    assert verify_answers(store.answers) is None
    data = bytearray(store.answers.read_bytes())
    data[4096 : 4096 + 64] = bytes(64)
    store.answers.write_bytes(data)
    status, out, _ = mixmerge("verify", "--store", "--mend", "--out", tmp_path)
    assert status == 1
    assert f"{store.answers}: damaged: " in out
    assert "sqlite3 FILE .recover" in out
    assert store.answers.read_bytes() == data, "paid for, so never removed"
    store.answers.write_bytes(b"no database at all, but long enough to be read as one" * 20)
    found = json.loads(mixmerge("verify", "--store", "--json", "--out", tmp_path)[1])
    assert (found["ok"], "not a database" in found["answers"]["problem"]) == (False, True)


@pytest.fixture
def changed_answers(tmp_path):
    """A store whose file of 50 answers has three of which a byte has changed on the disk; and that file."""
    store = Store(tmp_path)
    made(store, weights="abc")
    answers = Answers(store.answers)
    told = [(request_key("judge", {"n": number}), Reply(200, b"verdict %02d A" % number)) for number in range(50)]
    answers.keep("judge", told, Spent(answered=50))
    answers.close()
    data = store.answers.read_bytes()
    for number in (3, 14, 15):
        data = data.replace(b"verdict %02d A" % number, b"verdict %02d B" % number)
    store.answers.write_bytes(data)
    return store, [key for key, _ in told]


def test_answers_that_changed_on_the_disk_are_found_and_removed_when_asked(changed_answers, mixmerge):
    store, keys = changed_answers
    before = store.answers.read_bytes()
    status, out, _ = mixmerge("verify", "--store", "--out", store.root)
    assert status == 1
    assert f"{store.answers}: damaged: answers that have changed since they were kept: 3\n" in out
    assert "to mend it: run `mixmerge verify --store --mend`: where one is needed again, it is asked for again" in out
    assert store.answers.read_bytes() == before
    status, out, _ = mixmerge("verify", "--store", "--mend", "--out", store.root)
    assert status == 0
    assert "  removed: where one is needed again, it is asked for again\n" in out
    assert json.loads(mixmerge("verify", "--store", "--json", "--out", store.root)[1])["answers"]["problem"] is None
    answers = Answers(store.answers)
    assert set(keys) - set(answers.find(keys)) == {keys[3], keys[14], keys[15]}
    answers.close()


def test_a_file_of_answers_whose_own_description_is_damaged_is_one_line(changed_answers, mixmerge):
    store, _ = changed_answers
    whole, problems = store.answers.read_bytes(), set()
    for at in range(whole.index(b"CREATE TABLE answers"), 4096, 13):
        data = bytearray(whole)
        data[at] ^= 0x80
        store.answers.write_bytes(data)
        problems.add(verify_answers(store.answers).problem)
        try:
            answers = Answers(store.answers)
            answers.keep("judge", [(b"k", Reply(200, b"{}"))], Spent(1))
            answers.close()
        except CheckpointError as error:
            assert "damaged" in str(error)  # noqa: PT017
    assert any("codec can't decode" in problem for problem in problems), "SQLite quotes the damage"
    status, out, err = mixmerge("verify", "--store", "--out", store.root)
    assert (status, "damaged: " in out, err) == (1, True, "")


def test_changed_answers_that_cannot_be_removed_are_told_with_the_reason(changed_answers, monkeypatch):
    store, _ = changed_answers

    def refused(path):
        raise CheckpointError("a disk that may not be written to", where=str(path))

    monkeypatch.setattr("mixmerge.run.verify.Answers", refused)
    found = verify_answers(store.answers, mending=True)
    assert found.problem == "answers that have changed since they were kept: 3"
    assert (found.mended, found.mend) == (
        False,
        f"they cannot be removed: {store.answers}: a disk that may not be written to",
    )


def test_answers_that_a_live_run_has_open_are_checked_and_left_as_they_are(tmp_path):
    path = tmp_path / "answers.sqlite"
    answers = Answers(path)
    replies = [(request_key("judge", {"n": number}), Reply(200, bytes(1000))) for number in range(50)]
    answers.keep("judge", replies, Spent(answered=50))
    assert verify_answers(path) is None
    assert len(answers.find([key for key, _ in replies])) == 50
    answers.close()
    whole = path.read_bytes()
    assert verify_answers(path) is None
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
