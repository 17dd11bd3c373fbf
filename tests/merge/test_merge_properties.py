"""What must hold for any weights, whatever the numbers: through real folders on disk."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import merge_tensors, same_bits

few = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DELTA_METHODS = ["task_arithmetic", "ties", "dare_ties"]


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
@given(tensors(2), st.sampled_from(DELTA_METHODS))
def test_one_model_at_weight_1_is_that_model_bit_for_bit(xs, method):
    base, x = xs
    assert same_bits(merge_tensors(method, [x], base=base, weight=1.0) + 0.0, x + 0.0)


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


@few
@given(tensors(1), st.sampled_from([*DELTA_METHODS, "slerp"]), st.floats(0, 1), st.floats(0.05, 1))
def test_equal_inputs_return_themselves(xs, method, amount, density):
    x = xs[0]
    if method == "slerp":
        assert torch.equal(merge_tensors("slerp", [x], base=x, t=amount), x)
        return
    parameters = {} if method == "task_arithmetic" else {"density": density}
    assert torch.equal(merge_tensors(method, [x, x], base=x, weight=amount + 0.1, **parameters), x)


@few
@given(tensors(4), st.permutations([0, 1, 2]), st.sampled_from(["linear", "task_arithmetic", "ties"]))
def test_the_order_of_the_models_does_not_matter(xs, order, method):
    *xs, base = xs
    weights = [{"weight": w} for w in (0.5, 1.0, 2.0)]
    extra = {} if method == "linear" else {"base": base}
    shuffled = merge_tensors(method, [xs[i] for i in order], per_model=[weights[i] for i in order], **extra)
    assert close(merge_tensors(method, xs, per_model=weights, **extra), shuffled)


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


def test_dare_leaves_the_task_vector_as_it_is_on_average():
    base, x = torch.zeros(32), torch.linspace(-1, 1, 32)
    names = [f"w{i}" for i in range(3000)]  # one independent mask each
    drawn = merge_tensors(
        "dare_ties", [dict.fromkeys(names, x)], base=dict.fromkeys(names, base), weight=1, density=0.5
    )
    mean = torch.stack([drawn[n] for n in names]).double().mean(0)
    # a standard error is |x| / sqrt(3000); the measured L1 ratio makes the share of a large element slightly smaller
    assert torch.allclose(mean, x.double(), atol=5 / math.sqrt(3000))
    assert math.isclose(mean.abs().sum(), x.double().abs().sum(), rel_tol=0.02)
