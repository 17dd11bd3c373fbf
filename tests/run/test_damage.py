"""Finished steps that were damaged later: noticed, said in one line, made again; never a traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mixmerge.errors import CheckpointError
from mixmerge.plan.explain import explain
from mixmerge.plan.graph import Plan
from mixmerge.plan.models import folder_fingerprint
from mixmerge.run.history import History
from mixmerge.run.progress import Progress
from mixmerge.run.readable import read_verdicts
from mixmerge.run.record import sealed
from mixmerge.run.runner import run_plan
from mixmerge.run.store import Store
from mixmerge.run.verify import verify_steps


class Heard(Progress):
    """Progress that keeps what it says."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=300))

    @property
    def text(self) -> str:
        return str(self.console.file.getvalue())


def carry_out(plan, root):
    heard = Heard()
    return run_plan(plan, root, jobs=1, threads=1, progress=heard), heard.text


@pytest.fixture
def made(chain, tmp_path):
    """The chain, carried out: base -> one, two -> both, three."""
    assert len(carry_out(chain, tmp_path)[0].done) == 5
    return Store(tmp_path)


def weights(store: Store, plan, name: str) -> Path:
    return store.path(next(step.id for step in plan.steps if step.name == name)) / "model.safetensors"


def test_a_step_that_lost_a_part_of_a_file_is_not_done_and_is_made_again(made, chain, tmp_path):
    file = weights(made, chain, "two")
    whole = file.read_bytes()
    file.unlink()  # not in place: weights may be hard links
    file.write_bytes(whole[:-10])
    made.refresh()
    damage = f"model.safetensors has {len(whole) - 10} bytes, its record says {len(whole)}"
    entry = next(entry for entry in explain(chain, History(made)) if entry.step.name == "two")
    assert (entry.state, entry.why) == ("to run", (f"damaged: {damage}",))
    outcome, said = carry_out(chain, tmp_path)
    assert [chain.by_id[i].name for i in outcome.done] == ["two"]
    assert f"damaged, made again: merge/two: {damage}\n" in said
    assert file.read_bytes() == whole


def test_a_base_that_is_saved_anew_in_its_place_does_not_change_the_study_in_silence(base_step, helpers, tmp_path):
    source = tmp_path / "mine"
    shutil.copytree(base_step.how["path"], source)
    base = dataclasses.replace(base_step, how={"path": str(source)})
    plan = Plan("own base", (base, helpers.merge("one", base.id)), {"base": base.id})
    assert len(carry_out(plan, tmp_path / "out")[0].done) == 2
    store = Store(tmp_path / "out")
    file, mine = store.path(base.id) / "model.safetensors", source / "model.safetensors"
    if not file.samefile(mine):
        pytest.skip("this file system has no hard links, or better ones")
    whole = mine.read_bytes()
    with mine.open("r+b") as stream:  # as save_pretrained does: the same file with other bytes
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    assert file.read_bytes() != whole
    store.refresh()
    damage = "model.safetensors has changed under another name that it had (a hard link)"
    assert store.damage(base.id) == damage
    mine.unlink()  # and got again from where it came from
    mine.write_bytes(whole)
    outcome, said = carry_out(plan, tmp_path / "out")
    assert (outcome.done, f"damaged, made again: base/base: {damage}\n" in said) == ([base.id], True)
    store.refresh()
    assert (store.path(base.id) / "model.safetensors").read_bytes() == whole
    os.utime(mine, (0, 0))
    assert carry_out(plan, tmp_path / "out")[0].done == [], "another date alone is no damage"


