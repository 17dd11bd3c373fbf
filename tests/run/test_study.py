"""A whole study by the real command line: run, run again, changed, on a broken base."""

from __future__ import annotations

import json
import shutil

import pytest

from mixmerge.report.trainings import from_to


def new_steps(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """`kind/name` of the steps that were not there before; those that were must be untouched."""
    assert {name: after.get(name) for name in before} == before, "a finished step was touched"
    return {name.rpartition("--")[0] for name in after.keys() - before.keys()}


def leftovers(study) -> list[str]:
    return [str(p.relative_to(study.store)) for d in (".partial", ".leases") for p in (study.store / d).iterdir()]


def follows(candidate: str) -> set[str]:
    generated = {f"generate/{candidate}.{name}" for name in ("general", "harmful")}
    judged = {f"judge/{candidate}.general.{judge}" for judge in ("language", "quality")}
    return (
        generated
        | judged
        | {f"judge/{candidate}.harmful.{judge}" for judge in ("language", "refusal")}
        | {"score/tiny", "report/tiny"}
    )


# One unbroken run


def test_a_study_ends_with_a_table_an_answer_and_a_report(finished):
    study = finished.study
    for name in ("base", "general", "mix", "ties"):
        assert f"\n{name} " in finished.printed
    report = study.out / "runs" / "tiny" / "report.html"
    assert finished.printed.endswith(f"report: {report}\n")
    scores = study.scores()
    assert scores["answer"]["sentence"] in finished.printed
    page = report.read_text(encoding="utf-8")
    assert "<html" in page.lower()
    assert scores["answer"]["sentence"].partition(":")[0] in page
    assert "Trust, " not in page, "what a judge measured is shown once, not again key by key"
    assert page.count("over its steps") == 2, "a chart of the loss of each of two trainings"
    for name in ("general", "mix"):
        measured = json.loads(next(study.store.glob(f"train/{name}--*/record.json")).read_text())["measurements"]
        assert from_to((measured["first_loss"], measured["last_loss"])) in page, "page and record agree"
    # the page says that its numbers are beside it, wherever a person opens it
    assert "beside this page" in page
    assert (report.parent / "scores.csv").read_text(encoding="utf-8").startswith("candidate,kind,split,metric")


def test_progress_goes_to_standard_error_alone(finished):
    assert finished.progress.startswith("tiny: 32 steps, 0 already there, 32 to run\n")
    assert "[32/32] report/tiny" in finished.progress
    assert "[32/32]" not in finished.printed


def test_nothing_half_made_is_left(finished):
    assert leftovers(finished.study) == []
    assert len(finished.study.records()) == 32


def test_every_candidate_is_linked_as_a_model_that_loads(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = finished.study.out / "runs" / "tiny" / "models"
    assert {path.name for path in models.iterdir()} == {"base", "general", "mix", "ties"}
    model = AutoModelForCausalLM.from_pretrained(models / "ties")
    tokenizer = AutoTokenizer.from_pretrained(models / "ties")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template


def test_training_learnt_and_merging_merged(finished):
    from safetensors.torch import load_file

    models = finished.study.out / "runs" / "tiny" / "models"
    name = "model.layers.0.self_attn.q_proj.weight"
    found = {
        model: load_file(models / model / "model.safetensors")[name] for model in ("base", "general", "mix", "ties")
    }
    assert all(not found["base"].equal(found[model]) for model in ("general", "mix", "ties"))
    assert not found["general"].equal(found["mix"])


def test_responses_and_verdicts_are_there_for_every_prompt(finished):
    for kind, file, count in (("generate", "responses.jsonl", 8), ("judge", "verdicts.jsonl", 15)):
        folders = list((finished.study.store / kind).iterdir())
        assert len(folders) == count
        for folder in folders:
            rows = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
            assert len({row["prompt_id"] for row in rows}) == len(rows) == 6


def test_the_same_command_again_does_nothing_and_prints_the_same(finished):
    study = finished.study
    before = study.finished()
    events = study.out / "runs" / "tiny" / "events.jsonl"
    told = events.read_text()
    again = study.call("run")
    assert again.returncode == 0
    assert again.stdout == finished.printed
    assert again.stderr == "tiny: 32 steps, 32 already there, 0 to run\n"
    assert study.finished() == before
    added = [json.loads(line)["event"] for line in events.read_text().removeprefix(told).splitlines()]
    assert added == ["begin", "end"], "a run that does nothing says no more"


def test_a_finished_study_can_be_asked_in_other_ways(finished, mixmerge):
    study = finished.study
    where = ("--out", study.out)
    status, out, _ = mixmerge("plan", study.recipe, "--json", *where)
    assert status == 0
    assert {step["state"] for step in json.loads(out)["steps"]} == {"done"}
    assert mixmerge("plan", study.recipe, *where)[1].endswith("32 steps: 32 done, 0 to run\n")
    assert mixmerge("status", study.recipe, *where)[1] == "tiny: 32 done\n"
    assert json.loads(mixmerge("status", study.recipe, "--json", *where)[1])["counts"]["done"] == 32
    status, out, _ = mixmerge("show", study.recipe, "train/mix", *where)
    assert status == 0
    for word in (
        "train/mix",
        "learning_rate: 0.001",
        "mixture: mixture/mix",
        "model.safetensors",
        "peak_rss_mb",
        "log: ",
    ):
        assert word in out
    record = json.loads(mixmerge("show", study.recipe, "merge/ties", "--json", *where)[1])["record"]
    assert record["measurements"]["method"] == "ties"
    assert mixmerge("report", study.recipe, *where)[1] == finished.printed


def test_a_report_that_was_not_made_is_not_promised(finished, mixmerge):
    study = finished.study
    status, out, err = mixmerge("report", study.recipe, "--set", "name=other", "--out", study.out)
    assert (status, out) == (2, "")
    assert err == "error: other: the study is not finished; mixmerge run RECIPE\n"
    assert not (study.out / "runs" / "other").exists()


def test_the_results_can_be_had_from_python(finished):
    import mixmerge

    study = finished.study
    assert {step.title for step in mixmerge.plan(study.recipe).steps} >= {"train/mix", "merge/ties"}
    found = mixmerge.results(study.recipe, out=study.out)
    assert found["answer"] == study.scores()["answer"]
    assert mixmerge.load_recipe(study.recipe, ["seed=4"]).recipe.seed == 4


# Changes


def test_another_density_makes_that_merge_again_and_what_follows_and_nothing_else(copy):
    before = copy.finished()
    copy.edit("density: 0.5", "density: 0.7")
    planned = copy.call("plan", "--why").stdout
    todo = {line.split()[1]: line for line in planned.splitlines() if "  changed  " in line or "  blocked  " in line}
    assert set(todo) == {"merge/ties"} | follows("ties")
    assert "config.parameters.density: 0.5 -> 0.7" in todo["merge/ties"]
    assert "input merge/ties is to be made again" in todo["generate/ties.general"]
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    assert new_steps(before, copy.finished()) == {"merge/ties"} | follows("ties")
    copy.edit("density: 0.7", "density: 0.5")
    assert copy.call("plan").stdout.endswith("32 steps: 32 done, 0 to run\n"), "the old one is still there"


def test_a_renamed_candidate_is_not_made_again(copy):
    before = copy.finished()
    copy.edit("  general: {mixture: general}", "  plain: {mixture: general}")
    copy.edit("models: {general: {weight: 1.0},", "models: {plain: {weight: 1.0},")
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    assert new_steps(before, copy.finished()) == {"score/tiny", "report/tiny"}
    assert "\nplain " in ran.stdout
    assert "\ngeneral " not in ran.stdout
    assert (copy.out / "runs" / "tiny" / "models" / "plain" / "model.safetensors").is_file()


# What breaks outside


@pytest.mark.parametrize("harm", ["truncated", "no header", "empty"])
def test_a_corrupt_base_is_named_before_anything_starts(copy, harm):
    before = copy.finished()
    base = copy.folder / "base"
    files = base.resolve()
    base.unlink()
    shutil.copytree(files, base)
    weights = base / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes({"truncated": data[: len(data) // 2], "no header": b"\xff" * 8 + data[8:], "empty": b""}[harm])
    ran = copy.call("run")
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {copy.recipe}:2: base: {weights}: ")
    assert ran.stderr.count("\n") == 1
    assert copy.finished() == before
