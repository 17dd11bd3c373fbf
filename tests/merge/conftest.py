"""Tiny random models of real architectures, saved by transformers in bf16: a base and two that drifted from it."""

from collections.abc import Callable
from pathlib import Path

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
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
    )

    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "llama": lambda: LlamaConfig(**size, num_key_value_heads=1, tie_word_embeddings=False),
        "gemma3": lambda: Gemma3TextConfig(**size, num_key_value_heads=1, head_dim=16, pad_token_id=0),
        "gpt2": lambda: GPT2Config(
            vocab_size=96, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }[architecture]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    folders = []
    for name in ("base", "first", "second"):
        model.save_pretrained(root / name)
        folders.append(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return folders