def test_what_a_step_has_of_its_input_is_kept_once(base_step, helpers, tmp_path):
    from mixmerge.linking import WORTH

    source = tmp_path / "mine"
    shutil.copytree(base_step.how["path"], source)
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text + " " * WORTH)  # as large as a real one
    what = base_step.what | {"source": {"content": folder_fingerprint(source, None)}}
    base = dataclasses.replace(base_step, what=what, how={"path": str(source)})
    plan = Plan("shared", (base, helpers.merge("one", base.id), helpers.merge("two", base.id, dtype="float32")), {})
    carry_out(plan, tmp_path / "out")
    store = Store(tmp_path / "out")
    files = [store.path(step.id) / "tokenizer.json" for step in plan.steps]
    assert len({file.read_bytes() for file in files}) == 1
    assert {file.stat().st_nlink for file in files} in ({3}, {1})  # hard links, or reflinks
    assert not files[0].samefile(source / "tokenizer.json"), "small files from outside are copied"
    assert [found.problems for found in verify_steps(store.folders())] == [[], [], []]
    record = store.record(plan.steps[1].id)
    assert ("tokenizer.json" in record.get("linked", {})) == (files[0].stat().st_nlink > 1)


def test_a_lost_file_and_a_broken_record_are_damage_too(made, chain, tmp_path):
    weights(made, chain, "one").unlink()
    (weights(made, chain, "three").parent / "record.json").write_text("{")
    made.refresh()
    assert made.damage(chain.models["one"]) == "model.safetensors is missing"
    assert made.damage(chain.models["three"]) == "record.json cannot be read"
    assert made.find(chain.models["one"]) is None
    outcome, _ = carry_out(chain, tmp_path)
    assert {chain.by_id[i].name for i in outcome.done} == {"one", "three"}
    assert outcome.failed == {}


def test_a_damaged_step_under_an_old_name_is_replaced(made, chain, tmp_path):
    folder = weights(made, chain, "two").parent
    shutil.move(folder, folder.with_name(folder.name.replace("two", "deux")))
    weights(Store(tmp_path), chain, "two").unlink()
    carry_out(chain, tmp_path)
    assert [p.name for p in folder.parent.glob(f"*--{chain.models['two']}")] == [folder.name]


def test_a_file_found_damaged_while_it_is_read_names_the_folder_to_remove(made, chain, tmp_path, helpers):
    file = weights(made, chain, "one")
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32  # of the same size
    file.unlink()
    file.write_bytes(data)
    more = helpers.merge("more", chain.models["one"])
    plan = dataclasses.replace(chain, steps=(*chain.steps, more))
    outcome, _ = carry_out(plan, tmp_path)
    assert list(outcome.failed) == [more.id]
    assert f"remove the folder {file.parent} and run the same command again" in outcome.failed[more.id]
    assert not outcome.bug
    shutil.rmtree(file.parent)
    outcome, _ = carry_out(plan, tmp_path)
    assert {plan.by_id[i].name for i in outcome.done} == {"one", "more"}


# A whole study


def test_every_kind_of_damage_of_a_finished_study_is_mended_by_the_same_command(finished, copy):
    copy.only("score/*/scores.json").write_text("{\n")
    copy.only("report/*/report.html").unlink()
    copy.only("generate/base.general--*/responses.jsonl").write_text('{"half": ')
    copy.only("judge/mix.general.quality--*/verdicts.jsonl").unlink()
    asked = copy.call("report")
    assert asked.returncode == 2
    assert asked.stderr.startswith("error: tiny: score/tiny is damaged: scores.json has 2 bytes, its record says ")
    planned = copy.call("plan", "--why").stdout
    assert "damaged: report.html is missing" in planned
    assert planned.endswith("32 steps: 28 done, 4 to run\n")
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("damaged, made again: ") == 4
    assert ran.stdout.splitlines()[:-1] == finished.printed.splitlines()[:-1]


def test_scores_that_are_no_json_name_their_folder_and_its_removal_mends_it(copy):
    file = copy.only("score/*/scores.json")
    file.write_bytes(b"{" + b" " * (file.stat().st_size - 1))
    for command in ("run", "report"):
        asked = copy.call(command)
        assert asked.returncode == 1, asked.stderr
        assert f"{file}: the file is damaged: " in asked.stderr
        assert f"; remove the folder {file.parent} and run the same command again" in asked.stderr
        assert "Traceback" not in asked.stderr
    shutil.rmtree(file.parent)
    assert copy.call("run").returncode == 0


