"""Options of a training: what each changes, what changes nothing, and what is refused."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import metrics_of, same, tiny_model, tiny_tokenizer, train, weights, write_rows
from transformers import AutoModelForCausalLM

from mixmerge.errors import StepError, UserError
from mixmerge.recipe.schema import Training
from mixmerge.train.dpo import train_dpo
from mixmerge.train.extra import OURS, WORDS, check_extra
from mixmerge.train.heldout import held_out_rows
from mixmerge.train.settings import METHODS, OPTIMIZERS, SCHEDULES, DpoSettings, SftSettings, settings_from
from mixmerge.train.sft import train_sft
from mixmerge.train.tokens import IGNORED, tokenise
from mixmerge.train.trainer import forget_overrides

EXACT = {"precision": "fp32", "save_dtype": "float32"}
ADAPTER = {"type": "lora", "r": 4}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A model without dropout, whose losses can be compared."""
    return tiny_model(tmp_path_factory.mktemp("calm"), dtype="float32")


def distance(one, two):
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit_of_a_weight(precision, method, adapter, llama, facts, choices, tmp_path):
    # The model drops out attention: what is computed again must draw the same.
    mixture = facts if method == "sft" else choices
    settings = settings_from(
        {"method": method, "learning_rate": 5e-3, "batch_size": 4, "max_length": 64, "precision": precision}
        | {"save_dtype": "float32", "adapter": adapter}
    )
    for name, asked in (("kept", False), ("again", True)):
        call = train_sft if method == "sft" else train_dpo
        place = {"work": tmp_path / name / "work", "threads": 1, "gradient_checkpointing": asked}
        call(llama, mixture, tmp_path / name / "out", settings, **place)
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "again"))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_batch_in_parts_takes_the_same_steps_to_nearly_the_same_weights(method, calm, facts, choices, tmp_path):
    mixture = facts if method == "sft" else choices
    for parts in (1, 2, 4):
        settings = {**EXACT, "gradient_accumulation": parts, "learning_rate": 1e-3}
        train(calm, mixture, tmp_path / str(parts), method=method, **settings)
    whole = metrics_of(tmp_path / "1")
    for parts in (2, 4):
        lines = metrics_of(tmp_path / str(parts))
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in whole]
        assert [line["lr"] for line in lines] == [line["lr"] for line in whole]
        np.testing.assert_allclose([x["loss"] for x in lines], [x["loss"] for x in whole], rtol=1e-3)
        assert distance(weights(tmp_path / "1"), weights(tmp_path / str(parts))) < 1e-4


def test_rows_without_padding_give_the_losses_of_padded_ones(calm, facts, tmp_path):
    for name, asked in (("padded", False), ("free", True)):
        measured = train(calm, facts, tmp_path / name, **EXACT, padding_free=asked, learning_rate=1e-3, epochs=2)
        assert measured["steps"] == 12
    padded, free = metrics_of(tmp_path / "padded"), metrics_of(tmp_path / "free")
    assert [line["tokens"] for line in free] == [line["tokens"] for line in padded]
    assert [line["completion_tokens"] for line in free] == [line["completion_tokens"] for line in padded]
    np.testing.assert_allclose([x["loss"] for x in free], [x["loss"] for x in padded], rtol=2e-3)
    assert distance(weights(tmp_path / "padded"), weights(tmp_path / "free")) < 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_that_is_offered_trains_and_carries_on(optimizer, calm, facts, tmp_path):
    settings = {**EXACT, "optimizer": optimizer, "epochs": 1}
    train(calm, facts, tmp_path / "whole", None, 2, **settings)
    train(calm, facts, tmp_path / "cut", None, 2, **settings)
    (tmp_path / "cut" / "out").rename(tmp_path / "first")
    steps = []
    train(calm, facts, tmp_path / "cut", lambda done, _: steps.append(done), 2, **settings)
    assert steps == [5, 6]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not same(weights(tmp_path / "whole"), load_file(calm / "model.safetensors"))


@pytest.mark.parametrize(
    "option",
    [
        {"adam_betas": [0.5, 0.9]},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 1e-3, "optimizer": "sgd"},
        {"neftune_alpha": 10.0},
        {"extra": {"lr_scheduler_kwargs": {"num_cycles": 0.1}}},
    ],
)
def test_an_option_that_is_part_of_the_identity_changes_the_weights(option, calm, facts, tmp_path):
    plain = {key: value for key, value in option.items() if key == "optimizer"}
    train(calm, facts, tmp_path / "plain", **EXACT, **plain)
    train(calm, facts, tmp_path / "other", **EXACT, **option)
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "other"))


def test_noise_on_embeddings_is_drawn_alike_by_a_training_that_carries_on(calm, facts, tmp_path):
    train(calm, facts, tmp_path / "whole", None, 2, **EXACT, neftune_alpha=10.0)
    train(calm, facts, tmp_path / "cut", None, 2, **EXACT, neftune_alpha=10.0)
    (tmp_path / "cut" / "out").rename(tmp_path / "first")
    train(calm, facts, tmp_path / "cut", None, 2, **EXACT, neftune_alpha=10.0)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


