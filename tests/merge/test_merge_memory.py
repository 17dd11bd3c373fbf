"""State dicts in memory: the numbers of the same merge on disk, also into the parameters of a loaded model."""

import pytest
import torch
from model_folders import EXAMPLE, example, read_model, same_bits, write_model

from mixmerge.errors import ModelError, RecipeError
from mixmerge.merge import METHODS, merge, merge_state_dicts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    floats = {"embed.w": torch.randn(30, 20, generator=draw), "layers.0.w": torch.randn(17, generator=draw)}
    return {name: tensor.to(dtype) for name, tensor in floats.items()} | {"step": torch.tensor(3)}


def config_of(method, **top):
    spec = METHODS[method]
    parameters = {name: EXAMPLE[name] for name in spec.parameters if name in EXAMPLE}
    models = [{"model": name} for name in ("a", "b")][: spec.inputs[1]]
    base = {} if spec.base == "none" else {"base_model": "base"}
    return {"merge_method": method, "models": models, "parameters": parameters, **base, **top}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_the_same_merge_on_disk(method, dtype, tmp_path):
    models = {name: drawn(seed, dtype) for seed, name in enumerate(("base", "a", "b"))}
    folders = [write_model(tmp_path / name, tensors) for name, tensors in models.items()]
    merge(example(method, folders, seed=4), tmp_path / "out")
    found, expected = merge_state_dicts(models, config_of(method, seed=4)), read_model(tmp_path / "out")
    assert list(found) == list(models["a"])
    assert found.keys() == expected.keys()
    for name in ("embed.w", "layers.0.w"):
        assert same_bits(found[name], expected[name]), name
    assert found["step"] == 3


def test_a_loaded_model_is_filled_in_place_and_runs(tiny_models):
    from transformers import AutoModelForCausalLM

    base, a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in tiny_models("llama"))
    models = {"base": base.state_dict(), "a": a.state_dict(), "b": b.state_dict()}
    expected = merge_state_dicts(models, config_of("ties"))
    places = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    found = merge_state_dicts(models, config_of("ties"), into=base.state_dict())  # the target is an input, too
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == places
    for name, parameter in base.named_parameters():
        assert same_bits(parameter.detach(), expected[name])
        assert same_bits(found[name], expected[name])
    assert torch.isfinite(base(torch.tensor([[1, 2, 3]])).logits).all()


def test_tensors_that_are_not_contiguous_are_read_and_filled():
    models = {name: {"w": torch.randn(6, 9).T} for name in "ab"}
    target = {"w": torch.zeros(6, 9).T}
    config = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    merge_state_dicts(models, config, into=target)
    torch.testing.assert_close(target["w"], (models["a"]["w"] + models["b"]["w"]) / 2)


def test_the_inputs_are_left_as_they_are():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    before = {name: {key: tensor.clone() for key, tensor in model.items()} for name, model in models.items()}
    merge_state_dicts(models, config_of("dare_ties"), threads=2)
    for name, model in models.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.items())


def test_a_chosen_dtype_is_that_of_the_result():
    models = {name: drawn(seed) for seed, name in enumerate("ab")}
    found = merge_state_dicts(models, config_of("linear", out_dtype="bfloat16"))
    assert found["embed.w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"models": [{"model": "a"}, {"model": "bb"}]}, RecipeError, "there is no state dict 'bb'; did you mean 'b'"),
        ({"merge_method": "tis"}, RecipeError, "did you mean 'ties'"),
        ({"tokenizer_source": "base"}, RecipeError, "state dicts are merged whole"),
        ({"tokenizer": {"source": "union"}}, RecipeError, "state dicts are merged whole"),
        ({"chat_template": "chatml"}, RecipeError, "state dicts are merged whole"),
    ],
)
def test_a_configuration_that_cannot_hold_is_refused(change, error, what):
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    with pytest.raises(error, match=what):
        merge_state_dicts(models, config_of("ties") | change)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    target = {name: torch.zeros_like(tensor) for name, tensor in models["base"].items()}
    for change, what in (
        ({"embed.w": torch.zeros(30, 21)}, r"is F32 \[30, 21\], the result F32 \[30, 20\]"),
        ({"embed.w": torch.zeros(30, 20).half()}, r"is F16 \[30, 20\], the result F32"),
        ({"embed.w": torch.zeros(30, 20, dtype=torch.complex64)}, "which cannot be merged or copied"),
    ):
        with pytest.raises(ModelError, match=what):
            merge_state_dicts(models, config_of("ties"), into=target | change)
    with pytest.raises(ModelError, match=r"no tensor 'layers.0.w' to merge into"):
        merge_state_dicts(models, config_of("ties"), into={"embed.w": target["embed.w"], "step": target["step"]})
    models["b"]["embed.w"] = torch.zeros(2, 2)
    with pytest.raises(ModelError, match=r"tensor 'embed.w' has shape \[30, 20\] in 'base' and \[2, 2\] in 'b'"):
        merge_state_dicts(models, config_of("ties"), into=target)
    assert not any(tensor.any() for tensor in target.values())


def test_a_nan_is_named_with_its_model():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    models["a"]["layers.0.w"][3] = float("nan")
    with pytest.raises(ModelError, match=r"a: tensor 'layers.0.w' holds NaN or infinity"):
        merge_state_dicts(models, config_of("ties"))
