"""Preferences are learnt by TRL's DPO from a start that is its own reference."""

import json
import signal

import numpy as np
import pytest
import torch
from tiny_training import CHATML, metrics_of, run_child, same, tiny_model, tiny_tokenizer, train, weights, write_rows
from transformers import AutoModelForCausalLM

from mixmerge.errors import DataError, StepError, UserError
from mixmerge.train.dpo import REWARDS
from mixmerge.train.fit import read_mixture
from mixmerge.train.pairs import REFERENCE
from mixmerge.train.settings import LOSSES, SMOOTHED, DpoSettings, settings_from
from mixmerge.train.tokens import load_tokenizer, tokenise_pairs

SLOW = {"learning_rate": 1e-3, "precision": "fp32"}


def dpo(*arguments, **settings):
    return train(*arguments, method="dpo", **{**SLOW, **settings})


def answer_logps(folder, rows, side):
    """Log-probabilities of one side's answers under a stored model, in the order of the rows, with no trainer at all."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = tokenise_pairs(rows, load_tokenizer(folder), 64)
    found = []
    for prompt, answer in zip(made.prompts, getattr(made, side), strict=True):
        ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        found.append(sum(float(logps[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
    return np.array(found)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_what_is_preferred_becomes_likelier_than_what_is_not(kind, request, choices, tmp_path):
    base = request.getfixturevalue(kind)
    measured = dpo(base, choices, tmp_path, epochs=16, learning_rate=5e-3, save_dtype="float32")
    lines = metrics_of(tmp_path)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "before the first step no answer is preferred"
    assert abs(lines[0]["rewards/margins"]) < 1e-5
    assert measured["last_loss"] < 0.5 < measured["first_loss"]
    assert measured["last_margin"] > 1 > measured["first_margin"]
    assert lines[-1]["rewards/accuracies"] == 1
    rows, _ = read_mixture(choices, pairs=True)
    gained = {
        side: answer_logps(tmp_path / "out", rows, side) - answer_logps(base, rows, side)
        for side in ("chosen", "rejected")
    }
    assert (gained["chosen"] > gained["rejected"]).mean() > 0.9


def test_the_rewards_of_a_step_are_beta_times_the_log_ratios_to_the_start(llama, choices, tmp_path):
    # At so small a rate the weights after step 1 are those that step 2 saw, so step 2 can be worked out from outside.
    dpo(llama, choices, tmp_path / "one", batch_size=24, epochs=1, warmup_ratio=0.0, save_dtype="float32", beta=0.3)
    dpo(llama, choices, tmp_path / "two", batch_size=24, epochs=2, warmup_ratio=0.0, scheduler="constant", beta=0.3)
    rows, _ = read_mixture(choices, pairs=True)
    trained = tmp_path / "one" / "out"
    ratios = {
        side: answer_logps(trained, rows, side) - answer_logps(llama, rows, side) for side in ("chosen", "rejected")
    }
    second = metrics_of(tmp_path / "two")[1]
    margins = 0.3 * (ratios["chosen"] - ratios["rejected"])
    assert second["rewards/chosen"] == pytest.approx(0.3 * ratios["chosen"].mean(), rel=1e-3)
    assert second["rewards/rejected"] == pytest.approx(0.3 * ratios["rejected"].mean(), rel=1e-3)
    assert second["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-3)
    assert second["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)


def test_a_larger_beta_stays_nearer_to_the_start(llama, choices, tmp_path):
    rows, _ = read_mixture(choices, pairs=True)
    before = answer_logps(llama, rows, "chosen")
    moved = {}
    for beta in (0.05, 5.0):
        dpo(llama, choices, tmp_path / str(beta), epochs=10, beta=beta, save_dtype="float32")
        moved[beta] = np.abs(answer_logps(tmp_path / str(beta) / "out", rows, "chosen") - before).mean()
    assert moved[5.0] < moved[0.05]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_that_is_offered_trains(loss, llama, choices, tmp_path):
    measured = dpo(llama, choices, tmp_path, epochs=0.3, loss=loss, label_smoothing=0.01 if loss in SMOOTHED else 0.0)
    assert measured["steps"] == 2
    assert not same(weights(tmp_path), weights_of(llama))


def weights_of(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def test_metrics_count_both_sides_and_the_pairs_that_did_not_fit(llama, tmp_path):
    long = "blue " * 90
    rows = [("sky", "blue", "red")] * 6
    rows += [("sky", long, "red"), ("sky " * 90, "blue", "red"), ("sky", f"{long} red", f"{long} green")]
    mixture = write_rows(tmp_path / "mix", rows)
    measured = dpo(llama, mixture, tmp_path, epochs=2)
    assert (measured["rows"], measured["truncated_rows"], measured["dropped_rows"]) == (9, 1, 2)
    made = tokenise_pairs(read_mixture(mixture, pairs=True)[0], load_tokenizer(llama), 64)
    both = sum(map(len, made.chosen)) + sum(map(len, made.rejected))
    assert measured["completion_tokens"] == 2 * both
    assert measured["tokens"] == 2 * (both + 2 * sum(map(len, made.prompts)))
    assert measured["steps"] == 4
    lines = metrics_of(tmp_path)
    assert set(lines[0]) == {"step", "loss", "lr", "tokens", "completion_tokens", *REWARDS}
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)


def test_a_pair_is_its_prompt_and_two_answers_with_their_ends():
    tokenizer = tiny_tokenizer()
    row = {
        "prompt": [{"role": "user", "content": "what is the sky"}],
        "completion": [{"role": "assistant", "content": "deep blue"}],
        "rejected": [{"role": "assistant", "content": "red"}],
    }
    made = tokenise_pairs([row], tokenizer, 100)
    assert tokenizer.decode(made.prompts[0]) == "<|im_start|>user\nwhat is the sky<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(made.chosen[0]) == "deep blue<|im_end|>\n"
    assert tokenizer.decode(made.rejected[0]) == "red<|im_end|>\n"
    assert made.lengths == [len(made.prompts[0]) + len(made.chosen[0])]


def test_a_template_that_renders_a_pairs_prompt_differently_is_counted():
    thinking = CHATML.replace("assistant\n' }}{% endif %}", "assistant\nthink' }}{% endif %}")
    row = {
        "prompt": [{"role": "user", "content": "sky"}],
        "completion": [{"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "assistant", "content": "red"}],
    }
    tokenizer = tiny_tokenizer(thinking)
    made = tokenise_pairs([row], tokenizer, 100)
    assert made.diverging == 1
    assert tokenizer.decode(made.chosen[0]) == "blue<|im_end|>\n"


def test_the_model_folder_is_the_starts_in_all_but_its_weights(gemma, choices, tmp_path):
    dpo(gemma, choices, tmp_path)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (gemma / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((gemma / "config.json").read_text())
    assert {file.name for file in out.iterdir()} == {file.name for file in gemma.iterdir()} | {"metrics.jsonl"}


def test_the_same_pairs_give_the_same_weights_and_another_seed_others(llama, choices, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        dpo(llama, choices, tmp_path / name, seed=seed, epochs=2)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_killed_dpo_called_again_ends_with_the_weights_of_an_unbroken_one(llama, choices, tmp_path):
    settings = {**SLOW, "method": "dpo", "epochs": 3}
    assert run_child(llama, choices, tmp_path / "whole", -1, **settings).returncode == 0
    assert run_child(llama, choices, tmp_path / "cut", 11, **settings).returncode == -signal.SIGKILL
    (kept,) = (tmp_path / "cut" / "work").glob(f"{REFERENCE}-*.npz")
    written = kept.stat().st_mtime_ns
    steps = []
    dpo(llama, choices, tmp_path / "cut", lambda done, _: steps.append(done), 4, epochs=3)
    assert steps == list(range(9, 19))
    assert kept.stat().st_mtime_ns == written, "the start is not asked again"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def test_a_damaged_reference_is_taken_anew(llama, choices, tmp_path):
    for name in ("whole", "cut"):
        dpo(llama, choices, tmp_path / name, None, 4)
    (kept,) = (tmp_path / "cut" / "work").glob(f"{REFERENCE}-*.npz")
    kept.write_bytes(kept.read_bytes()[:50])
    (tmp_path / "cut" / "out").rename(tmp_path / "first")
    dpo(llama, choices, tmp_path / "cut", None, 4)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_training_that_lost_its_reference_begins_anew_and_carries_on_from_what_it_does_then(llama, choices, tmp_path):
    settings = {**SLOW, "method": "dpo", "epochs": 3}
    assert run_child(llama, choices, tmp_path / "whole", -1, **settings).returncode == 0
    assert run_child(llama, choices, tmp_path / "cut", 11, **settings).returncode == -signal.SIGKILL
    (kept,) = (tmp_path / "cut" / "work").glob(f"{REFERENCE}-*.npz")
    (checkpoint,) = (tmp_path / "cut" / "work").glob("checkpoint-*")
    kept.unlink()
    again = run_child(llama, choices, tmp_path / "cut", 11, **settings)
    assert again.returncode == -signal.SIGKILL
    assert f"{checkpoint}: the reference that it needs is not there: not carried on from" in again.stderr
    steps = []
    dpo(llama, choices, tmp_path / "cut", lambda done, _: steps.append(done), 4, epochs=3)
    assert steps == list(range(9, 19)), "a checkpoint that was saved twice is whole"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_reference_of_other_settings_is_not_used(llama, choices, tmp_path):
    dpo(llama, choices, tmp_path)
    (first,) = (tmp_path / "work").glob(f"{REFERENCE}-*.npz")
    dpo(llama, choices, tmp_path, seed=5)
    assert len({first, *(tmp_path / "work").glob(f"{REFERENCE}-*.npz")}) == 2


def test_a_start_that_is_broken_is_refused_at_the_first_step(choices, tmp_path):
    from safetensors.torch import save_file

    base = tiny_model(tmp_path / "base")
    tensors = weights_of(base)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match=r"the loss is nan at step 1 of 6; lower the learning rate"):
        dpo(base, choices, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_row_without_rejected_answer_is_named(llama, facts, tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row has no rejected answer; train on it with method: sft"):
        dpo(llama, facts, tmp_path)


def test_pairs_of_which_none_fits_are_refused(llama, choices, tmp_path):
    with pytest.raises(
        DataError, match=r"none of 24 rows has room for an answer within max_length 4; raise max_length"
    ):
        dpo(llama, choices, tmp_path, max_length=4)


def test_pairs_may_be_learnt_from_by_sft_too_which_reads_the_chosen_answers(llama, facts, choices, tmp_path):
    train(llama, choices, tmp_path / "pairs")
    train(llama, facts, tmp_path / "plain")
    assert same(weights(tmp_path / "pairs"), weights(tmp_path / "plain"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0.0},
        {"beta": float("inf")},
        {"loss": "sigmoide"},
        {"label_smoothing": 0.5},
        {"label_smoothing": 0.1},
        {"loss": "exo_pair", "label_smoothing": 0.0},
        {"learning_rate": -1.0},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong):
    with pytest.raises(UserError, match="label_smoothing" if "label_smoothing" in wrong else next(iter(wrong))):
        DpoSettings(**wrong)


def test_a_step_knows_its_method_by_name():
    assert isinstance(settings_from({"method": "dpo", "beta": 0.5}), DpoSettings)
    assert settings_from({"method": "sft"}).method == "sft"
