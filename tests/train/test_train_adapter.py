"""Adapters are trained by PEFT beside a frozen base, kept, and folded in exactly."""

import json
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import FACTS, metrics_of, same, tiny_model, train, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixmerge.errors import UserError
from mixmerge.train.adapter import FOLDER
from mixmerge.train.fit import stored_dtype
from mixmerge.train.settings import Adapter, DpoSettings, SftSettings, settings_from

LORA = {"type": "lora", "r": 4, "alpha": 8.0}
KINDS = {
    "lora": LORA,
    "dora": LORA | {"type": "dora"},
    "rslora": LORA | {"use_rslora": True},
    "two modules": LORA | {"targets": ["q_proj", "down_proj"]},
    "dropout": LORA | {"dropout": 0.2},
}
ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def module_of(name):
    return name.removesuffix(".weight").rpartition(".")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_folder_is_what_peft_computes_with_the_adapter_that_is_kept(kind, llama, facts, tmp_path):
    train(llama, facts, tmp_path, epochs=3, adapter=KINDS[kind], save_dtype="float32", precision="fp32")
    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = base(ids).logits
    wrapped = PeftModel.from_pretrained(base, tmp_path / "out" / FOLDER).eval()
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = wrapped(ids).logits, folded(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01, "it learnt something"


@pytest.mark.parametrize("kind", ["lora", "dora", "two modules"])
def test_weights_that_no_adapter_reaches_are_the_bases_bit_for_bit(kind, llama, facts, tmp_path):
    train(llama, facts, tmp_path, adapter=KINDS[kind], learning_rate=0.1, epochs=2)
    before, after = load_file(llama / "model.safetensors"), weights(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    targets = set(KINDS[kind].get("targets", ADAPTED))
    for name in before:
        assert torch.equal(before[name], after[name]) == (module_of(name) not in targets), name


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_folder_holds_a_whole_model_and_the_adapter_and_says_nothing_of_this_machine(
    method, gemma, facts, choices, tmp_path
):
    train(gemma, facts if method == "sft" else choices, tmp_path, method=method, adapter=LORA)
    out = tmp_path / "out"
    kept = {file.name for file in (out / FOLDER).iterdir()}
    assert kept == {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in out.iterdir()} == {file.name for file in gemma.iterdir()} | {"metrics.jsonl", FOLDER}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (gemma / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((gemma / "config.json").read_text())
    settings = json.loads((out / FOLDER / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8.0, None)
    assert str(tmp_path) not in (out / FOLDER / "adapter_config.json").read_text()
    assert not (tmp_path / "work" / "fold").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_adapter_learns_a_small_mixture_and_the_folded_model_answers(precision, facts, tmp_path):
    measured = train(
        # A frozen output layer of usual random size could say nothing clearly, whatever is learnt below it.
        tiny_model(tmp_path / "base", initializer_range=0.3),
        facts,
        tmp_path,
        epochs=25,
        learning_rate=2e-2,
        precision=precision,
        adapter={"r": 16, "targets": sorted(ADAPTED)},
        save_dtype="float32",
    )
    assert measured["last_loss"] < 0.6 * measured["first_loss"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    likelier = 0
    for thing, answer in FACTS:
        chat = [{"role": "user", "content": f"what is the colour of {thing}"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        losses = []
        for said in (answer, "red red red"):
            whole = torch.tensor(tokenizer(prompt + said)["input_ids"])
            labels = whole.clone()
            labels[: len(tokenizer(prompt)["input_ids"])] = -100
            with torch.no_grad():
                losses.append(float(model(whole[None], labels=labels[None]).loss))
        likelier += losses[0] < losses[1]
    assert likelier >= 3


def test_preferences_are_learnt_through_an_adapter_whose_base_is_the_reference(llama, choices, tmp_path):
    measured = train(llama, choices, tmp_path, method="dpo", epochs=20, learning_rate=2e-2, adapter=LORA)
    first = metrics_of(tmp_path)[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4), "an adapter begins as nothing"
    assert measured["last_margin"] > measured["first_margin"]
    assert measured["last_loss"] < measured["first_loss"]


def test_the_same_adapter_training_gives_the_same_bytes_and_another_seed_others(llama, facts, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(llama, facts, tmp_path / name, seed=seed, adapter=KINDS["dropout"], save_dtype="float32")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        one, two = ((tmp_path / name / "out" / FOLDER / file).read_bytes() for name in "ab")
        assert one == two


def test_tied_embeddings_stay_tied_under_an_adapter(facts, tmp_path):
    base = tiny_model(tmp_path / "base", tie_word_embeddings=True)
    train(base, facts, tmp_path, adapter=LORA)
    assert "lm_head.weight" not in weights(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_folder_whose_name_holds_a_plus_can_be_trained_from_and_into(facts, tmp_path):
    base = tiny_model(tmp_path / "a+b")
    train(base, facts, tmp_path / "c+d", adapter=LORA)
    assert not same(load_file(base / "model.safetensors"), weights(tmp_path / "c+d"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_folded_model_is_stored_in_the_dtype_of_the_base(dtype, facts, tmp_path):
    base = tiny_model(tmp_path / "base", dtype=dtype)
    train(base, facts, tmp_path, epochs=0.2, adapter=LORA)
    assert stored_dtype(tmp_path / "out") == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("targets", [["q_projection"], ["lm_head"]])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_targets_that_cannot_be_are_refused_with_those_that_can(targets, method, llama, facts, choices, tmp_path):
    with pytest.raises(UserError) as caught:
        train(llama, facts if method == "sft" else choices, tmp_path, method=method, adapter={"targets": targets})
    said = str(caught.value)
    assert said.startswith("training.adapter.targets: ")
    assert targets[0] in said
    assert said.endswith("known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert "\n" not in said


def test_qlora_without_its_library_is_refused_before_anything_is_read(llama, facts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"qlora needs the package bitsandbytes, which is not installed; install it: pip install "
    ):
        train(llama, facts, tmp_path, adapter={"type": "qlora"})
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_qlora_learns_beside_four_bits_and_is_folded_into_the_base_as_it_was(method, facts, choices, tmp_path):
    base = tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    mixture = facts if method == "sft" else choices
    told = {"method": method, "epochs": 6, "adapter": LORA | {"type": "qlora"}, "checkpoint_every": 4}
    trained = train(base, mixture, tmp_path / "whole", **told)
    learnt = trained["last_loss"] / trained["first_loss"]
    assert learnt < 0.97
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "whole")
    assert all(torch.equal(before[name], after[name]) == (module_of(name) not in ADAPTED) for name in before)
    kept = load_file(tmp_path / "whole/out" / FOLDER / "adapter_model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    settings = json.loads((tmp_path / "whole/out/config.json").read_text())
    assert "quantization_config" not in settings

    def stop(done, _):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, mixture, tmp_path / "broken", stop, **told)
    train(base, mixture, tmp_path / "broken", **told)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "loha"},
        {"r": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"targets": ()},
        {"targets": "all"},
    ],
)
def test_an_adapter_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"adapter.{next(iter(wrong))} cannot be"):
        Adapter(**wrong)


def test_dropout_of_an_adapter_under_dpo_is_refused_for_it_would_do_nothing():
    with pytest.raises(UserError, match=r"adapter\.dropout has no effect with method: dpo"):
        DpoSettings(adapter=Adapter(dropout=0.1))
    assert SftSettings(adapter=Adapter(dropout=0.1)).adapter


def test_what_a_step_says_of_an_adapter_becomes_its_settings():
    made = settings_from({"method": "dpo", "adapter": {"type": "dora", "targets": ["q_proj"]}}).adapter
    assert made == Adapter("dora", targets=("q_proj",))
    assert settings_from({"method": "sft", "adapter": None}).adapter is None
