"""Random methods draw other numbers than mergekit: their distributions are the same."""

import math

import pytest
import torch
from oracle import config, ours

DRAWS = 8
METHODS = ["dare_linear", "dare_ties", "della", "della_linear"]


def asked_for(method, models="a", **parameters):
    spread = {"epsilon": 0.2} if method.startswith("della") else {}
    return config(method, models, each=True, density=0.4, **spread, **parameters)


def deltas(merged, models):
    """out - base of all tensors, by name in one order."""
    return {name: (merged[name] - tensor).double() for name, tensor in models.tensors["base"].items()}


def drawn(oracle, asked, models, place):
    """What each of the two adds to the base, in several draws: (mergekit's, ours)."""
    theirs = [deltas(oracle.merge(asked, models, seed), models) for seed in range(DRAWS)]
    mine = [deltas(ours(asked, models, place / str(seed), seed), models) for seed in range(DRAWS)]
    return theirs, mine


def flat(draw):
    return torch.cat([tensor.flatten() for tensor in draw.values()])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_share_expectation_variance_and_length_of_one_task_vector_agree(oracle, models, method, rescale, tmp_path):
    asked = asked_for(method, rescale=rescale, normalize=True)
    whole = deltas(models.tensors["a"], models)
    d = flat(whole)
    seen = []
    for draws in drawn(oracle, asked, models, tmp_path):
        out = torch.stack([flat(draw) for draw in draws])
        kept = (out != 0).double().mean().item()
        along = ((out * d).mean(0).sum() / d.square().sum()).item()
        spread = (out - along * d).square().mean(0).sum().item() / d.square().sum().item()
        length = out.abs().sum(1).mean().item() / d.abs().sum().item()
        seen.append((kept, along, spread, length))
        if rescale:
            for draw in draws:
                assert all(
                    math.isclose(draw[name].abs().sum(), whole[name].abs().sum(), rel_tol=1e-5) for name in whole
                )
    (kept, along, spread, length), mine = seen
    error = math.sqrt(2 * 0.24 / (DRAWS * d.numel()))
    assert abs(kept - mine[0]) < 5 * error
    assert abs(kept - 0.4) < 5 * error
    assert mine[1] == pytest.approx(along, rel=0.02)
    assert mine[2] == pytest.approx(spread, rel=0.02)
    assert mine[3] == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags", [{}, {"normalize": True}, {"normalize": False}])
def test_three_models_add_up_alike_on_average(oracle, models, method, flags, tmp_path):
    asked = asked_for(method, "abc", lambda_=0.7, **flags)
    theirs, mine = (torch.stack([flat(draw) for draw in draws]) for draws in drawn(oracle, asked, models, tmp_path))
    size = theirs.abs().mean()
    assert mine.abs().mean() == pytest.approx(size.item(), rel=0.01)
    assert mine.square().mean() == pytest.approx(theirs.square().mean().item(), rel=0.02)
    assert (mine != 0).double().mean() == pytest.approx((theirs != 0).double().mean().item(), rel=0.01)
    # element by element the means of the draws differ by chance only
    noise = ((theirs.var(0) + mine.var(0)) / DRAWS).mean().sqrt()
    assert (theirs.mean(0) - mine.mean(0)).square().mean().sqrt() < 1.1 * noise


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_dellas_chance_grows_with_the_rank_in_the_row_alike(oracle, models, method, tmp_path):
    asked = asked_for(method)
    whole = deltas(models.tensors["a"], models)
    shares = []
    for draws in drawn(oracle, asked, models, tmp_path):
        kept, count = torch.zeros(8), torch.zeros(8)
        for name, d in whole.items():
            rows = d.reshape(-1, d.shape[-1])
            ranks = rows.abs().argsort(1).argsort(1)
            eighth = ranks * 8 // rows.shape[1]
            for draw in draws:
                mask = (draw[name] != 0).reshape(rows.shape)
                kept += torch.bincount(eighth[mask], minlength=8)
                count += torch.bincount(eighth.flatten(), minlength=8)
        shares.append(kept / count)
    error = math.sqrt(2 * 0.25 / (DRAWS * 27360 / 8))
    assert torch.all((shares[0] - shares[1]).abs() < 5 * error)
    assert torch.all(shares[1].diff() > 0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_density_zero_keeps_nothing_and_one_keeps_everything(oracle, models, method, density, tmp_path):
    asked = config(method, "ab", each=True, density=density)
    theirs, mine = oracle.merge(asked, models), ours(asked, models, tmp_path / "out")
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, rtol=1e-6, atol=1e-7)
