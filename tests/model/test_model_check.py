"""A base whose configuration and weights do not belong together is refused, and never trained on weights drawn at random."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge.errors import ModelError
from mixmerge.merge.checkpoint import read_header
from mixmerge.model import check
from mixmerge.model.check import check_model
from mixmerge.model.loading import load_pretrained


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def say(model: Path, **changed: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_a_whole_model_passes_and_loads(model: Path) -> None:
    check_model(model)
    assert load_pretrained("AutoModelForCausalLM", model).num_parameters() > 1000


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"num_hidden_layers": 7}, r"config.json: it says 7 layers, and the weights have \d"),
        ({"num_hidden_layers": "two"}, r"config.json: it says 'two' layers"),
        ({"hidden_size": 999}, r"it says a width of 999, and 'model.embed_tokens.weight' has shape \[\d+, \d+\]"),
    ],
)
def test_other_layers_or_another_width_than_the_weights_have_are_refused(
    model: Path, changed: dict[str, object], what: str
) -> None:
    say(model, **changed)
    with pytest.raises(ModelError, match=what):
        check_model(model)


def test_weights_that_the_library_would_draw_at_random_are_refused(model: Path) -> None:
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    say(model, num_hidden_layers=layers + 1)
    missing = rf"weights that config.json describes are missing: \d+, 'model.layers.{layers}\."
    with pytest.raises(ModelError, match=missing):
        load_pretrained("AutoModelForCausalLM", model)


def test_weights_of_another_shape_are_named_with_both(model: Path) -> None:
    size = json.loads((model / "config.json").read_text())["intermediate_size"]
    say(model, intermediate_size=size * 2)
    with pytest.raises(ModelError, match=rf"has shape \[.*{size}.*\] where config.json describes \[.*{size * 2}"):
        load_pretrained("AutoModelForCausalLM", model)


def test_weights_that_the_configuration_does_not_describe_are_refused_and_not_lost(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # old versions stored it
    save_file(tensors | buffer, model / "model.safetensors", metadata={"format": "pt"})
    load_pretrained("AutoModelForCausalLM", model)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(len(tensors["model.layers.0.self_attn.q_proj.weight"]))}
    save_file(tensors | bias, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not describe: 1, 'model.layers.0.self_attn.q_proj.bias'"):
        load_pretrained("AutoModelForCausalLM", model)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32"]
)
def test_a_nan_or_infinity_is_found_in_every_kind_of_float_and_large_numbers_are_none(tmp_path, dtype, monkeypatch):
    kind = getattr(torch, dtype)
    most = torch.finfo(kind).max if kind.is_floating_point else torch.iinfo(kind).max
    file = tmp_path / "model.safetensors"
    fine = torch.tensor([0.0, -0.0, 1.0, most, -most] if kind.is_floating_point else [0, most, -1], dtype=kind)
    monkeypatch.setattr(check, "_STRETCH", 2)
    save_file({"a": fine, "b": fine.clone()}, file)
    assert check.first_unusable(read_header(file)) is None
    for bad in (float("nan"), float("inf"), float("-inf")) if kind.is_floating_point else ():
        spoilt = torch.cat([fine, torch.tensor([bad], dtype=kind)])
        if dtype == "float8_e4m3fn":  # has no infinity
            spoilt = torch.cat([fine, torch.tensor([0x7F], dtype=torch.uint8).view(kind)])
        save_file({"a": fine, "b": spoilt}, file)
        assert check.first_unusable(read_header(file)) == "b"
