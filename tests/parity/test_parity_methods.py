"""Every deterministic method gives mergekit's numbers, to float32's precision."""

import pytest
import torch
from oracle import config, distance, ours

from mixmerge.errors import MixmergeError
from mixmerge.merge import METHODS

RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}  # see test_parity_random.py
CANCELLING = {"a": {"weight": 1.0}, "b": {"weight": -1.0}, "c": {"weight": 0.5}}
FLAGS = [(n, r) for n in (True, False) for r in (True, False)]
ARCS = [(flat, by_row) for flat, by_row in ((True, False), (False, False), (False, True))]

DETERMINISTIC = {
    "linear": config("linear", "abc", base=False, each=True),
    "linear without normalize": config("linear", "abc", base=False, each=True, normalize=False),
    "linear with the base among the models": config("linear", ["a", "base"], each=True),
    **{f"slerp at {t}": config("slerp", "a", t=t) for t in (0.0, 0.3, 1.0)},
    "slerp of unrelated models": config("slerp", "x", t=0.3),
    **{
        f"nuslerp {flat} {by_row} {models} {base}": config(
            "nuslerp", models, base=base, each=True, nuslerp_flatten=flat, nuslerp_row_wise=by_row
        )
        for flat, by_row in ARCS
        for models, base in (("ab", True), ("ab", False), ("xy", False))
    },
    "nuslerp whose weights cancel": config(
        "nuslerp", "xy", base=False, each={"x": {"weight": 1.0}, "y": {"weight": -1.0}}
    ),
    **{
        f"multislerp {models} {base} {normalize}": config(
            "multislerp", models, base=base, each=True, normalize_weights=normalize
        )
        for models in ("a", "abc", "axy")
        for base in (True, False)
        for normalize in (True, False)
    },
    "multislerp with another eps": config("multislerp", "axy", base=False, each=True, eps=1e-3 / 8),
    "karcher": config("karcher", "abc", base=False),
    "karcher of unrelated models": config("karcher", "axy", base=False),
    "karcher with a base": config("karcher", "axy"),
    **{f"karcher after {n}": config("karcher", "axy", base=False, max_iter=n, tol=1e-9) for n in (1, 2, 50)},
    **{f"karcher to {tol}": config("karcher", "axy", base=False, tol=tol) for tol in (0.01, 0.1, 0.5)},
    "task_arithmetic": config("task_arithmetic", "abc", each=True, lambda_=0.6),
    "task_arithmetic with normalize": config("task_arithmetic", "abc", each=True, normalize=True),
    "task_arithmetic that takes away": config("task_arithmetic", "abc", each=CANCELLING, normalize=True),
    **{
        f"{method} normalize {normalize} rescale {rescale}": config(
            method, "abc", each=True, density=0.4, normalize=normalize, rescale=rescale, lambda_=0.6
        )
        for method in ("ties", "breadcrumbs", "breadcrumbs_ties")
        for normalize, rescale in FLAGS
    },
    **{
        f"{method} with the defaults at density {density}": config(method, "abc", each=True, density=density)
        for method in ("ties", "breadcrumbs", "breadcrumbs_ties")
        for density in (0.0, 0.001, 0.5, 0.95, 1.0)
    },
    **{
        f"{method} that takes away": config(method, "abc", each=CANCELLING, density=0.5, normalize=True)
        for method in ("ties", "breadcrumbs", "breadcrumbs_ties")
    },
    "ties with the base among the models": config(
        "ties", ["base", "a", "b"], each={"a": {"weight": 0.7}, "b": {"weight": 0.4}}, density=0.5
    ),
    **{
        f"breadcrumbs with gamma {gamma}": config("breadcrumbs", "abc", each=True, density=0.3, gamma=gamma)
        for gamma in (0.0, 0.1, 0.5, 0.9)
    },
    **{f"sce of {share}": config("sce", "abc", select_topk=share) for share in (1.0, 0.5, 0.1, 0.01, 0.0)},
    "sce of unrelated models": config("sce", "axy", select_topk=0.3),
    "sce of one model": config("sce", "a", select_topk=0.5),
    **{
        f"model_stock {models} by row {by_row}": config("model_stock", models, filter_wise=by_row)
        for models in ("ab", "abc", "axy")
        for by_row in (True, False)
    },
    **{f"nearswap at {t}": config("nearswap", "a", t=t) for t in (0.0, 0.001, 0.01, 1.0)},
    **{
        f"ram {models} {epsilon}": config("ram", models, epsilon=epsilon)
        for models in ("a", "ab", "abc", "axy")
        for epsilon in (0.0, 0.01, 0.04)
    },
    "ram by default": config("ram", "abc"),
    **{
        f"ramplus_tl {r} {alpha}": config("ramplus_tl", "abc", r=r, alpha=alpha, epsilon=0.03)
        for r in (0.0, 0.1, 1.0)
        for alpha in (0.2, 5.0)
    },
    "ramplus_tl by default": config("ramplus_tl", "abc"),
    **{
        f"{method} with one task taken away": config(
            method, "ab", each={"a": {"weight": 0.5}, "b": {"weight": -0.5}}, density=0.6, normalize=True
        )
        for method in ("ties", "breadcrumbs_ties")
    },
    "passthrough": config("passthrough", "a", base=False),
    "passthrough with a scale": config("passthrough", "a", base=False, each={"a": {"scale": 0.37}}),
}


