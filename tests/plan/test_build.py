"""From recipe to plan: which steps there are, what their identity follows, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mixmerge import hashes
from mixmerge.errors import DataError, ModelError, RecipeError, UserError
from mixmerge.hashes import SMALL, file_sha256
from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan
from mixmerge.plan.models import folder_fingerprint
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.schema import How, Recipe


def titles(plan: Plan) -> dict[str, str]:
    return {step.title: step.id for step in plan.steps}


def changed(before: Plan, after: Plan) -> set[str]:
    """Titles of the steps whose id differs."""
    old, new = titles(before), titles(after)
    return {title for title in old.keys() | new.keys() if old.get(title) != new.get(title)}


def below(candidate: str) -> set[str]:
    """Titles of everything that follows from one candidate's weights."""
    judged = {f"judge/{candidate}.general.{judge}" for judge in ("language", "quality")}
    judged |= {f"judge/{candidate}.harmful.{judge}" for judge in ("language", "refusal")}
    return judged | {f"generate/{candidate}.{name}" for name in ("general", "harmful")} | {"score/tiny", "report/tiny"}


# The steps


def test_every_step_comes_after_its_inputs(planned):
    seen: set[str] = set()
    for step in planned().steps:
        assert seen.issuperset(step.inputs.values()), step.title
        seen.add(step.id)


def test_there_is_one_step_for_each_thing_to_be_made(planned):
    plan = planned()
    assert len(titles(plan)) == len(plan.steps)
    kinds = [step.kind for step in plan.steps]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == {
        "base": 1,
        "mixture": 2,
        "train": 2,
        "merge": 1,
        "generate": 8,
        "fit-judge": 1,
        "judge": 15,
        "score": 1,
        "report": 1,
    }
    assert plan.models.keys() == {"base", "general", "mix", "ties"}


def test_the_report_reads_what_each_merge_measured(planned):
    plan = planned()
    report = plan.steps[-1]
    merged = {role: step for role, step in report.inputs.items() if role.startswith("merge/")}
    assert merged == {"merge/ties": plan.models["ties"]}


def test_the_report_reads_what_each_training_logged(planned):
    plan = planned()
    report = plan.steps[-1]
    trained = {role: step for role, step in report.inputs.items() if role.startswith("train/")}
    assert trained == {f"train/{name}": plan.models[name] for name in ("general", "mix")}
    assert all(plan.by_id[step].kind == "train" for step in trained.values())


def test_the_base_is_not_compared_with_itself(planned):
    assert "judge/base.general.quality" not in titles(planned())


def test_two_candidates_made_alike_are_one_step_and_both_are_reported(study, planned):
    study.edit("  mix:\n", "  twin: {mixture: general}\n  mix:\n")
    plan = planned()
    assert plan.models["twin"] == plan.models["general"]
    assert "train/twin" not in titles(plan)
    report = plan.steps[-1]
    assert report.inputs["responses/twin/general"] == report.inputs["responses/general/general"]


def test_names_with_dots_are_not_confused(study, planned):
    study.edit("    general: {purpose", "    v1.general: {purpose")
    report = planned().steps[-1]
    assert "responses/mix/v1.general" in report.inputs


def test_two_steps_that_dots_in_names_would_give_one_title_are_refused(study, planned):
    study.edit("  mix:\n", "  general.v1: {mixture: general, budget: {rows: 4}}\n  mix:\n")
    planned()
    study.edit("    harmful: {purpose", "    v1.general: {purpose")
    what = r"several steps would be called generate/general\.v1\.general, .*, as names .*; rename a candidate or a prompt set"
    with pytest.raises(RecipeError, match=what):
        planned()


def test_a_plan_that_went_through_json_is_the_same_plan(planned):
    plan = planned()
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert titles(again) == titles(plan)
    assert again.models == plan.models


def test_a_step_is_found_by_title_and_by_the_beginning_of_its_id(planned):
    plan = planned()
    step = plan.find("merge/ties")
    assert plan.find(step.id[:6]) is step
    with pytest.raises(UserError, match=r"no step 'merge/tie' in this study; did you mean 'merge/ties'\?"):
        plan.find("merge/tie")


