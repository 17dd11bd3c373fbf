"""Where blocks are worked on: by compiled loops on the CPU, or by torch on a CUDA device, with the same names and bytes.

The one idea: a method asks its block's engine for every loop, so no method knows where its arrays lie.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from mixmerge.merge import kernels, selection
from mixmerge.merge.sources import encode

# Every loop of kernels.py and selection.py that methods use, and what else differs between the places of arrays.
CPU: Any = SimpleNamespace(
    agreeing=kernels.agreeing,
    changed_mean=kernels.changed_mean,
    column_dots=kernels.column_dots,
    consensus=kernels.consensus,
    count_changed=kernels.count_changed,
    decode=kernels.decode,
    dots=kernels.dots,
    keep_window=kernels.keep_window,
    masked_squares=kernels.masked_squares,
    masked_sums=kernels.masked_sums,
    row_dots=kernels.row_dots,
    spread=kernels.spread,
    swap_near=kernels.swap_near,
    take_beyond=kernels.take_beyond,
    task_vector=kernels.task_vector,
    times_rows=kernels.times_rows,
    weighted_rows=kernels.weighted_rows,
    weighted_sum=kernels.weighted_sum,
    count_high=selection.count_high,
    count_low=selection.count_low,
    gather_low=selection.gather_low,
    keep_by_rank=selection.keep_by_rank,
    philox=selection.philox,
    places_of=selection.places_of,
    below=lambda words, limit, mask: np.less(words, limit, out=mask),
    count=lambda mask: int(np.count_nonzero(mask)),
    empty=np.empty,
    encode=encode,
    host=lambda values: values,
    raw=lambda words, places, stored, size: (words, places),
    threads=None,
)


def engine(device: str) -> Any:
    """The loops on a device: "cpu", or a torch device such as "cuda" or "cuda:1".

    Raises:
        UserError: there is no such device.
    """
    if device == "cpu":
        return CPU
    from mixmerge.merge.device import Device

    return Device(device)
