"""Tiny random models of real architectures, saved by transformers in bf16: a base and two that drifted from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    made: dict[str, list[Path]] = {}

    def models(architecture: str) -> list[Path]:
        if architecture not in made:
            made[architecture] = _make(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return models


def _make(architecture: str, root: Path) -> list[Path]:
    import torch

    torch.manual_seed(0)
    model = _random(architecture).to(torch.bfloat16)
    folders = []
    for name in ("base", "first", "second"):
        model.save_pretrained(root / name)
        folders.append(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return folders


def _random(architecture: str) -> Any:
    """A random model of three layers (per stack, where it has several)."""
    import transformers as t

    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    size |= ends | {"num_key_value_heads": 1}
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    gpt2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    t5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 3}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32, "model_type": "clip_vision_model"}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**size, tie_word_embeddings=False),
        "llama_tied": lambda: t.LlamaConfig(**size, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**size),
        "qwen3": lambda: t.Qwen3Config(**size, head_dim=16),
        "gemma3": lambda: t.Gemma3TextConfig(**size, head_dim=16, layer_types=alternating),
        "mistral": lambda: t.MistralConfig(**size),
        "phi3": lambda: t.Phi3Config(**size),
        "gpt2": lambda: t.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2),
        "mixtral": lambda: t.MixtralConfig(**size, num_local_experts=3, num_experts_per_tok=2),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **size, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, mlp_only_layers=[0]
        ),
        "cohere": lambda: t.CohereConfig(**size),
        "t5": lambda: t.T5Config(**t5, num_decoder_layers=3, decoder_start_token_id=0, eos_token_id=2),
        "llava": lambda: t.LlavaConfig(
            vision_config=vision, text_config=size | {"model_type": "llama"}, image_token_index=95, image_seq_length=4
        ),
    }
    made = {"t5": t.AutoModelForSeq2SeqLM, "llava": t.AutoModelForImageTextToText}
    return made.get(architecture, t.AutoModelForCausalLM).from_config(configs[architecture]())
