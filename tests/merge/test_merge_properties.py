"""What must hold for any weights, whatever the numbers: through real folders on disk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import EXAMPLE, merge_tensors, same_bits

from mixmerge.errors import ModelError, RecipeError
from mixmerge.merge import METHODS

few = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DELTA_METHODS = [name for name, method in METHODS.items() if "lambda" in method.parameters]
ORDERLESS = ["linear", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"]
ORDERLESS += ["sce", "ram", "ramplus_tl", "model_stock"]


@st.composite
def tensors(draw, count):
    """`count` tensors of one shape and dtype: random normals, with exact zeros and equal magnitudes among them."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 0.02, 1.0]))
    out = []
    for _ in range(count):
        x = torch.randn(shape, generator=generator) * scale
        x[torch.rand(shape, generator=generator) < 0.1] = 0.0
        x[torch.rand(shape, generator=generator) < 0.1] = scale
        out.append(x.to(dtype))
    return out


def close(a, b):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[a.dtype]
    reference = b.double().abs().max().item() if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * reference + 1e-7)


@few
@given(tensors(1), st.floats(0.01, 100))
def test_linear_of_one_model_is_that_model_bit_for_bit(xs, weight):
    assert same_bits(merge_tensors("linear", xs, weight=weight), xs[0])


@few
@given(tensors(2), st.sampled_from([*DELTA_METHODS, "sce", "ram", "ramplus_tl"]))
def test_one_model_at_weight_1_is_that_model_bit_for_bit(xs, method):
    base, x = xs
    parameters = {"weight": 1.0, "epsilon": 0.0}
    own = {name: value for name, value in parameters.items() if name in METHODS[method].parameters}
    assert same_bits(merge_tensors(method, [x], base=base, **own) + 0.0, x + 0.0)


@few
@given(tensors(1))
def test_passthrough_is_the_model_bit_for_bit(xs):
    assert same_bits(merge_tensors("passthrough", xs), xs[0])


def test_one_model_at_weight_1_survives_a_base_of_quite_another_size():
    base = torch.tensor([1000.0, -1e4, 3e-5, 0.0, 7.0])
    x = torch.tensor([1e-4, 2e-5, -1e4, -3e-8, 0.0])
    for method in DELTA_METHODS:
        assert same_bits(merge_tensors(method, [x], base=base, weight=1.0), x), method


@few
@given(tensors(3))
def test_linear_with_equal_weights_is_the_mean(xs):
    mean = torch.stack([x.double() for x in xs]).mean(0).to(xs[0].dtype)
    assert close(merge_tensors("linear", xs, weight=1), mean)


@few
@given(tensors(1), st.lists(st.floats(0.05, 5), min_size=2, max_size=4))
def test_linear_of_equal_models_is_that_model_bit_for_bit(xs, weights):
    out = merge_tensors("linear", xs * len(weights), per_model=[{"weight": w} for w in weights])
    assert same_bits(out, xs[0])


def call(method, inputs, base, **more):
    """Merge with plausible parameters; the base is one where the method knows one."""
    spec = METHODS[method]
    parameters = {name: EXAMPLE[name] for name in spec.parameters if name in EXAMPLE} | more
    inputs = inputs[: spec.inputs[1]]
    return merge_tensors(method, inputs, **parameters, **({} if spec.base == "none" else {"base": base}))


@few
@given(tensors(1), st.sampled_from([*METHODS]))
def test_equal_models_return_themselves(xs, method):
    x = xs[0]
    out = call(method, [x, x, x], x)
    # beside a base that is the same nothing is left to add; without one lengths and angles are measured
    assert close(out, x) if METHODS[method].base == "none" else torch.equal(out, x)


@few
@given(tensors(2), st.sampled_from(["nuslerp", "multislerp", "karcher", "model_stock", "sce", "ram", "ties"]))
def test_equal_models_beside_another_base_return_themselves(xs, method):
    base, x = xs
    parameters = (
        {"epsilon": 0.0} if method == "ram" else {"weight": 0.5} if "weight" in METHODS[method].parameters else {}
    )
    known = {} if METHODS[method].base == "none" else {"base": base}
    assert close(merge_tensors(method, [x, x], **known, **parameters), x)