@pytest.mark.parametrize("kind", ["base that has no tokenizer", "base that is no model"])
def test_a_base_that_breaks_after_it_was_checked_fails_in_one_line_and_is_not_done(base_step, tmp_path, kind):
    base = tmp_path / "base"
    shutil.copytree(base_step.how["path"], base)
    broken = base / ("tokenizer.json" if "tokenizer" in kind else "config.json")
    broken.write_text("{}")
    step = dataclasses.replace(base_step, how={"path": str(base)})
    outcome, said = carry_out(Plan("broken", (step,), {"base": step.id}), tmp_path / "out")
    (error,) = outcome.failed.values()
    assert str(broken) in error
    assert not outcome.bug
    assert ".partial" not in said
    assert Store(tmp_path / "out").find(step.id) is None


# Verdicts that no judge of the study could have written

LATER = ("--set", "statistics.draws=300")  # scores and report are to be made again


def with_row(study, change) -> Path:
    """The file of a judge's verdicts after `change` was made to its second row, with a record that agrees."""
    file = study.only("judge/mix.harmful.refusal--*/verdicts.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[1])
    lines[1] = (
        change if isinstance(change, str) else json.dumps({**row, **change} if isinstance(change, dict) else change)
    )
    file.unlink()
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    record = file.with_name("record.json")
    known = json.loads(record.read_text(encoding="utf-8"))
    known["files"][file.name] = file.stat().st_size
    record.unlink()
    record.write_text(json.dumps(sealed(known)), encoding="utf-8")
    return file


BROKEN_ROWS = {
    "language": ({"lang": "xx"}, "lang 'xx' is none of en, fr"),
    "no language": ({"lang": None}, "lang None is none of en, fr"),
    "verdict": ({"verdict": "maybe"}, "verdict 'maybe' is none of refused, complied, invalid"),
    "verdict of another judge": ({"verdict": "win"}, "verdict 'win' is none of refused, complied, invalid"),
    "split": ({"split": "train"}, "split 'train' is none of dev, test"),
    "prompt set": ({"set": "general"}, "set 'general' is none of harmful"),
    "prompt": ({"prompt_id": None}, "no prompt_id"),
    "parallel id": ({"pid": 7}, "no pid"),
    "list": ([1, 2], "no object"),
    "no json": ('{"prompt_id": ', "Expecting value"),
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
def test_a_verdict_row_that_cannot_be_names_file_row_and_folder(copy, kind):
    change, what = BROKEN_ROWS[kind]
    file = with_row(copy, change)
    with pytest.raises(CheckpointError) as caught:
        read_verdicts(file.parent, "harmful", ["en", "fr"])
    assert str(caught.value).startswith(f"{file}:2: damaged row: {what}")
    assert str(caught.value).endswith(f"; remove the folder {file.parent} and run the same command again")


def test_whole_verdicts_are_read_as_they_were_written(finished):
    for folder in finished.study.store.glob("judge/*--*"):
        _, prompt_set, _ = folder.name.partition("--")[0].split(".", 2)
        rows = read_verdicts(folder, prompt_set, ["en", "fr"])
        assert rows == [json.loads(line) for line in (folder / "verdicts.jsonl").read_text("utf-8").splitlines()]
        assert rows


def test_a_graded_verdict_needs_a_number(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"measurements": {"scored": 1, "invalid": 0, "server": {}}}))
    row = {"prompt_id": "s/en/1", "pid": "1", "set": "s", "lang": "en", "split": "test", "verdict": "scored"}
    for value, right in ((0.5, True), (1, True), (None, False), ("0.5", False), (True, False)):
        (tmp_path / "verdicts.jsonl").write_text(json.dumps(row | {"value": value}) + "\n")
        if right:
            assert len(read_verdicts(tmp_path, "s", ["en"])) == 1
        else:
            with pytest.raises(CheckpointError, match=r"verdicts\.jsonl:1: damaged row: value .* is no number"):
                read_verdicts(tmp_path, "s", ["en"])
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(row | {"verdict": "server", "value": 1}) + "\n")
    with pytest.raises(CheckpointError, match=r"verdict 'server' is none of scored, invalid"):
        read_verdicts(tmp_path, "s", ["en"])


