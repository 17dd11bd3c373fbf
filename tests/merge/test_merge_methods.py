"""Each method against an independent float64 reference, over real models of several architectures."""

import math

import merge_reference as reference
import numpy as np
import pytest
import torch
from model_folders import config_for, merge_tensors, read_model, write_model

from mixmerge.merge import kernels, merge, tensors
from mixmerge.merge.sparsify import random_words

W = (0.7, 0.4)
REFERENCED = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")


def wide(tensor):
    return tensor.double().numpy().ravel()


def expected(method, name, base, xs, density=0.3):
    if method == "linear":
        return reference.linear(xs, W)
    if method == "slerp":
        return reference.slerp(base, xs[0], 0.4)
    if method == "task_arithmetic":
        return reference.task_arithmetic(base, xs, W, lam=0.9)
    if method == "ties":
        masks = [reference.top_mask(x - base, density) for x in xs]
        return reference.consensus(base, xs, W, masks, normalize=True, rescale=False, lam=0.9)
    masks = [reference.dare_mask(base.size, density, 11, name, i) for i in range(len(xs))]
    return reference.consensus(base, xs, W, masks, normalize=False, rescale=True, lam=0.9)


def settings_for(method):
    """The configuration whose result `expected` computes."""
    if method == "linear":
        return {"per_model": [{"weight": w} for w in W]}
    if method == "slerp":
        return {"parameters": {"t": 0.4}}
    more = {} if method == "task_arithmetic" else {"density": 0.3}
    return {"per_model": [{"weight": w} for w in W], "parameters": {"lambda": 0.9, **more}}


