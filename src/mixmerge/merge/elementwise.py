"""Methods that look at one element of the base and the inputs at a time; at most they count elements first."""

from __future__ import annotations

import numpy as np

from mixmerge.merge.block import At, Block, Float64, Mask, Measured, Over


def nearswap(block: Block, at: At, _: object) -> Float64:
    """w x + (1 - w) b with w = t / |b - x|, at most 1."""
    b, x = block.base.astype(np.float64), block.rows[0].astype(np.float64)
    d = x - b
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.where(d == 0, 1.0, np.minimum(at["t"] / np.abs(d), 1.0))
    block.out[:] = np.where(w == 1.0, x, b + w * d)
    return block.out


def ram(block: Block, at: At, boosts: object) -> Float64:
    """b + the mean of the task vectors that changed an element by more than epsilon.

    So what several models changed is averaged, and what only model i changed comes in whole, times boosts[i].
    """
    changed = _changed(block, at)
    models = changed.sum(axis=0)
    b = block.base.astype(np.float64)
    d = (block.rows - b) * changed
    if boosts is not None:
        d *= np.where(models == 1, np.asarray(boosts)[:, None], 1.0)
    block.out[:] = b + d.sum(axis=0) / np.maximum(models, 1)
    return block.out


def ram_plus(over: Over, at: At) -> Measured:
    """1 + r min(shared / unique, alpha) for each model: how many of the elements it changed in this tensor others changed too."""

    def count(block: Block) -> list[tuple[int, int]]:
        changed = _changed(block, at)
        alone = changed.sum(axis=0) == 1
        return [(int(np.count_nonzero(row)), int(np.count_nonzero(row & alone))) for row in changed]

    all_, unique = np.sum(over(count), axis=0).T
    # without an element of its own a model has nothing to boost
    ratio = (all_ - unique) / np.maximum(unique, 1)
    return Measured(1.0 + at["r"] * np.minimum(ratio, at["alpha"]))


def _changed(block: Block, at: At) -> Mask:
    """|x_i - b| > epsilon, in float32: bool (k, n)."""
    mask, epsilon = block.mask, np.float32(at["epsilon"])
    for i, row in enumerate(mask):
        np.greater(np.abs(block.delta(i)), epsilon, out=row)
    return mask