@few
@given(tensors(4), st.permutations([0, 1, 2]), st.sampled_from(ORDERLESS))
def test_the_order_of_the_models_does_not_matter(xs, order, method):
    *xs, base = xs
    spec = METHODS[method]
    order = [i for i in order if i < (spec.inputs[1] or 3)]
    weights = [{"weight": w} if "weight" in spec.parameters else {} for w in (0.5, 1.0, 2.0)]
    extra = {} if spec.base == "none" else {"base": base}
    straight = [xs[i] for i in sorted(order)], [weights[i] for i in sorted(order)]
    shuffled = [xs[i] for i in order], [weights[i] for i in order]
    first, second = (merge_tensors(method, models, per_model=own, **extra) for models, own in (straight, shuffled))
    assert close(first, second)


@few
@given(tensors(2))
def test_slerp_begins_at_the_base_and_ends_at_the_other_model(xs):
    base, x = xs
    assert same_bits(merge_tensors("slerp", [x], base=base, t=0), base)
    assert same_bits(merge_tensors("slerp", [x], base=base, t=1), x)


@few
@given(tensors(1), st.floats(0.5, 4), st.floats(0, 1))
def test_slerp_of_parallel_tensors_is_linear(xs, factor, t):
    base = xs[0].float()
    x = base * factor
    linear = merge_tensors("linear", [base, x], per_model=[{"weight": 1 - t}, {"weight": t}])
    assert close(merge_tensors("slerp", [x], base=base, t=t), linear)


@few
@given(tensors(2), st.floats(0.05, 0.95))
def test_slerp_between_orthogonal_vectors_of_one_length_keeps_that_length(xs, t):
    a = xs[0].float().flatten() + 1
    base, x = torch.cat([a, 0 * a]), torch.cat([0 * a, a])
    out = merge_tensors("slerp", [x], base=base, t=t)
    assert math.isclose(out.norm().item(), base.norm().item(), rel_tol=1e-5)


@few
@given(tensors(3))
def test_ties_without_trimming_and_with_equal_signs_is_the_mean_of_the_task_vectors(xs):
    base = xs[0].float()
    first, second = (x.float().abs() + 0.01 for x in xs[1:])
    out = merge_tensors("ties", [base + first, base + second], base=base, weight=1, density=1.0)
    assert close(out, base + (first + second) / 2)


@few
@given(tensors(3), st.floats(-2, 2))
def test_lambda_scales_what_a_method_adds_to_the_base(xs, factor):
    base, *inputs = (x.float() for x in xs)
    for method in DELTA_METHODS:
        once = merge_tensors(method, inputs, base=base, weight=0.7).double() - base
        scaled = merge_tensors(method, inputs, base=base, weight=0.7, **{"lambda": factor}).double() - base
        assert torch.allclose(scaled, factor * once, atol=1e-5), method


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_leaves_the_task_vector_as_it_is_on_average(method):
    base, x = torch.zeros(32), torch.linspace(-1, 1, 32)
    names = [f"w{i}" for i in range(3000)]  # one independent mask each
    drawn = merge_tensors(method, [dict.fromkeys(names, x)], base=dict.fromkeys(names, base), weight=1, density=0.5)
    mean = torch.stack([drawn[n] for n in names]).double().mean(0)
    # a standard error is |x| / sqrt(3000); the measured L1 ratio makes the share of a large element slightly smaller
    assert torch.allclose(mean, x.double(), atol=5 / math.sqrt(3000))
    assert math.isclose(mean.abs().sum(), x.double().abs().sum(), rel_tol=0.02)


@few
@given(tensors(2), st.floats(0.05, 0.95))
def test_nuslerp_of_two_models_is_slerp(xs, t):
    base, x = (x.float() for x in xs)
    weights = [{"weight": 1 - t}, {"weight": t}]
    cosine = torch.nn.functional.cosine_similarity(base.double().flatten(), x.double().flatten(), 0).item()
    if abs(cosine) < 0.999 and cosine != 0:  # where one is zero or both are parallel each has a rule of its own
        assert close(
            merge_tensors("nuslerp", [base, x], per_model=weights), merge_tensors("slerp", [x], base=base, t=t)
        )


