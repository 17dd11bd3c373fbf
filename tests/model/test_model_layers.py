"""The modules that an adapter can be trained on, told from the names in a model's files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mixmerge.model.layers import nearest_target, packaged_modules, unmatched_target, weighted_modules
from mixmerge.model.package import PACKAGES

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def last(modules):
    return {name.rpartition(".")[2] for name in modules}


def test_the_modules_of_a_folder_are_those_that_a_network_has_but_for_the_output(tiny_base):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_base)
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    found = weighted_modules(tiny_base)
    assert found - {"model.embed_tokens"} == linear - {"lm_head"}
    assert last(found) == LINEAR | {"embed_tokens"}


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "phi3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "pad_token_id": 0,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_may_be_named_shortly_or_in_whole(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **FAMILIES[family]))
    network.save_pretrained(tmp_path)
    modules, head = weighted_modules(tmp_path), network.get_output_embeddings()
    linear = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    assert unmatched_target(linear, modules) is None
    assert unmatched_target(sorted(last(linear)), modules) is None
    assert unmatched_target(["lm_head"], modules) == "lm_head"


def test_the_modules_of_a_package_are_those_that_transformers_gives_its_model():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    (name,) = PACKAGES
    config = Gemma3TextConfig(**PACKAGES[name].config)
    with torch.device("meta"):
        network = Gemma3ForCausalLM(config)
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packaged_modules(name) == packaged_modules(name.replace("-", "_")) == linear - {"lm_head"}
    assert packaged_modules("another-package") is None


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_nothing_is_known_where_transformers_renames_what_it_loads(tmp_path, kind):
    save_file({"model.layers.0.mlp.w1.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert weighted_modules(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert weighted_modules(tmp_path) == {"model.layers.0.mlp.w1"}


MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.embed_tokens",
    "h.0.attn.c_attn",
]


@pytest.mark.parametrize(
    "target",
    [
        *("q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "1.self_attn.q_proj", "embed_tokens"),
        *("c_attn", "transformer.h.0.attn.c_attn"),
    ],
)
def test_a_target_names_a_module_by_its_last_parts_or_in_whole(target):
    assert unmatched_target([target], MODULES) is None


@pytest.mark.parametrize(
    "target", ["q_pro", "proj", "self_attn", "model.layers", "model.layers.7.self_attn.q_proj", "*"]
)
def test_a_target_that_names_a_part_of_a_word_a_block_or_nothing_is_found(target):
    assert unmatched_target(["q_proj", target], MODULES) == target


def test_a_start_with_other_layers_may_have_other_numbers():
    target = ["model.layers.7.self_attn.q_proj"]
    assert unmatched_target(target, MODULES, restacked=True) is None
    assert unmatched_target(["model.layers.7.self_attn.p_proj"], MODULES, restacked=True) is not None


def test_advice_is_the_nearest_linear_layer_or_all_of_them():
    assert nearest_target("q_projection", MODULES) == "did you mean 'q_proj'?"
    assert nearest_target("model.layers.0.self_attn.q_prj", MODULES) == "did you mean 'q_proj'?"
    assert nearest_target("xyz", MODULES) == "known: c_attn, q_proj"
