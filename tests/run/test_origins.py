"""lineage and diff: what a candidate was made of, and what tells two studies apart, on real tiny studies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixmerge.hashes import file_sha256
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import ABSENT, changes, differences
from mixmerge.run.compare import compare, compare_scores


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
    assert (general["changed"], general["files"][0]["rows"]) == (True, 9)
    assert (safety["files"], "safety.fr.jsonl does not exist" in safety["problem"]) == ([], True)


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
    assert [entry["field"] for entry in found["settings"]] == ["config.parameters.density", "study"]
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
    assert out.endswith(f"no scores to compare: not finished: {study.out / 'runs/tiny'}\n")


def test_what_is_no_study_is_refused(mixmerge, tmp_path):
    status, _, err = mixmerge("diff", tmp_path, tmp_path)
    assert status == 2
    assert err == (
        f"error: {tmp_path}: no plan.json in it; name a study's folder, <out>/runs/<study>, or its plan.json\n"
    )
    (tmp_path / "plan.json").write_text("[1]")
    status, _, err = mixmerge("diff", tmp_path, tmp_path)
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


def test_settings_that_change_no_identity_are_marked():
    one, other = (Plan("x", (Step("train", "a", {}, how={"threads": n}),), {}) for n in (1, 2))
    assert [entry["field"] for entry in compare(one, other)["settings"]] == ["how.threads"]


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
    assert list(differences(old, new)) == ["a.1.b: 2 -> 5", "gone: removed 4", "new: added 6"]
    assert list(differences({"x": 1}, {"y": 2})) == ["x: removed 1", "y: added 2"]
