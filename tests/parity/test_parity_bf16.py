"""In bfloat16 mergekit rounds after each operation and we once: our error against float64 is never the larger one."""

import merge_reference as reference
import numpy as np
import pytest
from oracle import WEIGHTS, config, ours

W = [WEIGHTS[name] for name in "abc"]


def ties(b, xs):
    masks = [reference.top_mask(x - b, 0.3) for x in xs]
    return reference.consensus(b, xs, W, masks, normalize=True, rescale=False)


def crumbs(b, xs):
    masks = [reference.crumbs_mask(x - b, 0.3, 0.05) for x in xs]
    return reference.consensus(b, xs, W, masks, normalize=False, rescale=False, elect=False)


# configuration, and the float64 result from the base, the inputs and the shape
BF16 = {
    "linear": (config("linear", "abc", base=False, each=True), lambda b, xs, s: reference.linear(xs, W)),
    "slerp": (config("slerp", "a", t=0.4), lambda b, xs, s: reference.slerp(b, xs[0], 0.4)),
    "nuslerp": (
        config("nuslerp", "ab", each=True),
        lambda b, xs, s: reference.nuslerp(b, xs, W[:2], s, "whole"),
    ),
    "multislerp": (
        config("multislerp", "abc", base=False, each=True),
        lambda b, xs, s: reference.multislerp(None, xs, W),
    ),
    "karcher": (config("karcher", "abc", base=False), lambda b, xs, s: reference.karcher(xs)),
    "task_arithmetic": (
        config("task_arithmetic", "abc", each=True),
        lambda b, xs, s: reference.task_arithmetic(b, xs, W),
    ),
    "ties": (config("ties", "abc", each=True, density=0.3), lambda b, xs, s: ties(b, xs)),
    "breadcrumbs": (
        config("breadcrumbs", "abc", each=True, density=0.3, gamma=0.05),
        lambda b, xs, s: crumbs(b, xs),
    ),
    "sce": (config("sce", "abc", select_topk=0.3), lambda b, xs, s: reference.sce(b, xs, 0.3)),
    "ram": (config("ram", "abc"), lambda b, xs, s: reference.ram(b, xs)),
    "arcee_fusion": (config("arcee_fusion", "a"), lambda b, xs, s: reference.arcee_fusion(b, xs[0], s)),
    "model_stock": (config("model_stock", "abc"), lambda b, xs, s: reference.model_stock(b, xs, s, False)),
    "nearswap": (config("nearswap", "a", t=0.01), lambda b, xs, s: reference.nearswap(b, xs[0], 0.01)),
    "passthrough": (config("passthrough", "a", base=False, scale=0.3), lambda b, xs, s: 0.3 * xs[0]),
}


def flat(tensor):
    return tensor.double().numpy().ravel()


@pytest.mark.parametrize("method", BF16)
def test_our_error_is_at_most_the_rivals(oracle, bf16_models, method, tmp_path):
    asked, exact = BF16[method]
    top = {"dtype": "bfloat16", "out_dtype": "bfloat16"}
    theirs, mine = oracle.merge(asked, bf16_models, **top), ours(asked, bf16_models, tmp_path / "out", **top)
    errors = {"theirs": [], "ours": []}
    for name, b in bf16_models.tensors["base"].items():
        xs = [flat(bf16_models.tensors[model][name]) for model in asked.models]
        truth = exact(flat(b), xs, tuple(b.shape))
        assert theirs[name].dtype == mine[name].dtype
        errors["theirs"].append(flat(theirs[name]) - truth)
        errors["ours"].append(flat(mine[name]) - truth)
        # one rounding: half a unit in the last of eight bits
        assert np.all(np.abs(errors["ours"][-1]) <= np.abs(truth) * 2**-8 + 1e-6 * np.abs(truth).max())
    theirs_rms, ours_rms = (np.sqrt(np.mean(np.concatenate(e) ** 2)) for e in errors.values())
    assert ours_rms <= theirs_rms * (1 + 1e-9)