# What is learnt of a conversation


def conversation(*turns):
    *prompt, answer = [{"role": role, "content": text} for role, text in turns]
    return {"prompt": prompt, "completion": [answer]}


TALK = conversation(
    ("system", "tell me"),
    ("user", "sky"),
    ("assistant", "blue"),
    ("user", "grass"),
    ("assistant", "deep green"),
    ("user", "sun"),
    ("assistant", "warm red"),
)


def learnt(row, **settings):
    tokenizer = tiny_tokenizer()
    made = tokenise([row], tokenizer, 200, **settings)
    return tokenizer.decode([int(label) for label in made.labels[0] if label != IGNORED])


def test_all_turns_of_the_assistant_are_learnt_where_asked_and_nobody_elses():
    assert learnt(TALK) == "warm red<|im_end|>\n"
    assert learnt(TALK, all_turns=True) == "blue<|im_end|>\ndeep green<|im_end|>\nwarm red<|im_end|>\n"


def test_a_row_with_one_answer_is_the_same_however_turns_are_learnt():
    single = conversation(("user", "sky"), ("assistant", "blue"))
    assert learnt(single, all_turns=True) == learnt(single) == "blue<|im_end|>\n"


def test_turns_beyond_the_cut_are_not_learnt():
    tokenizer = tiny_tokenizer()
    whole = tokenise([TALK], tokenizer, 200, all_turns=True)
    short = tokenise([TALK], tokenizer, len(whole.ids[0]) - 2, all_turns=True)
    assert short.truncated == 1
    assert len(short.labels[0]) == len(short.ids[0]) == len(whole.ids[0]) - 2
    np.testing.assert_array_equal(short.labels[0], whole.labels[0][:-2])


def test_training_on_all_turns_counts_their_tokens(calm, tmp_path):
    mixture = write_rows(tmp_path / "mix", [])
    line = {"id": "en/1", "objective": "general", "lang": "en", **TALK}
    (mixture / "rows.jsonl").write_text(json.dumps(line) + "\n")
    last = train(calm, mixture, tmp_path / "last", max_length=128)
    every = train(calm, mixture, tmp_path / "all", max_length=128, train_on="all")
    assert every["tokens"] == last["tokens"]
    assert every["completion_tokens"] > last["completion_tokens"]


# What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"gradient_accumulation": 0},
        {"gradient_accumulation": 3},
        {"optimizer": "adam"},
        {"adam_betas": (0.9, 1.0)},
        {"adam_betas": (0.9,)},
        {"adam_epsilon": 0.0},
        {"max_grad_norm": -1.0},
        {"neftune_alpha": 0.0},
    ],
)
@pytest.mark.parametrize("settings", METHODS.values())
def test_an_option_out_of_range_is_refused_by_name(settings, wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} cannot be"):
        settings(**wrong)


def test_padding_free_dpo_cannot_be_asked_for():
    with pytest.raises(TypeError):
        DpoSettings(padding_free=True)
    with pytest.raises(UserError, match="train_on cannot be 'first'"):
        SftSettings(train_on="first")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("learning_rate", "set learning_rate"),
        ("optim", "set optimizer"),
        ("packing", "set padding_free"),
        ("gradient_checkpointing", "set how.gradient_checkpointing"),
        ("output_dir", "this is not free"),
        ("save_steps", "this is not free"),
        ("hub_token", "this is not free"),
        ("push_to_hub", "this is not free"),
        ("eval_strategy", "this is not free"),
        ("lr_scheduler_kwarg", "did you mean 'lr_scheduler_kwargs'?"),
        ("average_tokens", "TRL has no such option for sft"),
    ],
)
def test_an_extra_option_that_is_not_the_users_is_refused_with_what_to_do(name, word):
    with pytest.raises(UserError) as caught:
        check_extra("sft", {name: 1})
    assert str(caught.value).startswith(f"training.extra.{name}: ")
    assert word in str(caught.value)


def test_extra_options_are_those_of_the_method():
    check_extra("dpo", {"ld_alpha": 0.5, "f_divergence_type": "js_divergence"})
    check_extra("sft", {"lr_scheduler_kwargs": {}, "activation_offloading": False})
    with pytest.raises(UserError, match="TRL has no such option for sft"):
        check_extra("sft", {"ld_alpha": 0.5})


def test_every_field_that_is_kept_from_the_user_is_one_that_trl_or_transformers_had():
    import dataclasses

    from trl import DPOConfig, SFTConfig

    known = {field.name for kind in (SFTConfig, DPOConfig) for field in dataclasses.fields(kind)}
    assert not OURS & WORDS.keys()
    strangers = (OURS | WORDS.keys()) - known
    assert strangers <= {"overwrite_output_dir", "warmup_ratio", "group_by_length", "logging_dir", "dtype"}


