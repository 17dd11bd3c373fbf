"""Methods that look at one element of the base and the inputs at a time and need no statistic."""

from __future__ import annotations

import numpy as np

from mixmerge.merge.block import At, Block, Float64


def nearswap(block: Block, at: At, _: object) -> Float64:
    """w x + (1 - w) b with w = t / |b - x|, at most 1."""
    b, x = block.base.astype(np.float64), block.rows[0].astype(np.float64)
    d = x - b
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.where(d == 0, 1.0, np.minimum(at["t"] / np.abs(d), 1.0))
    block.out[:] = np.where(w == 1.0, x, b + w * d)
    return block.out