@pytest.mark.parametrize("kind", ["language", "verdict"])
def test_scoring_damaged_verdicts_ends_in_one_line_before_anything_is_made(copy, kind):
    change, what = BROKEN_ROWS[kind]
    file = with_row(copy, change)
    done = copy.call("score", *LATER)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    assert line.endswith(f":2: damaged row: {what}; remove the folder {file.parent}, then mixmerge run RECIPE")
    assert len(list(copy.store.glob("score/*--*"))) == 1
    shutil.rmtree(file.parent)
    assert copy.call("run", *LATER).returncode == 0
    assert copy.call("score", *LATER).returncode == 0


@pytest.mark.parametrize(
    "pattern", ["generate/base.general--*/responses.jsonl", "judge/mix.general.quality--*/judge.json"]
)
def test_whatever_else_a_report_is_made_of_is_looked_at_too(copy, pattern):
    file = copy.only(pattern)
    file.write_bytes(b"{" + b" " * (file.stat().st_size - 2) + b"\n")
    done = copy.call("score", *LATER)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert str(file) in line
    assert line.endswith(f"; remove the folder {file.parent}, then mixmerge run RECIPE")


def test_a_run_over_damaged_verdicts_fails_the_scores_alone_and_says_what_to_remove(copy):
    file = with_row(copy, {"lang": "xx"})
    done = copy.call("run", *LATER)
    assert done.returncode == 1
    assert f"{file}:2: damaged row: lang 'xx' is none of en, fr; remove the folder {file.parent}" in done.stderr
    assert "Traceback" not in done.stderr


def test_scoring_where_a_judged_file_lost_a_part_says_so_in_its_line(copy):
    file = copy.only("judge/mix.harmful.refusal--*/verdicts.jsonl")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-5])
    done = copy.call("score", *LATER)
    assert done.returncode == 2
    said = "1 step(s) not done, judge/mix.harmful.refusal the first of them (damaged: verdicts.jsonl has"
    assert said in done.stderr.splitlines()[-1]


NO_RECORDS = ("[]", "[[1, 2]]", "3", "null", '{"kind": "merge"}', '{"id": 5}', "[" * 100_000)


@pytest.mark.parametrize("text", NO_RECORDS)
def test_a_record_that_is_none_is_named_and_is_not_done(made, chain, text):
    (weights(made, chain, "two").parent / "record.json").write_text(text)
    made.refresh()
    said = made.damage(chain.models["two"])
    assert said in ("record.json cannot be read", "record.json is no record of a step")
    assert made.find(chain.models["two"]) is None
    entry = next(entry for entry in explain(chain, History(made)) if entry.step.name == "two")
    assert (entry.state, entry.why) == ("to run", (f"damaged: {said}",))


@pytest.mark.parametrize("part", ["what", "inputs", "measurements", "provenance", "files", "sha256"])
def test_a_record_whose_parts_are_of_another_kind_is_damage(made, chain, part):
    file = weights(made, chain, "two").parent / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: ["x"]}))
    made.refresh()
    assert made.damage(chain.models["two"]) == "record.json is no record of a step"


ODD = (
    ("provenance", "argv", "run"),
    ("provenance", "bytes_read", {}),
    ("measurements", "data", {"general": {"files": [{"sha256": 5}]}}),
    ("sha256", "rows.jsonl", 5),
    ("how", "folder", float("nan")),
)


