"""Each method against an independent float64 reference, over real models of several architectures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import merge_reference as reference
import numpy as np
import pytest
import torch
from model_folders import config_for, merge_tensors, read_model, write_model

from mixmerge.merge import METHODS, merge, selection, tensors
from mixmerge.merge.sparsify import stream_key

W = (0.7, 0.4)
WEIGHED = [{"weight": w} for w in W]
SEED = 11


@dataclass(frozen=True)
class Case:
    """A method with some parameters, and what it is to compute from a tensor's name and shape, the base and the inputs."""

    method: str
    expected: Callable[..., np.ndarray]
    parameters: dict[str, float] = field(default_factory=dict)
    per_model: list[dict[str, float]] | None = None
    inputs: int = 2
    base: bool = True


def thinned(method, mask, *, elect, normalize, rescale, **parameters):
    """A sparsifying method; `mask` makes one of (task vector, tensor's name, shape, index of the input)."""

    def expected(name, shape, base, xs):
        masks = [mask(x - base, name, shape, i) for i, x in enumerate(xs)]
        flags = {"normalize": normalize, "rescale": rescale, "elect": elect}
        return reference.consensus(base, xs, W, masks, lam=0.9, **flags)

    return Case(method, expected, {"lambda": 0.9, **parameters}, WEIGHED)


def arcs(along, *, base):
    def expected(name, shape, origin, xs):
        return reference.nuslerp(origin if base else None, xs, W, shape, along)

    flags = {"nuslerp_flatten": along == "whole", "nuslerp_row_wise": along == "columns"}
    return Case("nuslerp", expected, flags, WEIGHED, base=base)


def top(d, name, shape, i):
    return reference.top_mask(d, 0.3)


def dropped(d, name, shape, i):
    return reference.dare_mask(d.size, 0.3, SEED, name, i)


def crumbs(d, name, shape, i):
    return reference.crumbs_mask(d, 0.3, 0.05)


def by_rank(d, name, shape, i):
    return reference.della_mask(d, shape, 0.4, 0.2, SEED, name, i)


CRUMBS, RANKS = {"density": 0.3, "gamma": 0.05}, {"density": 0.4, "epsilon": 0.2}
CASES = {
    "linear": Case("linear", lambda n, s, b, xs: reference.linear(xs, W), {}, WEIGHED, base=False),
    "slerp": Case("slerp", lambda n, s, b, xs: reference.slerp(b, xs[0], 0.4), {"t": 0.4}, inputs=1),
    **{f"nuslerp {along}": arcs(along, base=False) for along in ("whole", "rows", "columns")},
    **{f"nuslerp {along} of task vectors": arcs(along, base=True) for along in ("whole", "rows", "columns")},
    "multislerp": Case("multislerp", lambda n, s, b, xs: reference.multislerp(None, xs, W), {}, WEIGHED, base=False),
    "multislerp of task vectors": Case("multislerp", lambda n, s, b, xs: reference.multislerp(b, xs, W), {}, WEIGHED),
    "karcher": Case("karcher", lambda n, s, b, xs: reference.karcher([b, *xs]), base=False, inputs=3),
    "karcher, 2 rounds": Case(
        "karcher",
        lambda n, s, b, xs: reference.karcher([b, *xs], 2, 1e-9),
        {"max_iter": 2, "tol": 1e-9},
        None,
        3,
        False,
    ),
    "task_arithmetic": Case(
        "task_arithmetic", lambda n, s, b, xs: reference.task_arithmetic(b, xs, W, lam=0.9), {"lambda": 0.9}, WEIGHED
    ),
    "ties": thinned("ties", top, elect=True, normalize=True, rescale=False, density=0.3),
    "dare_ties": thinned("dare_ties", dropped, elect=True, normalize=False, rescale=True, density=0.3),
    "dare_linear": thinned("dare_linear", dropped, elect=False, normalize=False, rescale=True, density=0.3),
    "breadcrumbs": thinned("breadcrumbs", crumbs, elect=False, normalize=False, rescale=False, **CRUMBS),
    "breadcrumbs_ties": thinned("breadcrumbs_ties", crumbs, elect=True, normalize=False, rescale=False, **CRUMBS),
    "della": thinned("della", by_rank, elect=True, normalize=True, rescale=True, **RANKS),
    "della_linear": thinned("della_linear", by_rank, elect=False, normalize=False, rescale=True, **RANKS),
    "sce": Case("sce", lambda n, s, b, xs: reference.sce(b, xs, 0.3), {"select_topk": 0.3}),
    "sce of all": Case("sce", lambda n, s, b, xs: reference.sce(b, xs, 1.0)),
    "ram": Case("ram", lambda n, s, b, xs: reference.ram(b, xs, 0.01), {"epsilon": 0.01}),
    "ramplus_tl": Case(
        "ramplus_tl",
        lambda n, s, b, xs: reference.ram(b, xs, 0.01, 0.5, 2.0),
        {"epsilon": 0.01, "r": 0.5, "alpha": 2.0},
    ),
    "arcee_fusion": Case("arcee_fusion", lambda n, s, b, xs: reference.arcee_fusion(b, xs[0], s), inputs=1),
    "model_stock": Case("model_stock", lambda n, s, b, xs: reference.model_stock(b, xs, s, False)),
    "model_stock by row": Case(
        "model_stock", lambda n, s, b, xs: reference.model_stock(b, xs, s, True), {"filter_wise": True}
    ),
    "nearswap": Case("nearswap", lambda n, s, b, xs: reference.nearswap(b, xs[0], 0.01), {"t": 0.01}, inputs=1),
    "passthrough": Case("passthrough", lambda n, s, b, xs: 0.3 * b, {"scale": 0.3}, inputs=1, base=False),
}


