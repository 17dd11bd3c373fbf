"""The oracle, where MIXMERGE_ORACLE names its mergekit-yaml (`make parity` makes one), and small Llamas to merge."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from model_folders import write_model
from oracle import Models, Oracle

HIDDEN, INNER, LAYERS, VOCABULARY = 32, 48, 3, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    named = os.environ.get("MIXMERGE_ORACLE")
    if not named:
        pytest.skip("no oracle: `make parity` makes one, or set MIXMERGE_ORACLE to a mergekit-yaml")
    assert Path(named).is_file(), f"MIXMERGE_ORACLE names no file: {named}"
    asked = Oracle(Path(named), tmp_path_factory.mktemp("oracle"))
    yield asked
    asked.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """float32: a base, three fine-tunes a, b, c of it, and two models x, y that have nothing to do with it."""
    base = llama(0)
    tensors = {"base": base, "x": llama(8), "y": llama(9)}
    tensors |= {name: tuned(base, seed) for seed, name in enumerate("abc", start=1)}
    return save(tmp_path_factory.mktemp("float32"), tensors)


@pytest.fixture(scope="session")
def bf16_models(tmp_path_factory):
    """bfloat16: a base and three fine-tunes of it."""
    base = llama(0)
    tensors = {"base": base} | {name: tuned(base, seed) for seed, name in enumerate("abc", start=1)}
    rounded = {name: {key: t.bfloat16() for key, t in model.items()} for name, model in tensors.items()}
    return save(tmp_path_factory.mktemp("bfloat16"), rounded)


@pytest.fixture
def place(tmp_path):
    """Saves models of other tensors of the same shapes."""
    return lambda tensors, **config: save(tmp_path / "models", tensors, **config)


def save(root, tensors, **config):
    told = CONFIG | config
    return Models({name: write_model(root / name, model, **told) for name, model in tensors.items()}, tensors)


def shapes():
    kv = HIDDEN // 2
    inside = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    found |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in inside.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def llama(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes().items()}


def tuned(base, seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: tensor + torch.randn(tensor.shape, generator=draw) * 0.02 for name, tensor in base.items()}
