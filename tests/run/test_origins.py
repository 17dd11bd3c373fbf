"""lineage and diff: what a candidate was made of, and what tells two studies apart, on real tiny studies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixmerge.hashes import file_sha256
from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import ABSENT, changes
from mixmerge.recipe.load import load_recipe
from mixmerge.run.compare import compare, compare_scores
from mixmerge.run.record import sealed
from mixmerge.run.runner import Study


def below(node: dict, *roles: str) -> dict:
    """The node that these roles lead to."""
    for role in roles:
        node = next(entry for entry in node["inputs"] if entry["role"] == role)
    return node


@pytest.fixture
def tree(finished, mixmerge):
    study = finished.study
    status, out, err = mixmerge("lineage", study.recipe, "ties", "--out", study.out, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


# Lineage


def test_a_merge_leads_to_its_trainings_their_rows_and_the_base(finished, tree):
    study = finished.study
    assert (tree["step"], tree["done"]) == ("merge/ties", True)
    assert [entry["step"] for entry in tree["inputs"]][:2] == ["train/general", "train/mix"]
    assert below(tree, "model1", "mixture")["step"] == "mixture/mix"
    base = below(tree, "model0", "model")
    assert base["source"]["path"] == str((study.folder / "base").resolve())
    assert base["files"]["model.safetensors"]["sha256"] == file_sha256(study.folder / "base" / "model.safetensors")
    weights = json.loads(next(study.store.glob("merge/ties--*/record.json")).read_text())["sha256"]["model.safetensors"]
    assert tree["files"]["model.safetensors"]["sha256"] == weights


def test_each_file_of_rows_is_named_with_its_hash_and_its_rows(finished, tree):
    study = finished.study
    general, safety = below(tree, "model1", "mixture")["data"]
    assert (general["name"], general["objective"], general["drawn"], general["changed"]) == (
        "general",
        "general",
        4,
        False,
    )
    files = {file["lang"]: file for file in safety["files"]}
    path = study.folder / "data/safety.fr.jsonl"
    assert Path(files["fr"]["path"]) == path
    assert (files["fr"]["sha256"], files["fr"]["rows"]) == (file_sha256(path), 8)
    assert files["fr"]["bytes"] == path.stat().st_size


def test_a_step_that_several_lead_to_is_told_once(tree):
    told, again = [], []

    def walk(node):
        (again if node.get("above") else told).append(node["id"])
        for entry in node.get("inputs", ()):
            walk(entry)

    walk(tree)
    assert len(told) == len(set(told))
    assert again
    assert set(again) <= set(told)


def test_the_tree_is_printed_with_branches_for_people(finished, mixmerge):
    study = finished.study
    status, out, _ = mixmerge("lineage", study.recipe, "ties", "--out", study.out)
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith("merge/ties  ")
    assert any(line.startswith("├─ model0: train/general  ") for line in lines)
    assert any("mixture: mixture/mix  " in line and "8 rows" in line for line in lines)
    assert any("data general: general, en fr, 4 rows drawn" in line for line in lines)
    assert any(f"{study.folder}/data/safety.en.jsonl  8 rows  sha256 " in line for line in lines)
    assert any(line.endswith("(see above)") for line in lines)
    for name in ("rows.jsonl", "origins.jsonl", "manifest.json"):
        assert any(f"─ {name}  " in line and "sha256 " in line for line in lines), name
    assert any("model.safetensors  " in line and "sha256 " in line for line in lines)
    assert "CHANGED" not in out
    base = mixmerge("lineage", study.recipe, "base", "--out", study.out)[1]
    assert base.splitlines()[-1].startswith("└─ from content ")


def test_before_the_first_run_a_lineage_says_what_is_to_be_made(study, mixmerge):
    status, out, _ = mixmerge("lineage", study.recipe, "mix", "--out", study.out)
    assert status == 0
    assert out.splitlines()[0].endswith("  not done")
    assert "data/general.en.jsonl  8 rows" in out
    assert "drawn" not in out
    assert not study.out.exists()


def test_a_candidate_that_is_none_is_refused(study, mixmerge):
    status, out, err = mixmerge("lineage", study.recipe, "tise", "--out", study.out)
    assert (status, out) == (2, "")
    assert err == "error: no candidate 'tise' in this study; did you mean 'ties'?\n"


def test_data_that_changed_or_went_since_the_plan_is_said(finished, tmp_path):
    from mixmerge.run.lineage import lineage
    from mixmerge.run.plans import read_plan
    from mixmerge.run.store import Store

    study = finished.copy(tmp_path / "study")
    plan = json.loads(
        (study.out / "runs/tiny/plan.json").read_text().replace(str(finished.study.folder), str(study.folder))
    )
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    file = study.folder / "data/general.en.jsonl"
    with file.open("a") as stream:
        stream.write(file.read_text().splitlines()[0].replace("g00", "new") + "\n")
    (study.folder / "data/safety.fr.jsonl").unlink()
    found = lineage(read_plan(tmp_path / "plan.json"), Store(study.out), "mix")
    general, safety = below(found, "mixture")["data"]
    assert (general["changed"], general["files"][0]["now"]["rows"]) == (True, 9)
    assert [entry["state"] for entry in general["files"]] == ["changed", "as it was drawn"]
    assert [entry["state"] for entry in safety["files"]] == ["as it was drawn", "gone"]
    assert safety["files"][1]["sha256"] == file_sha256(finished.study.folder / "data/safety.fr.jsonl")
    assert "problem" not in safety, "the file itself tells it"


@pytest.fixture
def moved_on(finished, tmp_path):
    """A finished study whose data have changed since: a row more in one file, another file gone."""
    study = finished.copy(tmp_path / "study")
    plan_file = study.out / "runs/tiny/plan.json"
    plan_file.write_text(plan_file.read_text().replace(str(finished.study.folder), str(study.folder)))
    with (study.folder / "data/general.en.jsonl").open("a") as stream:
        stream.write('{"id": "new", "prompt": "What colour has tar?", "completion": "It is black."}\n')
    return study


def test_a_finished_candidate_is_told_from_the_study_as_it_was_run_after_its_data_changed(moved_on, mixmerge):
    folder = moved_on.out / "runs/tiny"
    (moved_on.folder / "data/safety.fr.jsonl").unlink()
    for place in (folder, folder / "plan.json"):
        status, out, err = mixmerge("lineage", place, "ties")
        assert (status, err) == (0, "")
        assert "not done" not in out
        assert "CHANGED since it was drawn: now 9 rows, sha256 " in out
        assert any(line.endswith("GONE since it was drawn") and "safety.fr.jsonl" in line for line in out.splitlines())
    (moved_on.recipe).unlink()
    tree = json.loads(mixmerge("lineage", folder, "ties", "--json")[1])
    assert tree["done"]
    status, out, _ = mixmerge("show", folder, "merge/ties")
    assert (status, out.splitlines()[0].split()[-1]) == (0, "done")
    assert f"log: {folder}" in out


def test_a_recipe_that_moved_on_points_to_the_study_as_it_was_run(moved_on, mixmerge):
    folder = moved_on.out / "runs/tiny"
    status, out, err = mixmerge("lineage", moved_on.recipe, "ties", "--out", moved_on.out)
    assert (status, "not done" in out) == (0, True)
    assert err == (
        "note: as the recipe and its data are now, ties is not made; "
        f"as it was run last: mixmerge lineage {folder} ties\n"
    )
    err = mixmerge("show", moved_on.recipe, "train/mix", "--out", moved_on.out)[2]
    assert f"mixmerge show {folder} train/mix\n" in err
    assert mixmerge("show", moved_on.recipe, "base/base", "--out", moved_on.out)[2] == "", "the base is what it was"
    (moved_on.folder / "data/safety.fr.jsonl").unlink()
    status, _, err = mixmerge("lineage", moved_on.recipe, "ties", "--out", moved_on.out)
    assert (status, "safety.fr.jsonl does not exist" in err) == (2, True)
    assert f"mixmerge lineage {folder} ties\n" in err


def test_a_mixture_of_an_older_mixmerge_says_that_its_files_were_not_recorded(moved_on, mixmerge):
    for file in moved_on.store.glob("mixture/*/record.json"):
        record = json.loads(file.read_text())
        for found in record["measurements"]["data"].values():
            del found["files"]
        file.write_text(json.dumps(sealed(record)))
    out = mixmerge("lineage", moved_on.out / "runs/tiny", "mix")[1]
    told = [line for line in out.splitlines() if ".jsonl  " in line and "sha256" in line and "data/" in line]
    assert len(told) == 4
    assert all(line.endswith(" now; not recorded when it was drawn") for line in told)
    assert sum("; CHANGED since it was drawn" in line for line in out.splitlines()) == 1, "the data set as a whole was"


def test_a_study_that_was_run_takes_no_other_settings(finished, mixmerge):
    status, _, err = mixmerge("lineage", finished.study.out / "runs/tiny", "ties", "--set", "seed=4")
    assert (status, err.startswith("error: --set: a study that was run has its settings")) == (2, True)


def test_a_copied_plan_is_read_with_the_store_that_is_named(finished, mixmerge, tmp_path):
    copied = tmp_path / "plan.json"
    shutil.copyfile(finished.study.out / "runs/tiny/plan.json", copied)
    assert "not done" in mixmerge("lineage", copied, "ties", "--out", tmp_path / "none")[1]
    assert "not done" not in mixmerge("lineage", copied, "ties", "--out", finished.study.out)[1]
    out = mixmerge("diff", copied, finished.study.out / "runs/tiny")[1]
    assert out.endswith(f"no scores to compare: no store beside {copied}: name <out>/runs/<study>\n")


def test_a_plan_keeps_the_ids_that_it_was_run_with(finished, monkeypatch):
    from mixmerge.plan.graph import REVISIONS
    from mixmerge.run.plans import read_plan

    file = finished.study.out / "runs/tiny/plan.json"
    before = [step.id for step in read_plan(file).steps]
    monkeypatch.setitem(REVISIONS, "base", 99)
    after = read_plan(file)
    assert [step.id for step in after.steps] == before
    assert set(after.models.values()) <= set(before)


EVIL = "\x1b[2J\u202e"


def test_nothing_that_others_wrote_can_steer_the_terminal(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    folder = study.out / "runs/tiny"
    for file in study.records().values():
        record = json.loads(file.read_text())
        record["provenance"] |= {"host": f"h{EVIL}", "argv": ["mixmerge", f"x{EVIL}"]}
        file.write_text(json.dumps(sealed(record)))
    plan = json.loads((folder / "plan.json").read_text())
    for step in plan["steps"]:
        if step["kind"] == "mixture":
            step["how"]["folder"] += EVIL
        if step["kind"] == "merge":
            step["what"] |= {f"note{EVIL}": EVIL}
    (folder / "plan.json").write_text(json.dumps(plan))
    shown = mixmerge("show", folder, "merge/ties")[1]
    assert "host: h\\x1b[2J\\u202e\n" in shown
    traced = mixmerge("lineage", folder, "ties")[1]
    assert "\\x1b[2J\\u202e" in traced
    compared = mixmerge("diff", finished.study.out / "runs/tiny", folder)[1]
    assert "note\\x1b[2J\\u202e: " in compared
    for file in study.store.glob("merge/*/record.json"):
        record = json.loads(file.read_text())
        record["what"] = {"note": EVIL}
        file.write_text(json.dumps(sealed(record)))
    reasons = mixmerge("plan", study.recipe, "--set", "seed=9", "--why", "--out", study.out)[1]
    assert "\\u202e" in reasons
    assert not any(char in text for char in EVIL[:1] + EVIL[-1:] for text in (shown, traced, compared, reasons))


# Diff


@pytest.fixture(scope="module")
def changed(finished, made_once, study_in):
    """The tiny study with another density, carried out in the same store under another name."""

    def make(folder: Path) -> None:
        study = finished.copy(folder / "study")
        study.edit("name: tiny", "name: denser")
        study.edit("density: 0.5", "density: 0.7")
        ran = study.call("run")
        assert ran.returncode == 0, ran.stderr

    return study_in(made_once("denser", make) / "study")


def test_two_studies_differ_in_what_was_set_and_not_in_all_that_follows(changed, mixmerge):
    runs = changed.out / "runs"
    status, out, err = mixmerge("diff", runs / "tiny", runs / "denser", "--json")
    found = json.loads(out)
    assert (status, err, found["a"], found["b"]) == (0, "", "tiny", "denser")
    merged = [entry for entry in found["settings"] if entry["kind"] == "merge"]
    assert merged == [{"kind": "merge", "field": "config.parameters.density", "a": 0.5, "b": 0.7, "steps": ["ties"]}]
    assert not [entry for entry in found["settings"] if entry["kind"] in ("base", "train", "generate", "judge")]
    assert found["only"] == {"a": [], "b": []}, "the scores of a study are matched whatever it is called"
    assert [entry["field"] for entry in found["settings"]] == ["config.parameters.density"], "a name is no setting"
    base = [row for row in found["scores"] if row["candidate"] == "base"]
    assert base
    assert all(row["difference"] == 0 for row in base)
    assert {row["language"] for row in base} == {None, "en", "fr"}


def test_a_diff_for_people_has_the_settings_and_the_scores_side_by_side(changed, mixmerge):
    runs = changed.out / "runs"
    status, out, _ = mixmerge("diff", runs / "tiny" / "plan.json", runs / "denser")
    assert status == 0
    assert "config.parameters.density: 0.5 -> 0.7  (merge/ties)\n" in out
    assert "only in" not in out
    assert f"A: {runs / 'tiny' / 'plan.json'}\nB: {runs / 'denser'}\n" in out
    assert "B - A" in out
    assert any(line.split()[:3] == ["test", "balance", "ties"] for line in out.splitlines())


def test_a_study_and_itself_differ_in_nothing(finished, mixmerge):
    folder = finished.study.out / "runs/tiny"
    assert mixmerge("diff", folder, folder)[1].startswith("no setting differs\n")
    found = json.loads(mixmerge("diff", folder, folder, "--json")[1])
    assert (found["settings"], found["only"]) == ([], {"a": [], "b": []})
    assert {row["difference"] for row in found["scores"]} == {0}


def test_a_study_that_is_not_finished_is_compared_in_its_settings_alone(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    shutil.rmtree(next(study.store.glob("score/*")))
    status, out, _ = mixmerge("diff", finished.study.out / "runs/tiny", study.out / "runs/tiny")
    assert status == 0
    assert out.endswith(f"no scores to compare: {study.out / 'runs/tiny'} is not finished\n")


def test_what_is_no_study_is_refused(mixmerge, tmp_path):
    status, _, err = mixmerge("diff", tmp_path, tmp_path)
    assert status == 2
    assert err == (
        f"error: {tmp_path}: no plan.json in it; name a study's folder, <out>/runs/<study>, or its plan.json\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\n")
    status, _, err = mixmerge("diff", recipe, recipe)
    assert (status, err.partition(";")[0]) == (2, f"error: {recipe}: a recipe is no study")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: [1],
        lambda plan: plan | {"steps": []},
        lambda plan: plan | {"steps": [1]},
        lambda plan: plan | {"steps": plan["steps"][::-1]},
        lambda plan: plan | {"steps": [step | {"kind": "none"} for step in plan["steps"]]},
        lambda plan: plan | {"steps": [step | {"what": []} for step in plan["steps"]]},
        lambda plan: plan | {"steps": [step | {"inputs": {"a": [1]}} for step in plan["steps"]]},
        lambda plan: plan | {"steps": [{k: v for k, v in step.items() if k != "id"} for step in plan["steps"]]},
        lambda plan: plan | {"models": {"ties": "000000000000"}},
        lambda plan: plan | {"study": 3},
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(finished, mixmerge, tmp_path, change):
    plan = json.loads((finished.study.out / "runs/tiny/plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(change(plan)))
    for words in (["diff", tmp_path, tmp_path], ["lineage", tmp_path, "ties"], ["show", tmp_path, "merge/ties"]):
        status, _, err = mixmerge(*words)
        assert (status, "no plan of a study" in err, "Traceback" in err) == (1, True, False)


def test_one_change_in_many_steps_is_told_once_with_all_of_them():
    one = [Step("train", name, {"lr": 1e-5, "seed": 0}) for name in ("b", "a", "c")]
    other = [
        Step("train", name, {"lr": 2e-5, "seed": 0} | ({"beta": 0.1} if name == "c" else {}))
        for name in ("a", "b", "c")
    ]
    found = compare(Plan("x", tuple(one), {}), Plan("y", tuple(other), {}))
    assert found["settings"] == [
        {"kind": "train", "field": "beta", "a": ABSENT, "b": 0.1, "steps": ["c"]},
        {"kind": "train", "field": "lr", "a": 1e-5, "b": 2e-5, "steps": ["a", "b", "c"]},
    ]


def test_a_study_may_have_the_name_of_one_of_its_candidates():
    one, other = (
        Plan(name, (Step("train", "a", {}), Step("train", "b", {}), Step("score", name, {"study": name})), {})
        for name in ("a", "b")
    )
    found = compare(one, other)
    assert (found["settings"], found["only"]) == ([], {"a": [], "b": []})


def test_settings_that_change_no_identity_are_marked():
    one, other = (Plan("x", (Step("train", "a", {}, how={"threads": n}),), {}) for n in (1, 2))
    assert [entry["field"] for entry in compare(one, other)["settings"]] == ["how.threads"]


def test_other_prompts_are_told_by_their_content_alone(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    file = study.folder / "prompts/general.en.jsonl"
    file.write_text(file.read_text().replace("question number 0", "question number 7"))
    study.edit('path: "prompts/general.{lang}.jsonl"', 'path: "./prompts/general.{lang}.jsonl"')
    plan = build_plan(load_recipe(study.recipe))
    Study(study.out, "tiny").open(plan)
    runs = (finished.study.out / "runs/tiny", study.out / "runs/tiny")
    found = json.loads(mixmerge("diff", *runs, "--json")[1])
    assert found["settings"], "the prompts are others"
    assert not any(entry["field"].startswith("how.") for entry in found["settings"])


def test_scores_that_only_one_study_has_have_no_difference():
    def scores(**found):
        return {
            "splits": {
                "test": {
                    "harm": {
                        name: value and {"macro": {"value": value}, "languages": {}} for name, value in found.items()
                    }
                }
            }
        }

    rows = {row["candidate"]: row for row in compare_scores(scores(a=0.5, b=0.25), scores(a=0.75, c=0.5, d=None))}
    assert [rows[name]["difference"] for name in "abc"] == [0.25, None, None]
    assert (rows["b"]["b"], rows["c"]["a"], "d" in rows) == (None, None, False)


def test_scores_of_the_harness_and_the_balance_are_compared_too():
    def scores(value):
        harness = {"bench/arc/acc": {"name": "ARC", "candidates": {"a": {"value": value}}}}
        return {"splits": {}, "harness": harness, "balance": {"a": {"value": 2 * value}, "b": None}}

    rows = compare_scores(scores(0.25), scores(0.5))
    assert [(row["metric"], row["candidate"], row["difference"]) for row in rows] == [
        ("bench/arc/acc", "a", 0.25),
        ("balance", "a", 0.5),
    ]


def test_changes_and_their_words_agree_field_by_field():
    old, new = {"a": [1, {"b": 2}], "c": 3, "gone": 4}, {"a": [1, {"b": 5}], "c": 3, "new": 6}
    assert list(changes(old, new)) == [("a.1.b", 2, 5), ("gone", 4, ABSENT), ("new", ABSENT, 6)]
    assert [str(change) for change in changes(old, new)] == ["a.1.b: 2 -> 5", "gone: removed 4", "new: added 6"]
    assert [str(change) for change in changes({"x": 1}, {"y": 2})] == ["x: removed 1", "y: added 2"]
