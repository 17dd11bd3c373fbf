"""Any architecture, by tensor names alone: transformers loads every merge and generates from it."""

import json

import pytest
import torch
from model_folders import config_for, generates, read_model, same_bits

from mixmerge.merge import merge

ARCHITECTURES = ["llama", "llama_tied", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "mixtral", "qwen3_moe"]
ARCHITECTURES += ["cohere", "t5", "llava"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_a_merge_and_generates_from_it(architecture, tiny_models, tmp_path):
    base, a, b = tiny_models(architecture)
    merge(config_for("linear", [a, b], parameters={"weight": 0.5}), tmp_path / "linear")
    ties = config_for("ties", [a, b], base=base, parameters={"weight": 0.5, "density": 0.6})
    merge(ties, tmp_path / "ties", shard_bytes=30_000)
    stored = [read_model(folder) for folder in (a, b, tmp_path / "linear")]
    assert set(stored[0]) == set(stored[2])
    for name, tensor in stored[2].items():
        mean = ((stored[0][name].double() + stored[1][name].double()) / 2).to(torch.bfloat16)
        assert same_bits(tensor, mean), name
    for out in ("linear", "ties"):
        assert generates(tmp_path / out).dtype == torch.bfloat16


def test_a_tied_model_merged_with_a_copy_that_repeats_its_embedding_stays_tied(tiny_models, tmp_path):
    from safetensors.torch import save_file

    _, a, b = tiny_models("llama_tied")
    copy = tmp_path / "copy"
    copy.mkdir()
    tensors = read_model(b)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    (copy / "config.json").write_bytes((b / "config.json").read_bytes())
    for models, name in (([a, copy], "first"), ([copy, a], "last")):
        merge(config_for("linear", models, parameters={"weight": 0.5}), tmp_path / name)
        assert "lm_head.weight" not in read_model(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is True
        model = generates(tmp_path / name)
        assert model.lm_head.weight is model.model.embed_tokens.weight