def test_every_method_is_compared():
    assert {asked.method for asked in DETERMINISTIC.values()} | RANDOM | {"arcee_fusion"} == set(METHODS)


@pytest.mark.parametrize("asked", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_a_deterministic_merge_gives_the_same_numbers(oracle, models, asked, tmp_path):
    assert distance(oracle.merge(asked, models), ours(asked, models, tmp_path / "out")) < 1e-6


@pytest.mark.parametrize("models_of", ["a", "b", "x"])
def test_arcee_fusion_takes_the_same_elements_but_those_on_the_fence(oracle, models, models_of, tmp_path):
    asked = config("arcee_fusion", models_of)
    theirs, mine = oracle.merge(asked, models), ours(asked, models, tmp_path / "out")
    differ = 0
    for name, b in models.tensors["base"].items():
        x = models.tensors[models_of][name]
        p, q = b.double().softmax(-1), x.double().softmax(-1)
        importance = (x - b).abs().double() * (q * (q / p).log()).sum(-1, keepdim=True)
        low, median, high = (torch.quantile(importance, q, interpolation="lower") for q in (0.25, 0.5, 0.75))
        other = (theirs[name] != b) != (mine[name] != b)
        # float32 leaves a divergence of 1e-4 three digits
        assert torch.allclose(importance[other], median + 1.5 * (high - low), rtol=5e-3)
        assert torch.allclose(theirs[name][~other], mine[name][~other], rtol=1e-6, atol=1e-7)
        differ += int(other.sum())
    assert differ < 10


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_of_equal_magnitudes_as_many_are_kept_though_perhaps_others(oracle, models, place, method, density, tmp_path):
    draw = torch.Generator().manual_seed(1)
    shapes = {name: tensor.shape for name, tensor in models.tensors["base"].items()}
    few = {name: torch.randint(-4, 5, shape, generator=draw) / 8 for name, shape in shapes.items()}  # five magnitudes
    placed = place({"base": {name: torch.zeros(shape) for name, shape in shapes.items()}, "a": few})
    asked = config(method, "a", each=True, density=density, normalize=True)
    theirs, mine = oracle.merge(asked, placed), ours(asked, placed, tmp_path / "out")
    for name, tensor in few.items():
        kept, other = theirs[name] != 0, (theirs[name] != 0) != (mine[name] != 0)
        assert kept.sum() == (mine[name] != 0).sum()
        ends = 1 if method == "ties" else 2  # a window has a threshold above and one below
        assert len(tensor[other].abs().unique()) <= ends
        assert torch.allclose(theirs[name][~other], mine[name][~other], rtol=1e-6)


REFUSED_BY_BOTH = {
    "probabilities above 1": config("della", "ab", each=True, density=0.9, epsilon=0.2),
    "probabilities below 0": config("della", "ab", each=True, density=0.1, epsilon=0.1),
    "three models in a slerp": config("slerp", "abc", t=0.5),
    "one model in a model_stock": config("model_stock", "a"),
    "no base": config("ties", "ab", base=False, each=True),
}


@pytest.mark.parametrize("what", REFUSED_BY_BOTH)
def test_what_mergekit_refuses_we_refuse(oracle, models, what, tmp_path):
    asked = REFUSED_BY_BOTH[what]
    with pytest.raises(ValueError, match="Error: "):
        oracle.merge(asked, models)
    with pytest.raises(MixmergeError):
        ours(asked, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_mergekit_writes_zeros_for_directions_that_cancel_we_refuse(oracle, models, place, tmp_path):
    a = models.tensors["a"]
    placed = place({"a": a, "b": {name: -tensor for name, tensor in a.items()}})
    asked = config("multislerp", "ab", base=False, each={"a": {"weight": 1.0}, "b": {"weight": 1.0}})
    assert not any(tensor.any() for tensor in oracle.merge(asked, placed).values())
    with pytest.raises(MixmergeError, match="cancel"):
        ours(asked, placed, tmp_path / "out")


def test_sce_weighs_small_task_vectors_by_their_size_too_which_mergekit_does_not(oracle, models, place, tmp_path):
    base, sizes = models.tensors["base"], {"a": 1e-4, "b": 3e-4}
    draw = torch.Generator().manual_seed(3)
    near = {
        name: {key: tensor + size * torch.randn(tensor.shape, generator=draw) for key, tensor in base.items()}
        for name, size in sizes.items()
    }
    placed, asked = place({"base": base} | near), config("sce", "ab", select_topk=1.0)
    theirs, mine = oracle.merge(asked, placed), ours(asked, placed, tmp_path / "out")
    for name, b in base.items():
        a, c = ((near[of][name] - b).double() for of in "ab")
        sign = torch.where(a + c >= 0, 1.0, -1.0)

        def mixed(first, second, a=a, c=c, sign=sign):
            agrees = [(vector * sign > 0).double() for vector in (a, c)]
            total = first * agrees[0] + second * agrees[1]
            return (first * a * agrees[0] + second * c * agrees[1]) / total.clamp(min=1e-300)

        squares = [float(vector.square().mean()) for vector in (a, c)]
        assert sum(squares) < 1e-6
        ours_is = mixed(*squares)
        for found, expected in ((mine[name], ours_is), (theirs[name], mixed(0.5, 0.5))):
            assert torch.allclose(found.double() - b, expected, rtol=1e-2, atol=1e-7)
        assert not torch.allclose(theirs[name].double() - b, ours_is, rtol=1e-1, atol=1e-6)