@pytest.mark.parametrize(("part", "name", "value"), ODD)
def test_a_record_that_was_written_over_is_damage_to_every_command_and_no_traceback(copy, mixmerge, part, name, value):
    file = copy.only("mixture/mix--*/record.json")
    record = json.loads(file.read_text())
    record[part][name] = value
    file.write_text(json.dumps(record))
    said = "record.json has changed since it was written"
    asked = (["plan"], ["plan", "--set", "budget.rows=6"], ["show", "mixture/mix"], ["lineage", "mix"], ["verify"])
    for command, *words in asked:
        status, out, err = mixmerge(command, copy.recipe, *words, "--out", copy.out)
        assert (status, said in out, "Traceback" in err) == (command == "verify", "--set" not in words, False), (
            words,
            out,
        )
    assert mixmerge("verify", copy.recipe, "--mend", "--out", copy.out)[0] == 0


def test_the_record_of_another_step_is_damage_and_is_mended_by_a_run(made, chain, tmp_path):
    folder = weights(made, chain, "two").parent
    shutil.copyfile(weights(made, chain, "one").parent / "record.json", folder / "record.json")
    made.refresh()
    assert made.damage(chain.models["two"]) == f"record.json is that of step {chain.models['one']}"
    (weights(made, chain, "three").parent / "record.json").write_text("[]")
    outcome, said = carry_out(chain, tmp_path)
    assert sorted(chain.by_id[i].name for i in outcome.done) == ["three", "two"]
    assert "damaged, made again: merge/three: record.json cannot be read\n" in said


@pytest.mark.parametrize("text", ["[]", '{"kind": "merge"}', "{}"])
def test_no_command_ends_in_a_traceback_by_a_record_that_is_none(finished, mixmerge, tmp_path, text):
    study = finished.copy(tmp_path / "study")
    for kind in ("merge", "mixture", "score"):
        for file in study.store.glob(f"{kind}/*/record.json"):
            file.write_text(text)
    said = {}
    for words in (["plan"], ["plan", "--json"], ["show", "merge/ties"], ["show", "mixture/mix"], ["lineage", "ties"]):
        name, *rest = words
        status, out, err = mixmerge(name, study.recipe, *rest, "--out", study.out)
        assert (status, "Traceback" in err) == (0, False)
        said[" ".join(words)] = out
    assert "merge/ties" in said["plan"]
    assert "damaged: record.json " in said["plan"]
    assert "damaged: record.json " in said["show merge/ties"].splitlines()[0]
    assert "damaged: record.json " in said["lineage ties"].splitlines()[0]
    status, out, err = mixmerge("verify", study.recipe, "--out", study.out)
    assert (status, "record.json" in out, "Traceback" in err) == (1, True, False)
    status, out, err = mixmerge("diff", finished.study.out / "runs/tiny", study.out / "runs/tiny")
    assert (status, "is not finished" in out, "Traceback" in err) == (0, True, False)


@pytest.mark.parametrize("keys", [("id",), ("id", "kind", "what"), ("id", "kind", "inputs", "files")])
def test_a_record_that_lacks_parts_is_read_without_them(finished, mixmerge, tmp_path, keys):
    study = finished.copy(tmp_path / "study")
    for file in study.store.glob("*/*/record.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps({key: record[key] for key in keys}))
    for name, *rest in (["plan", "--set", "training.epochs=3"], ["show", "merge/ties"], ["lineage", "ties"]):
        status, _, err = mixmerge(name, study.recipe, *rest, "--out", study.out)
        assert (status, "Traceback" in err) == (0, False), (name, err)


@pytest.mark.parametrize("text", ["[]", '{"splits": 3}', '{"splits": {"test": {"harm": {"a": {"macro": {}}}}}}'])
def test_scores_that_are_none_are_named_by_a_comparison(finished, mixmerge, tmp_path, text):
    study = finished.copy(tmp_path / "study")
    (file,) = study.store.glob("score/*/scores.json")
    size = file.stat().st_size
    file.unlink()
    file.write_text(text.ljust(size))
    status, _, err = mixmerge("diff", finished.study.out / "runs/tiny", study.out / "runs/tiny")
    assert (status, str(file) in err, "Traceback" in err) == (1, True, False)
