"""A study of models that were trained elsewhere: it starts at the merge, and needs no data."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mixmerge.plan.build import build_plan
from mixmerge.recipe.load import load_recipe


@pytest.fixture
def adopted(study):
    """The tiny study with two adopted models instead of its own trainings."""
    for name, step in (("one", 0.01), ("two", -0.02)):
        folder = study.folder / "experts" / name
        shutil.copytree(study.folder / "base", folder)
        tensors = {key: tensor + step for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = study.recipe.read_text()
    merges = "merges: {half: {method: linear, models: [one, two], parameters: {weight: 0.5}}}\n"
    study.recipe.write_text(text[: text.index("data:")] + merges + text[text.index("evaluation:") :])
    return study


def adopt(study, mixmerge, name, *more):
    return mixmerge("adopt", name, str(study.folder / "experts" / name), "--recipe", study.recipe, *more)


def test_adopted_experts_are_merged_judged_and_reported(adopted, mixmerge):
    for name in ("one", "two"):
        status, out, _ = adopt(adopted, mixmerge, name)
        assert status == 0
        assert f"adopted.{name}: {{path: ./experts/{name}}} (a whole model)" in out
    ran = adopted.call("run")
    assert ran.returncode == 0, ran.stderr
    assert {name.split("/")[0] for name in adopted.finished()}.isdisjoint({"mixture", "train"})
    scores = adopted.scores()
    told = {entry["name"]: (entry["kind"], entry["tokens"]) for entry in scores["candidates"]}
    assert told == {"base": ("base", 0), "one": ("expert", None), "two": ("expert", None), "half": ("merge", None)}
    record = next(path for name, path in adopted.records().items() if name.startswith("adopt/one--"))
    assert json.loads(record.read_text())["measurements"]["adapter"] is False
    page = next(adopted.out.rglob("report.html")).read_text()
    assert "not known" in page
    assert "How the trainings went" not in page, "nothing was trained here"
    assert "trained on one objective or language, here or elsewhere" in page
    made = load_file(next(adopted.store.glob("merge/half--*/model.safetensors")))
    first, second = (load_file(adopted.folder / "experts" / name / "model.safetensors") for name in ("one", "two"))
    for key, tensor in made.items():
        expected = ((first[key].double() + second[key].double()) / 2).to(tensor.dtype)
        assert (tensor.float() - expected.float()).abs().max() <= 1e-2 * expected.float().abs().max()


def test_the_content_and_not_the_place_of_an_adopted_model_is_its_identity(adopted, mixmerge):
    for name in ("one", "two"):
        adopt(adopted, mixmerge, name)
    before = build_plan(load_recipe(adopted.recipe)).models
    (adopted.folder / "experts" / "one").rename(adopted.folder / "moved")
    adopted.recipe.write_text(adopted.recipe.read_text().replace("./experts/one", "./moved"))
    assert build_plan(load_recipe(adopted.recipe)).models == before
    weights = adopted.folder / "moved" / "model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    after = build_plan(load_recipe(adopted.recipe)).models
    assert {name for name in before if before[name] != after[name]} == {"one", "half"}


def test_an_adopted_model_that_does_not_fit_is_refused_by_check_with_its_line(adopted, mixmerge):
    for name in ("one", "two"):
        adopt(adopted, mixmerge, name)
    weights = adopted.folder / "experts" / "two" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if name.endswith("up_proj.weight")))
    save_file(tensors, weights, {"format": "pt"})
    status, _, error = mixmerge("check", adopted.recipe, "--out", adopted.out)
    assert status == 2
    assert error.count("\n") == 1
    assert "adopted.two: " in error
    assert "up_proj.weight" in error


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("x", "/nowhere/x"), "/nowhere/x: no such folder"),
        (("half", "org/x"), "the name 'half' is taken"),
        (("x", "org/x", "--start", "hlf"), "unknown candidate 'hlf'; did you mean 'half'"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(adopted, mixmerge, arguments, what):
    adopted.recipe.write_text(adopted.recipe.read_text() + "adopted:\n  one: {hub: o/one}\n  two: {hub: o/two}\n")
    status, _, error = mixmerge("adopt", *arguments, "--recipe", adopted.recipe)
    assert status == 2
    assert error.count("\n") == 1
    assert what in error


def test_what_is_no_folder_here_is_announced_as_a_hub_id(adopted, mixmerge, monkeypatch):
    adopted.recipe.write_text(adopted.recipe.read_text() + "adopted:\n  one: {hub: o/one}\n  two: {hub: o/two}\n")
    monkeypatch.chdir(adopted.folder)
    told = "no folder far/x is here, so it is taken for a Hub id; a local folder is written ./far/x"
    status, out, err = mixmerge("adopt", "x", "far/x", "--recipe", "recipe.yaml")
    assert (status, err) == (0, f"note: {told}\n")
    assert "adopted.x: {hub: far/x}" in out
    found = json.loads(mixmerge("adopt", "y", "far/x", "--recipe", "recipe.yaml", "--json")[1])
    assert found["notes"] == [told]
    status, _, err = mixmerge("adopt", "z", "experts/one", "--recipe", "recipe.yaml")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("experts/tree", "experts/tree: the folder 'experts' is here and has no 'tree'; correct the path; a Hub id"),
        ("experts/deep/one", "experts/deep/one: no such folder, and no Hub id, which is org/name; give the folder"),
    ],
)
def test_a_probable_typo_of_a_path_is_not_taken_for_a_hub_id(adopted, mixmerge, monkeypatch, place, what):
    monkeypatch.chdir(adopted.folder)
    before = adopted.recipe.read_text()
    status, out, err = mixmerge("adopt", "one", place, "--recipe", "recipe.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {what}")
    assert adopted.recipe.read_text() == before
    if place == "experts/tree":
        assert mixmerge("adopt", "one", place, "--revision", "main", "--recipe", "recipe.yaml")[0] == 0
