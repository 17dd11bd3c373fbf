"""The memory of a training, from its shape: arithmetic that can be done by hand, and what torch really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixmerge.plan.memory import Shape, lora_weights, shape_of, training_memory

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