@few
@given(tensors(2), st.sampled_from(["karcher", "multislerp"]))
def test_the_mean_of_two_models_of_one_length_is_the_middle_of_their_arc(xs, method):
    a = xs[0].float().flatten() + 1
    base, x = torch.cat([a, 0 * a]), torch.cat([0 * a, a])
    weight = {"weight": 1.0} if method == "multislerp" else {}
    assert close(merge_tensors(method, [base, x], **weight), merge_tensors("slerp", [x], base=base, t=0.5))


def test_model_stock_of_orthogonal_task_vectors_is_the_base_and_of_equal_ones_the_model():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    across = [base + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), base + torch.tensor([[0.0, 1.0], [0.0, 0.0]])]
    assert torch.equal(merge_tensors("model_stock", across, base=base), base)
    assert torch.allclose(merge_tensors("model_stock", across[:1] * 2, base=base), across[0])


def test_model_stock_of_opposite_task_vectors_is_the_base():
    base, d = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.25])
    for by_row in (True, False):
        assert torch.equal(merge_tensors("model_stock", [base + d, base - d], base=base, filter_wise=by_row), base)


@few
@given(tensors(2), st.floats(0, 0.1))
def test_nearswap_moves_no_element_by_more_than_t(xs, t):
    base, x = (x.float() for x in xs)
    out = merge_tensors("nearswap", [x], base=base, t=t)
    assert (out - base).abs().max() <= t + 1e-6
    assert torch.all((out - base).abs() <= (x - base).abs() * (1 + 1e-6) + 1e-7)


@few
@given(tensors(2))
def test_arcee_fusion_takes_each_element_whole_from_one_of_the_two(xs):
    base, x = xs
    out = merge_tensors("arcee_fusion", [x], base=base)
    assert torch.all((out == x) | (out == base))


@few
@given(tensors(3), st.floats(0, 5))
def test_ram_adds_what_only_one_model_changed_and_averages_the_rest(xs, r):
    base, first, second = (x.float().flatten() for x in xs)
    odd = torch.arange(len(base)) % 2 == 1
    apart = [torch.where(odd, first, base), torch.where(odd, base, second)]
    assert close(merge_tensors("ram", apart, base=base, epsilon=0.0), torch.where(odd, first, second))
    assert same_bits(
        merge_tensors("ram", [first, second], base=base, epsilon=0.0),
        merge_tensors("ramplus_tl", [first, second], base=base, epsilon=0.0, r=r, alpha=0.0),
    )


@few
@given(tensors(2), st.floats(0.1, 0.9), st.floats(0.0, 0.5))
def test_breadcrumbs_keep_their_density_between_the_largest_and_the_smallest(xs, density, gamma):
    base, d = torch.zeros(64), torch.arange(1.0, 65.0)
    out = merge_tensors("breadcrumbs", [d], base=base, weight=1, density=density, gamma=gamma)
    kept = out.nonzero().flatten()
    assert len(kept) == int(density * 64)
    assert not len(kept) or kept[-1] - kept[0] + 1 == len(kept)
    assert torch.equal(out[kept], d[kept])


def test_directions_that_cancel_are_refused_by_multislerp_and_not_by_karcher():
    x = torch.tensor([3.0, -4.0])
    with pytest.raises(ModelError, match="cancel"):
        merge_tensors("multislerp", [x, -x], weight=1.0)
    assert torch.equal(merge_tensors("karcher", [x, -x]), x)


def test_della_refuses_probabilities_outside_0_to_1_and_density_1_keeps_everything():
    base, x = torch.zeros(64), torch.arange(1.0, 65.0)
    with pytest.raises(RecipeError, match="epsilon"):
        merge_tensors("della", [x], base=base, weight=1.0, density=0.9, epsilon=0.1)
    assert torch.equal(merge_tensors("della", [x], base=base, weight=1.0), x)
