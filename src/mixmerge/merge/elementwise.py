"""Methods that look at one element of the base and the inputs at a time; at most they count elements first."""

from __future__ import annotations

import numpy as np

from mixmerge.merge.block import At, Block, Counts, Float64, Measured, Over


def nearswap(block: Block, at: At, _: object) -> Float64:
    """w x + (1 - w) b with w = t / |b - x|, at most 1."""
    block.engine.swap_near(block.rows[0], block.base, at["t"], block.out)
    return block.out


def ram(block: Block, at: At, boosts: object) -> Float64:
    """b + the mean of the task vectors that changed an element by more than epsilon.

    So what several models changed is averaged, and what only model i changed comes in whole, times boosts[i].
    """
    boost = np.ones(block.inputs) if boosts is None else np.asarray(boosts)
    block.engine.changed_mean(block.rows, block.base, np.float32(at["epsilon"]), boost, block.out)
    return block.out


def ram_plus(over: Over, at: At) -> Measured:
    """1 + r min(shared / unique, alpha) for each model: how many of the elements it changed in this tensor others changed too."""

    def count(block: Block) -> Counts:
        out = np.empty((block.inputs, 2), np.int64)
        block.engine.count_changed(block.rows, block.base, np.float32(at["epsilon"]), out)
        return out

    all_, unique = np.sum(over(count), axis=0).T
    # without an element of its own a model has nothing to boost
    ratio = (all_ - unique) / np.maximum(unique, 1)
    return Measured(1.0 + at["r"] * np.minimum(ratio, at["alpha"]))