def test_an_extra_option_reaches_trl_and_its_refusal_is_one_line(calm, choices, tmp_path):
    settings = {**EXACT, "method": "dpo", "learning_rate": 1e-3}
    train(calm, choices, tmp_path / "plain", **settings)
    train(calm, choices, tmp_path / "other", **settings, extra={"ld_alpha": 0.0})
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "other"))
    with pytest.raises(UserError, match=r"training\.extra: TRL refuses these options: ") as caught:
        train(calm, choices, tmp_path / "wrong", **settings, extra={"lr_scheduler_kwargs": "{"})
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_never_cut_is_still_watched(calm, facts, tmp_path):
    with pytest.raises(StepError, match=r"is (nan|inf) at step"):
        train(calm, facts, tmp_path, max_grad_norm=0.0, learning_rate=1e30, epochs=10, warmup_ratio=0.0)
    assert torch.isfinite(load_file(calm / "model.safetensors")["model.norm.weight"]).all()


ASKS = {"cosine_with_min_lr": {"min_lr_rate": 0.5}, "warmup_stable_decay": {"num_decay_steps": 4}}


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_and_ends_as_its_name_says(scheduler, calm, facts, tmp_path):
    extra = {"lr_scheduler_kwargs": ASKS[scheduler]} if scheduler in ASKS else {}
    told = {"scheduler": scheduler, "warmup_ratio": 0.25, "learning_rate": 1e-3, "epochs": 2, "extra": extra}
    train(calm, facts, tmp_path, **EXACT, **told)
    rates = [line["lr"] for line in metrics_of(tmp_path)]
    assert len(rates) == 12
    assert rates[0] < rates[1] < rates[2] < 1e-3 == pytest.approx(max(rates))
    last = {"constant": 1e-3, "cosine_with_min_lr": 5e-4, "inverse_sqrt": 5e-4}.get(scheduler, 0.0)
    assert rates[-1] == pytest.approx(last, abs=3e-4)


@pytest.mark.parametrize("scheduler", ASKS)
def test_a_schedule_that_asks_for_more_says_so(scheduler):
    word = next(iter(ASKS[scheduler]))
    with pytest.raises(UserError, match=rf"^training.scheduler: scheduler {scheduler} needs .*{word}.*; set extra: "):
        SftSettings(scheduler=scheduler)
    SftSettings(scheduler=scheduler, extra={"lr_scheduler_kwargs": ASKS[scheduler]})


def test_dft_weighs_each_token_with_its_own_probability_and_held_out_rows_are_read_as_ever(calm, facts, tmp_path):
    told = {**EXACT, "batch_size": 32, "held_out": 0.2, "learning_rate": 1e-9}
    for name, extra in (("nll", {}), ("dft", {"loss_type": "dft"})):
        train(calm, facts, tmp_path / name, extra=extra, **told)
    plain, weighed = (metrics_of(tmp_path / name) for name in ("nll", "dft"))
    assert plain[0]["held_out"] == weighed[0]["held_out"]
    assert plain[1]["tokens"] == weighed[1]["tokens"]
    rows = [json.loads(line) for line in (facts / "rows.jsonl").read_text().splitlines()]
    held = held_out_rows(rows, 0.2, str(facts))
    made = tokenise([row for at, row in enumerate(rows) if at not in held], tiny_tokenizer(), 64)
    model = AutoModelForCausalLM.from_pretrained(calm, dtype=torch.float32)
    sums = np.zeros(3)
    for ids, labels in zip(made.ids, made.labels, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor(ids[None])).logits.log_softmax(-1)[0, :-1]
        answer = torch.tensor(labels[1:] != IGNORED)
        own = logps[answer].gather(1, torch.tensor(ids[1:]).long()[answer, None])[:, 0]
        sums += [-float(own.sum()), -float((own * own.exp()).sum()), len(own)]
    assert plain[1]["loss"] == pytest.approx(sums[0] / sums[2], rel=1e-4)
    assert weighed[1]["loss"] == pytest.approx(sums[1] / sums[2], rel=1e-4)


def test_offloading_activations_without_a_cuda_device_is_refused_by_name(calm, facts, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(UserError, match=r"^training.extra.activation_offloading: .*there is none; leave it out"):
        train(calm, facts, tmp_path, extra={"activation_offloading": True})


@pytest.mark.parametrize(("key", "names"), [("scheduler", SCHEDULES), ("optimizer", OPTIMIZERS)])
def test_a_recipe_may_name_what_training_knows_and_nothing_else(key, names):
    assert get_args(Training.model_fields[key].annotation) == tuple(names)


def test_an_eight_bit_optimiser_knows_nothing_of_an_earlier_training_at_the_same_address():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    for expected, forget in ((torch.float32, False), (torch.uint8, True)):
        manager.override_config(weight, "optim_bits", 32)  # as for an embedding that was there once
        if forget:
            forget_overrides()
        optimizer = bitsandbytes.optim.AdamW8bit([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["state1"].dtype == expected