def test_a_beginning_of_several_ids_is_refused_with_all_of_them(planned):
    plan = planned()
    first, second = plan.steps[:2]
    second.__dict__["id"] = f"{first.id[:6]}{second.id[6:]}"
    several = (
        rf"'{first.id[:5]}' may be any of these steps: {first.title} {first.id}, {second.title} {second.id}; give the"
    )
    with pytest.raises(UserError, match=several):
        plan.find(first.id[:5])
    assert plan.find(second.id) is second


# Identity. Each key of the recipe that can change a result, another value for it, and a step that it must change.

# None: the other value is refused.
PAIRS = "experts.general={{mixture: safety, training: {{{}}}}}"
WHAT = {
    "seed": ("seed=1", "train/mix"),
    "languages": ("languages=[en]", "score/tiny"),
    "base.path": ("base={path: ./other}", "base/base"),
    "base.chat_template": ("base={path: ./base, chat_template: chatml}", "base/base"),
    "base.trim_vocab": ("base={path: ./base, trim_vocab: 300}", "base/base"),
    "data.objective": ("data.general.objective=other", None),
    "data.path": ("data.general.path=data/safety.{lang}.jsonl", "mixture/general"),
    "data.columns": ("data.general.columns={id: id}", "mixture/general"),
    "data.languages": ("data.general.languages=[en]", None),
    "data.lang_column": ("data.general.lang_column=lang", "mixture/general"),
    "data.limit": ("data.general.limit=5", "mixture/general"),
    "data.bad_rows": ("data.general.bad_rows=drop", "mixture/general"),
    "data.wrong_language": ("data.general.wrong_language=drop", "mixture/general"),
    "data.lang": ("data.general={objective: general, path: data/general.en.jsonl, lang: en}", None),
    "budget.rows": ("budget={rows: 6}", "mixture/mix"),
    "budget.tokens": ("budget={tokens: 200}", "mixture/mix"),
    "budget.baselines": ("budget={rows: 8, baselines: {rows: 10}}", "mixture/mix"),
    "training.learning_rate": ("training.learning_rate=1.0e-4", "train/mix"),
    "training.epochs": ("training.epochs=2", "train/mix"),
    "training.batch_size": ("training.batch_size=4", "train/mix"),
    "training.max_length": ("training.max_length=128", "train/mix"),
    "training.warmup_ratio": ("training.warmup_ratio=0.2", "train/mix"),
    "training.scheduler": ("training.scheduler=linear", "train/mix"),
    "training.weight_decay": ("training.weight_decay=0.1", "train/mix"),
    "training.precision": ("training.precision=bf16", "train/mix"),
    "training.max_repeats": ("training.max_repeats=2", "mixture/mix"),
    "training.adapter": ("training.adapter={r: 8}", "train/mix"),
    "training.save_dtype": ("training.save_dtype=float32", "train/mix"),
    "training.seed": ("training.seed=9", "train/mix"),
    "training.gradient_accumulation": ("training.gradient_accumulation=2", "train/mix"),
    "training.optimizer": ("training.optimizer=sgd", "train/mix"),
    "training.adam_betas": ("training.adam_betas=[0.9, 0.95]", "train/mix"),
    "training.adam_epsilon": ("training.adam_epsilon=1.0e-6", "train/mix"),
    "training.max_grad_norm": ("training.max_grad_norm=0", "train/mix"),
    "training.neftune_alpha": ("training.neftune_alpha=5", "train/mix"),
    "training.train_on": ("training.train_on=all", "train/mix"),
    "training.padding_free": ("training.padding_free=true", "train/mix"),
    "training.held_out": ("training.held_out=0.2", "train/mix"),
    "training.extra": ("training.extra={lr_scheduler_kwargs: {num_cycles: 0.4}}", "train/mix"),
    "training.method": (PAIRS.format("method: dpo"), "mixture/general"),
    "training.beta": (PAIRS.format("method: dpo, beta: 0.2"), "train/general"),
    "training.loss": (PAIRS.format("method: dpo, loss: ipo"), "train/general"),
    "training.label_smoothing": (PAIRS.format("method: dpo, loss: robust, label_smoothing: 0.1"), "train/general"),
    "experts.mixture": ("experts.general.mixture=safety", "mixture/general"),
    "training.engine": ("training={engine: command, command: 'x {model} {mixture} {out}'}", "train/general"),
    "training.command": ("training={engine: command, command: 'y {model} {mixture} {out}'}", "train/general"),
    "adopted.path": ("adopted={elder: {path: other}}", "adopt/elder"),
    "adopted.start": ("adopted={elder: {path: other, start: general}}", "adopt/elder"),
    "experts.languages": ("experts.general.languages=[en]", "mixture/general"),
    "experts.temperature": (
        "experts.general={mixture: general, languages: {en: 1, fr: 3}, temperature: 2}",
        "mixture/general",
    ),
    "experts.caps": ("experts.general={mixture: general, caps: {en: 0.25}}", "mixture/general"),
    "experts.max_repeats": ("experts.general={mixture: general, max_repeats: {en: 2}}", "mixture/general"),
    "experts.budget": ("experts.general.budget={rows: 6}", "mixture/general"),
    "experts.start": ("experts.general.start=mix", "train/general"),
    "experts.training": ("experts.general.training={epochs: 3}", "train/general"),
    "baselines.mixture": ("baselines.mix.mixture={general: 0.7, safety: 0.3}", "mixture/mix"),
    "merges.method": ("merges.ties.method=dare_ties", "merge/ties"),
    "merges.models": ("merges.ties.models.general={weight: 0.9}", "merge/ties"),
    "merges.base": ("merges.ties={method: ties, models: [mix], base: general, parameters: {weight: 1}}", "merge/ties"),
    "merges.parameters": ("merges.ties.parameters={density: 0.7}", "merge/ties"),
    "merges.dtype": ("merges.ties.dtype=float32", "merge/ties"),
    "evaluation.prompts": ("evaluation.prompts.general.purpose=harmless", "generate/base.general"),
    "evaluation.limit": ("evaluation.limit={dev: 1, test: 1}", "generate/base.general"),
    "evaluation.max_new_tokens": ("evaluation.max_new_tokens=5", "generate/base.general"),
    "evaluation.temperature": ("evaluation.temperature=0.5", "generate/base.general"),
    "evaluation.server": ("evaluation.server={url: http://127.0.0.1:9/v1}", "generate/base.general"),
    "evaluation.harness": ("evaluation.harness={facts: {tasks: [facts], include_path: tasks}}", "score/tiny"),
    "judges.quality": ("judges.quality.margin=0.1", "judge/mix.general.quality"),
    "judges.endpoints": ("judges.endpoints={gpt: {url: http://127.0.0.1:9/v1, model: m, asks: harm}}", "score/tiny"),
    "judges.classifiers": (
        "judges.classifiers={words: {kind: ngrams, path: data/labelled.jsonl, asks: refusal, labels: {r: refused, c: complied}}}",
        "score/tiny",
    ),
    "judges.refusal": ("judges.refusal.answers=data/more.{lang}.jsonl", "fit-judge/refusal"),
    "statistics.draws": ("statistics.draws=200", "score/tiny"),
    "statistics.level": ("statistics.level=0.9", "score/tiny"),
}
# They name things, or say what is refused; where the base, data or prompts come from matters by content alone.
NOT_WHAT = {
    "name",
    "base.hub",
    "base.revision",
    "base.package",
    "data.hub",
    "data.config",
    "data.split",
    "data.revision",
    "adopted.hub",
    "adopted.revision",
    "data.streaming",
}
NOT_WHAT |= {"evaluation.overlap", "judges.decide", "evaluation.top_p"}