def models_of(case, models):
    """The base, where the case has one apart, and as many inputs as it takes, of a base and two models."""
    base, *others = models
    if case.base:
        return base, others[: case.inputs]
    return None, ([base, *others] if case.inputs != 2 else others)[: case.inputs]


def wide(tensor):
    return tensor.double().numpy().ravel()


def test_every_method_has_a_reference():
    assert {case.method for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_tensor_of_a_real_model_matches_the_reference(architecture, case, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 4096)  # several blocks even in tiny tensors
    models = tiny_models(architecture)
    base, inputs = models_of(case, models)
    top_level = {"out_dtype": "float32", "seed": SEED, "parameters": case.parameters}
    merge(
        config_for(case.method, inputs, base=base, per_model=case.per_model, **top_level), tmp_path / "out", threads=2
    )
    out, read = read_model(tmp_path / "out"), [read_model(folder) for folder in models]
    assert out.keys() == read[0].keys()
    for name, tensor in out.items():
        b, *xs = (wide(model[name]) for model in read)
        exact = case.expected(name, tuple(tensor.shape), b, xs)
        np.testing.assert_allclose(wide(tensor), exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bf16_result_is_the_float64_result_rounded(case):
    draw = torch.Generator().manual_seed(5)
    models = [torch.randn(25, 20, generator=draw).bfloat16() for _ in range(3)]
    base, inputs = models_of(case, models)
    extra = {} if base is None else {"base": base}
    out = merge_tensors(case.method, inputs, seed=SEED, per_model=case.per_model, **case.parameters, **extra)
    b, *xs = map(wide, models)
    exact = case.expected("w", (25, 20), b, xs)
    assert out.dtype == torch.bfloat16
    # coefficients come from float32 differences: a value may lie on the other side of a midpoint between two bfloat16
    margin = 1e-6 * np.abs(exact).max()
    below, above = (reference.round_bf16(exact + e) for e in (-margin, margin))
    assert np.all((wide(out) >= below) & (wide(out) <= above))
    assert np.mean(wide(out) == reference.round_bf16(exact)) > 0.99


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


def test_a_density_above_zero_keeps_the_largest_element_and_zero_keeps_none():
    x = torch.tensor([0.1, -5.0, 2.0])
    assert merge_tensors("ties", [x], base=0 * x, weight=1, density=1e-6).tolist() == [0.0, -5.0, 0.0]
    assert merge_tensors("ties", [x], base=0 * x, weight=1, density=0).tolist() == [0.0, 0.0, 0.0]


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
    selection.philox(*stream_key(seed, tensor, index), start, out)
    return out


@pytest.mark.parametrize("start", [0, 3, 64, 4095, 2**33 + 1])
def test_a_stretch_of_random_words_is_the_same_drawn_alone(start):
    whole = words("a.b", 1, start, 1000)
    for skip, size in ((40, 60), (1, 998), (511, 489)):
        np.testing.assert_array_equal(whole[skip : skip + size], words("a.b", 1, start + skip, size))


def test_the_random_stream_is_the_published_one():
    zero = np.empty(4, np.uint32)
    selection.philox(0, 0, 0, zero)  # the known answer of Random123
    assert [f"{int(word):x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    np.testing.assert_array_equal(
        words("model.norm.weight", 2, 0, 999), reference.random_words(999, 7, "model.norm.weight", 2)
    )
