"""The memory of a training, from its shape: arithmetic that can be done by hand, and what torch really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixmerge.plan.memory import memory_lines, plan_memory
from mixmerge.train.memory import MOMENTS, Shape, lora_weights, shape_of, training_memory
from mixmerge.train.settings import OPTIMIZERS

SMALL = Shape(parameters=1000, layers=4, hidden=8, inner=32, vocabulary=100)


def test_weights_gradients_and_moments_are_sixteen_bytes_a_weight():
    found = training_memory(SMALL, rows=1, length=1, half=False)
    assert (found.weights, found.gradients, found.optimiser) == (4000, 4000, 8000)
    assert training_memory(SMALL, rows=1, length=1, half=True).weights == 6000
    assert found.total == 16000 + found.activations + found.logits


def test_activations_grow_with_tokens_and_layers_and_halve_in_half_precision():
    one = training_memory(SMALL, rows=2, length=10, half=False)
    assert training_memory(SMALL, rows=4, length=10, half=False).activations == 2 * one.activations
    assert training_memory(SMALL, rows=2, length=20, half=False).activations == 2 * one.activations
    assert training_memory(replace(SMALL, layers=8), rows=2, length=10, half=False).activations == 2 * one.activations
    assert training_memory(SMALL, rows=2, length=10, half=True).activations * 2 == one.activations
    assert one.logits == 2 * 4 * 20 * 100


def test_checkpointing_keeps_the_borders_and_one_layer():
    plain = training_memory(SMALL, rows=2, length=10, half=False)
    kept = training_memory(SMALL, rows=2, length=10, half=False, checkpointing=True)
    assert kept.activations == 4 * (20 * 8 * 4) + plain.activations // 4
    assert replace(kept, activations=0) == replace(plain, activations=0)


def test_an_adapter_trains_few_weights_beside_the_frozen_ones():
    full = training_memory(SMALL, rows=1, length=1, half=False)
    adapted = training_memory(SMALL, rows=1, length=1, half=False, trained=50)
    assert (adapted.weights, adapted.gradients, adapted.optimiser) == (4200, 200, 400)
    assert adapted.activations == full.activations
    assert training_memory(SMALL, rows=1, length=1, half=True, trained=50).weights == 2 * 1000 + 6 * 50
    packed = training_memory(SMALL, rows=1, length=1, half=True, trained=50, four_bits=True)
    assert packed.weights == 2 * 800 + 200 // 2 + 6 * 50, "the 100 x 8 of the embeddings stay as they are"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimiser_holds_what_torch_says_it_does(optimizer: str):
    from transformers import Trainer, TrainingArguments

    from mixmerge.train.trainer import forget_overrides

    forget_overrides()
    layer = torch.nn.Linear(256, 256, bias=False)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(output_dir="unused", optim=OPTIMIZERS[optimizer], use_cpu=True)
    )
    made = kind(layer.parameters(), **options)
    layer(torch.ones(1, 256)).sum().backward()
    made.step()
    state = made.state[layer.weight].values()
    held = sum(value.numel() * value.itemsize for value in state if torch.is_tensor(value) and value.numel() > 1)
    assert MOMENTS[optimizer] == held // layer.weight.numel()
    assert lora_weights(SMALL, rank=2, modules=3) == 4 * 3 * 2 * (8 + 20)


def test_the_shape_of_a_folder_is_read_from_its_headers(tiny_base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(tiny_base), shape_of(tiny_base)
    config = model.config
    assert found is not None
    assert found.parameters == model.num_parameters()
    assert (found.layers, found.hidden) == (config.num_hidden_layers, config.hidden_size)
    assert (found.inner, found.vocabulary) == (config.intermediate_size, config.vocab_size)
    assert shape_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    (tmp_path / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    assert shape_of(tmp_path) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_what_autograd_keeps_within_a_half(checkpointing: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(64, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
        held = sum(kept.values())
        loss.backward()
    shape = Shape(model.num_parameters(), 6, 96, 256, 64)
    estimate = training_memory(shape, rows=4, length=64, half=False, checkpointing=checkpointing)
    layer = (
        estimate.activations - 6 * 4 * 64 * 96 * 4 if checkpointing else 0
    )  # it is computed in the backward pass only
    assert 0.5 < held / (estimate.activations - layer + estimate.logits) < 1.5


def test_a_plan_tells_the_memory_of_each_training_that_is_left(study, planned):
    plan = planned("baselines.mix.training={batch_size: 8}")
    found = plan_memory(plan, lambda _: None)
    assert set(found) == {plan.models["general"], plan.models["mix"]}
    few, many = found[plan.models["general"]], found[plan.models["mix"]]
    assert many.activations == 4 * few.activations
    assert (many.weights, many.optimiser) == (few.weights, few.optimiser)
    lines = list(memory_lines(plan, found))
    assert [line.split(":")[0] for line in lines] == ["memory to train general", "memory to train mix"]
    assert "about 0.0 GB (weights 0.0, gradients 0.0, optimiser 0.0, activations 0.0, logits 0.0)" in lines[0]
    assert len(list(memory_lines(planned(), plan_memory(planned(), lambda _: None)))) == 1


def test_pairs_count_twice_and_adapters_train_little(study, planned):
    plan = planned("experts.general={mixture: safety, training: {method: dpo, adapter: {r: 2}}}")
    found = plan_memory(plan, lambda _: None)
    dpo, full = found[plan.models["general"]], found[plan.models["mix"]]
    assert dpo.activations == 2 * full.activations
    assert dpo.gradients < full.gradients / 2


def test_a_base_that_is_not_there_yet_or_a_command_has_no_estimate(planned, tmp_path):
    command = "experts.general.training={engine: command, command: 'x {model} {mixture} {out}'}"
    plan = planned(command)
    assert set(plan_memory(plan, lambda _: None)) == {plan.models["mix"]}
    assert plan_memory(plan, lambda _: tmp_path) == {}


def test_the_plan_on_the_command_line_tells_the_memory_and_what_can_be_detected(study, mixmerge):
    status, out, _ = mixmerge("plan", study.recipe, "--out", study.out)
    assert status == 0
    memory, detectable, time_left = out.splitlines()[32:35]
    assert memory.startswith("memory to train general, mix: about ")
    assert detectable.startswith("detectable between two candidates, in points, with 80 % power at 95 %: win rate ")
    assert time_left.startswith("time left: about ")
    told = json.loads(mixmerge("plan", study.recipe, "--json", "--out", study.out)[1])
    trained = [step for step in told["steps"] if step["kind"] == "train"]
    assert all(step["memory_bytes"]["weights"] > 0 for step in trained)
    assert sum("memory_bytes" in step for step in told["steps"]) == len(trained)
