"""Prompts read in passes of their own, rows that take each other's places, and weights laid out for this CPU's products."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmerge.evaluate.decoding import decode, reads_apart
from mixmerge.evaluate.packed import pack_linears

WIDE = (0, 10**6)  # passes that cost nothing: one for each length


def tiny(kind: str, folder: Path) -> Any:
    """A random model in float32 that says something else at every step, as transformers loads it."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, LlamaConfig

    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.6,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config: Any = {
        "full": lambda: LlamaConfig(**shape),
        # tied weights repeat the prompt's last token
        "window": lambda: Gemma3TextConfig(
            **shape,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            tie_word_embeddings=False,
        ),
        "tied": lambda: LlamaConfig(**shape, tie_word_embeddings=True),
        "convolution": lambda: Lfm2Config(**shape, layer_types=["conv", "full_attention"] * 2),
    }[kind]()
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts(count: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(5)
    return [torch.randint(2, 64, (1 + 7 * i % 23,), generator=drawn).tolist() for i in range(count)]


def plainly(model: Any, asked: list[list[int]], ends: set[int], budget: int) -> list[list[int]]:
    """One prompt at a time, through transformers."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=budget, eos_token_id=sorted(ends), pad_token_id=0)
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found.append(said[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("passes", [None, WIDE, (40, 60), (10**6, 10**6)])
def test_prompts_read_apart_or_together_are_answered_as_transformers_answers_each(
    kind: str, passes: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Rows end at many lengths, so that rows from behind take their places; windows are shorter than prompts."""
    model, asked = tiny(kind, tmp_path), prompts(14)
    endless = plainly(model, asked, {1}, 14)
    ends = {1, *(ids[2 + index % 5] for index, ids in enumerate(endless[:6]) if len(ids) > 7)}
    expected = plainly(model, asked, ends, 14)
    assert len({len(ids) for ids in expected}) >= 4, "the responses must end at different lengths"
    assert reads_apart(model, 1)
    assert decode(model, asked, ends, 14, passes) == expected


def test_a_model_whose_cache_is_not_of_attention_alone_is_read_in_one_pass(tmp_path: Path) -> None:
    model = tiny("convolution", tmp_path)
    assert not reads_apart(model, 1)
    # of one length: padding is what such layers cannot be told of
    asked = [[3, 4, 5, 6], [9, 8, 7, 6], [20, 21, 22, 23], [30, 3, 30, 3]]
    endless = plainly(model, asked, {1}, 10)
    ends = {1, endless[0][3], endless[2][5]}
    assert decode(model, asked, ends, 10, None) == plainly(model, asked, ends, 10)


def test_a_budget_of_one_token_needs_no_room_in_the_cache(tmp_path: Path) -> None:
    model, asked = tiny("window", tmp_path), prompts(5)
    assert decode(model, asked, {1}, 1, WIDE) == plainly(model, asked, {1}, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_products_of_plain_ones(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(48, 96, bias=bias), torch.nn.Linear(96, 40, bias=bias)).to(dtype)
    packed = torch.nn.Sequential(*plain)
    weights = [layer.weight.detach().clone() for layer in plain]
    count = pack_linears(packed)
    with torch.inference_mode():
        for shape in ((1, 48), (3, 7, 48), (300, 48)):
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(packed(x), plain(x))
    assert count in (0, 2), "all of them, or none on a machine without such products"
    for layer, weight in zip(packed, weights, strict=True):
        assert torch.equal(layer.weight, weight)


def test_tied_embeddings_and_layers_of_other_kinds_stay_as_they_are(tmp_path: Path) -> None:
    class Own(torch.nn.Linear):
        pass

    model = tiny("tied", tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedded = model.model.embed_tokens.weight.detach().clone()
    model.own = Own(4, 4)
    own = model.own.weight.detach().clone()
    asked = prompts(6)
    before = plainly(model, asked, {1}, 8)
    pack_linears(model)
    assert torch.equal(model.model.embed_tokens.weight, embedded)
    assert type(model.own) is Own
    assert torch.equal(model.own.weight, own)
    assert plainly(model, asked, {1}, 8) == before


def test_an_engine_on_packed_weights_says_what_plain_weights_say(tiny_base: Path, tmp_path: Path) -> None:
    """The tiny model in float32, with large matrices; its plain twin is loaded by transformers and nothing else."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from mixmerge.evaluate.transformers_engine import TransformersEngine

    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    file = folder / "model.safetensors"
    tensors = {name: t.float() * (8 if t.dim() == 2 else 1) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    engine = TransformersEngine(folder, threads=1, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = engine._encode([f"{'why ' * (index * 5 % 17)}{index}?" for index in range(10)])
    assert engine._decode(asked, 10) == plainly(plain, asked, set(engine.eos), 10)