def keys_of_recipe() -> set[str]:
    """Every key of a recipe, down to two levels, without those under `how`."""
    found = set()
    for name, field in Recipe.model_fields.items():
        annotation = field.annotation
        inner = getattr(annotation, "model_fields", None)
        arguments = [part for part in getattr(annotation, "__args__", ()) if part is not type(None)]
        if inner is None and arguments:
            inner = getattr(arguments[-1], "model_fields", None)
        found |= {f"{name}.{key}" for key in inner} if inner else {name}
    return {key for key in found if not key.startswith("how.")}


def test_the_lists_above_name_every_key_of_a_recipe():
    trained = {
        f"baselines.{key}" for key in ("languages", "temperature", "caps", "max_repeats", "budget", "start", "training")
    }  # as of experts
    assert keys_of_recipe() - trained == set(WHAT) | NOT_WHAT


TASK = """\
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: facts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def files(study) -> Path:
    """The study's folder, with other files that overrides above name."""
    for code in ("en", "fr"):
        text = (study.folder / f"data/general.{code}.jsonl").read_text()
        path = study.folder / f"data/general.{code}.jsonl"
        path.write_text(text.replace('"id"', f'"lang": "{code}", "id"'))
        (study.folder / f"data/more.{code}.jsonl").write_text(text + text.splitlines()[0].replace('"g0', '"x0') + "\n")
    shutil.copytree(study.folder / "base", study.folder / "other")
    (study.folder / "tasks").mkdir()
    (study.folder / "tasks/facts.jsonl").write_text('{"q": "What is it?", "a": "It is blue."}\n')
    (study.folder / "tasks/facts.yaml").write_text(TASK)
    rows = [{"id": i, "lang": "en", "text": f"words {i}", "label": "rc"[i % 2]} for i in range(20)]
    (study.folder / "data/labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (study.folder / "other" / "generation_config.json").write_text("{}")
    return study.folder


@pytest.mark.parametrize("key", WHAT)
def test_changing_a_key_that_matters_changes_its_step_and_what_follows(planned, files, key):
    override, title = WHAT[key]
    before = planned()
    if title is None:
        with pytest.raises(UserError):
            planned(override)
        return
    after = planned(override)
    found = changed(before, after)
    assert title in found
    by_id, old = before.by_id, titles(before)
    ids = {old[name] for name in found if name in old}
    following = {s.title for s in by_id.values() if ids & set(s.inputs.values())}
    assert following <= found, "whatever uses a changed step changes"


@pytest.mark.parametrize("key", How.model_fields)
def test_changing_anything_under_how_changes_no_id(planned, key):
    values = {"threads": 3, "device": "cpu", "jobs": 2, "generate_batch_size": 7, "checkpoint_every": 9}
    values |= {
        "gradient_checkpointing": "true",
        "evaluate_every": 2,
        "report_to": "[]",
        "launcher": "x",
        "processes": 2,
        "nodes": 2,
        "fsdp": True,
        "generate_processes": 2,
    }
    devices = ("training.batch_size=8", "how.processes=2", "how.launcher=srun")  # without which some keys mean nothing
    before, after = planned(devices[0]), planned(*devices, f"how.{key}={values[key]}")
    assert titles(after) == titles(before)


def test_a_density_changes_its_merge_and_what_follows_from_it_alone(planned):
    found = changed(planned(), planned("merges.ties.parameters.density=0.7"))
    assert found == {"merge/ties"} | below("ties")


def test_a_learning_rate_of_one_expert_leaves_the_others_alone(planned):
    found = changed(planned(), planned("experts.general.training.learning_rate=0.01"))
    assert found == {"train/general", "merge/ties"} | below("general") | below("ties")


def test_a_renamed_candidate_keeps_every_id_but_score_and_report(study, planned):
    before = {step.id: step.kind for step in planned().steps}
    study.edit("  general: {mixture: general}", "  plain: {mixture: general}")
    study.edit("models: {general: {weight: 1.0},", "models: {plain: {weight: 1.0},")
    new = [step for step in planned().steps if step.id not in before]
    assert {step.kind for step in new} == {"score", "report"}


def test_another_study_name_changes_the_report_alone(planned):
    before = planned()
    assert {step.kind for step in planned("name=other").steps if step.id not in before.by_id} == {"report"}


def test_the_order_of_keys_in_the_recipe_does_not_matter(planned):
    one = planned("baselines.mix.mixture={general: 1, safety: 3}")
    two = planned("baselines.mix.mixture={safety: 3, general: 1}")
    assert titles(one) == titles(two)


def test_the_order_of_the_models_of_a_merge_matters_to_slerp(planned):
    one = planned("merges.ties={method: slerp, models: [general, mix], parameters: {t: 0.3}}")
    two = planned("merges.ties={method: slerp, models: [mix, general], parameters: {t: 0.3}}")
    assert "merge/ties" in changed(one, two)


def test_a_whole_number_is_the_same_parameter_as_its_fraction(planned):
    one = planned("merges.ties.models.general.weight=1", "merges.ties.parameters.density=1")
    assert titles(one) == titles(planned("merges.ties.models.general.weight=1.0", "merges.ties.parameters.density=1.0"))


def test_shares_are_the_same_in_any_scale(planned):
    assert titles(planned("baselines.mix.mixture={general: 2, safety: 2}")) == titles(planned())


def test_moving_the_whole_study_changes_no_id(study, planned, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "study"
    shutil.copytree(study.folder, moved)
    assert titles(build_plan(load_recipe(moved / "recipe.yaml"))) == titles(planned())


@pytest.mark.parametrize(
    ("file", "mixtures"), [("safety.fr", {"mixture/mix"}), ("general.en", {"mixture/general", "mixture/mix"})]
)
def test_one_changed_row_changes_the_mixtures_that_use_it(study, planned, file, mixtures):
    before = planned()
    path = study.folder / f"data/{file}.jsonl"
    path.write_text(path.read_text().replace('prompt": "', 'prompt": "So: ', 1))
    found = changed(before, planned())
    assert {title for title in found if title.startswith("mixture/")} == mixtures


def test_one_changed_prompt_changes_what_is_generated_and_no_training(study, planned):
    before = planned()
    path = study.folder / "prompts/general.en.jsonl"
    path.write_text(path.read_text().replace("sky", "evening sky"))
    found = {title.partition("/")[0] for title in changed(before, planned())}
    assert found == {"generate", "judge", "score", "report"}


def test_one_changed_weight_of_the_base_changes_everything_made_from_it(study, planned):
    before = planned()
    base = study.folder / "base"
    copy = study.folder / "copy"
    shutil.copytree(base, copy)
    base.unlink()
    copy.rename(base)
    assert titles(planned()) == titles(before), "a copy is the same base"
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    assert changed(before, planned()) >= {"base/base", "train/mix", "merge/ties", "generate/base.general"}


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(study, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "RACY_NS", -(10**12))  # as if it were here for long
    cache = tmp_path / "cache"
    folder = tmp_path / "model"
    shutil.copytree(study.folder / "base", folder)
    with (folder / "more.safetensors").open("wb") as file:
        file.write(b"x" * SMALL)
    os.utime(folder / "more.safetensors", (1e9, 1e9))
    first = folder_fingerprint(folder, cache)
    (remembered,) = json.loads((cache / "fingerprints.json").read_text())["files"]
    assert remembered == str(folder / "more.safetensors"), "small files are read again"
    with (folder / "more.safetensors").open("r+b") as file:  # by a tool that gives the old date back
        file.write(b"y")
    os.utime(folder / "more.safetensors", (1e9, 1e9))
    assert folder_fingerprint(folder, cache) == folder_fingerprint(folder, None) != first
    (cache / "fingerprints.json").write_text("not JSON")
    assert folder_fingerprint(folder, cache) == folder_fingerprint(folder, None) != first


def test_what_is_known_of_a_models_files_is_not_read_again(study):
    folder = study.folder / "base"
    weights = {"model.safetensors": file_sha256(folder / "model.safetensors")}
    assert folder_fingerprint(folder, None, weights) == folder_fingerprint(folder, None)
    assert folder_fingerprint(folder, None, {"model.safetensors": "0" * 64}) != folder_fingerprint(folder, None)


# What is refused


@pytest.mark.parametrize(
    ("override", "error", "word"),
    [
        ("evaluation.prompts={}", RecipeError, "no prompt sets"),
        (
            "base={path: ./base, chat_template: chatlm}",
            RecipeError,
            "neither a named chat template nor a file; did you mean",
        ),
        ("base={package: no-such-package}", ModelError, "the package 'no-such-package' is not installed"),
        ("base=./nowhere", ModelError, "no folder"),
        ("experts.general.languages={en: 1, fr: 0}", None, ""),
        ("data.general.path=data/safety.{lang}.csv", DataError, "no file for language 'en'"),
        ("judges.refusal.refusals=nowhere.{lang}.jsonl", DataError, "no file for language 'en'"),
        ("judges.refusal.answers=prompts/general.{lang}.jsonl", DataError, "missing"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_planned(planned, override, error, word):
    if error is None:
        assert planned(override).steps
        return
    with pytest.raises(error) as caught:
        planned(override)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_without_chat_template_is_refused_unless_the_recipe_gives_one(study, planned):
    folder = study.folder / "bare"
    shutil.copytree(study.folder / "base", folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"base: \./bare has no chat template; set base\.chat_template"):
        planned("base=./bare")
    mine = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    (study.folder / "mine.jinja").write_text(mine)
    own = planned("base={path: ./bare, chat_template: mine.jinja}")
    assert own.find("base/base").what["chat_template"] == mine


@pytest.mark.parametrize(
    ("file", "word"), [("config.json", "has no config.json"), ("model.safetensors", "has no .safetensors file")]
)
def test_a_folder_that_is_no_model_is_refused(study, planned, file, word):
    folder = study.folder / "less"
    shutil.copytree(study.folder / "base", folder)
    (folder / file).unlink()
    with pytest.raises(ModelError, match=word):
        planned("base=./less")


def test_an_overlap_may_be_ignored_by_the_recipe(study, planned):
    rows = (study.folder / "prompts/harmful.en.jsonl").read_text().splitlines()
    row = json.loads(rows[0]) | {"id": "s-900a", "kind": "harmful", "chosen": "No.", "rejected": "Yes."}
    with (study.folder / "data/safety.en.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="are also prompts"):
        planned()
    study.edit('judges:\n  refusal: {answers: "data/general.{lang}.jsonl", refusals: "data/safety.{lang}.jsonl"}\n', "")
    assert planned("evaluation.overlap=ignore").steps


def test_a_sweep_is_the_same_study_as_its_entries_written_by_hand(planned):
    swept = planned("baselines={'mix-{safety}': {mixture: {general: rest, safety: {sweep: [0.25, 0.5]}}}}", "merges={}")
    by_hand = planned(
        "baselines={mix-0.25: {mixture: {general: 0.75, safety: 0.25}}, mix-0.5: {mixture: {general: 0.5, safety: 0.5}}}",
        "merges={}",
    )
    assert titles(swept) == titles(by_hand)
    assert {"mix-0.25", "mix-0.5"} <= swept.models.keys()


def test_a_budget_by_rule_is_the_same_training_as_its_number_and_the_scores_say_the_rule(study, planned):
    study.edit("experts:\n", "experts:\n  safety: {mixture: safety, budget: {rows: 4}}\n")
    by_hand, by_rule = planned("baselines.mix.budget={rows: 12}"), planned("budget={rows: 8, baselines: sum}")
    assert {title.partition("/")[0] for title in changed(by_hand, by_rule)} == {"score", "report"}
    assert by_rule.find("mixture/mix").how["budget_rule"] == "sum of all experts"
    assert "budget_rule" not in by_rule.find("mixture/general").how
    told = {entry["name"]: entry.get("budget_rule") for entry in by_rule.find("score/tiny").what["candidates"]}
    assert told == {"base": None, "safety": None, "general": None, "mix": "sum of all experts", "ties": None}


def test_trainings_of_adapters_share_a_process_and_those_of_all_weights_do_not(planned):
    plan = planned("experts.general.training={adapter: {r: 2}}")
    assert plan.by_id[plan.models["general"]].group == "train general"
    assert plan.by_id[plan.models["mix"]].group == ""