@pytest.mark.parametrize("method", REFERENCED)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_tensor_of_a_real_model_matches_the_reference(architecture, method, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 4096)  # several blocks even in tiny tensors
    base, *inputs = tiny_models(architecture)
    inputs = inputs[:1] if method == "slerp" else inputs
    config = config_for(
        method, inputs, base=None if method == "linear" else base, out_dtype="float32", seed=11, **settings_for(method)
    )
    merge(config, tmp_path / "out", threads=2)
    out, read = read_model(tmp_path / "out"), [read_model(folder) for folder in (base, *inputs)]
    assert out.keys() == read[0].keys()
    for name, tensor in out.items():
        b, *xs = (wide(model[name]) for model in read)
        np.testing.assert_allclose(wide(tensor), expected(method, name, b, xs), rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("method", REFERENCED)
def test_a_bf16_result_is_the_float64_result_rounded(method):
    draw = torch.Generator().manual_seed(5)
    base, *xs = (torch.randn(500, generator=draw).bfloat16() for _ in range(3))
    xs = xs[:1] if method == "slerp" else xs
    chosen = settings_for(method)
    extra = {} if method == "linear" else {"base": base}
    out = merge_tensors(method, xs, seed=11, per_model=chosen.get("per_model"), **chosen.get("parameters", {}), **extra)
    exact = expected(method, "w", wide(base), [wide(x) for x in xs])
    assert out.dtype == torch.bfloat16
    # a sum in another order may lie on the other side of a midpoint between two bfloat16
    below, above = (reference.round_bf16(exact * (1 + e)) for e in (-1e-14, 1e-14))
    assert np.all((wide(out) == below) | (wide(out) == above))


@pytest.mark.parametrize(("normalize", "rescale"), [(True, True), (False, False), (True, False), (False, True)])
def test_normalize_and_rescale_of_ties_do_what_their_formulas_say(normalize, rescale):
    draw = torch.Generator().manual_seed(1)
    base, *xs = (torch.randn(300, generator=draw) for _ in range(4))
    weights = (0.5, 2.0, -0.3)
    flags = {"normalize": normalize, "rescale": rescale}
    out = merge_tensors("ties", xs, base=base, per_model=[{"weight": w} for w in weights], density=0.4, **flags)
    b, *numbers = (wide(x) for x in (base, *xs))
    masks = [reference.top_mask(x - b, 0.4) for x in numbers]
    np.testing.assert_allclose(
        wide(out), reference.consensus(b, numbers, weights, masks, **flags), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trimming_keeps_exactly_k_and_of_equal_magnitudes_the_lowest_index(density, dtype, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 64)
    draw = torch.Generator().manual_seed(3)
    x = (torch.randint(-4, 5, (40, 25), generator=draw) / 8).to(dtype)  # nine values: ties everywhere
    x[0, :5] = torch.tensor([1e-30, -1e-30, 0.3, 3.0, -3.0]).to(dtype)
    kept = merge_tensors("ties", [x], base=torch.zeros_like(x), weight=1, density=density)
    mask = reference.top_mask(wide(x), density)
    assert mask.sum() == max(1, int(density * 1000))
    np.testing.assert_array_equal(wide(kept), np.where(mask, wide(x), 0.0))


def test_density_zero_still_keeps_the_largest_element():
    x = torch.tensor([0.1, -5.0, 2.0])
    assert merge_tensors("ties", [x], base=0 * x, weight=1, density=0).tolist() == [0.0, -5.0, 0.0]


def test_elements_whose_signs_disagree_take_the_side_of_the_larger_sum():
    base = torch.zeros(4)
    xs = [torch.tensor([3.0, -3.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 2.0, -4.0])]
    assert merge_tensors("ties", xs, base=base, weight=1).tolist() == [3.0, -3.0, 1.5, -4.0]


def test_weights_of_both_signs_that_cancel_at_an_element_give_its_plain_sum():
    xs = [torch.tensor([2.0]), torch.tensor([-2.0]), torch.tensor([-1.0])]
    out = merge_tensors("ties", xs, base=torch.zeros(1), per_model=[{"weight": w} for w in (1.0, -1.0, 0.5)])
    assert out.tolist() == [4.0]


def test_slerp_of_a_zero_tensor_is_finite_and_linear():
    x = torch.tensor([1.0, 2.0])
    out = merge_tensors("slerp", [x], base=torch.zeros(2), t=0.5)
    # cos is 0 where a norm counts as 1: sin(45 degrees) of x, as in mergekit
    assert torch.allclose(out, x * math.sin(math.pi / 4))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_density_and_gives_back_the_length_of_the_task_vector(density, tmp_path):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    base, model = write_model(tmp_path / "b", {"w": 0 * x}), write_model(tmp_path / "m", {"w": x})
    config = config_for("dare_ties", [model], base=base, parameters={"weight": 1, "density": density})
    measured = merge(config, tmp_path / "out")
    out = read_model(tmp_path / "out")["w"].double()
    assert measured["kept_share"] == (out != 0).double().mean().item()
    assert abs(measured["kept_share"] - density) < 5 * math.sqrt(density * (1 - density) / 100_000)
    assert math.isclose(out.abs().sum(), x.double().abs().sum(), rel_tol=1e-6)


def test_dare_masks_depend_on_seed_tensor_and_input_and_on_nothing_else():
    base, x = torch.zeros(1000), torch.ones(1000)

    def kept(seed, name, inputs=1):
        pairs = [{name: x, "other": x}] * inputs
        out = merge_tensors("dare_ties", pairs, base={name: base, "other": base}, weight=1, density=0.5, seed=seed)
        return out[name]

    first = kept(1, "w")
    assert torch.equal(first, kept(1, "w"))
    assert not torch.equal(first, kept(2, "w"))
    assert not torch.equal(first, kept(1, "v"))
    assert (kept(1, "w", inputs=2) != 0).double().mean() > 0.7  # two independent masks: 3/4 has at least one


def words(tensor, index, start, size, seed=7):
    out = np.empty(size, np.uint32)
    random_words(seed, tensor, index, start, out)
    return out


@pytest.mark.parametrize("start", [0, 3, 64, 4095, 2**33 + 1])
def test_a_stretch_of_random_words_is_the_same_drawn_alone(start):
    whole = words("a.b", 1, start, 1000)
    for skip, size in ((40, 60), (1, 998), (511, 489)):
        np.testing.assert_array_equal(whole[skip : skip + size], words("a.b", 1, start + skip, size))


def test_the_random_stream_is_the_published_one():
    zero = np.empty(4, np.uint32)
    kernels.philox(0, 0, 0, zero)  # the known answer of Random123
    assert [f"{int(word):x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    np.testing.assert_array_equal(
        words("model.norm.weight", 2, 0, 999), reference.random_words(999, 7, "model.norm.weight", 2)
    )
