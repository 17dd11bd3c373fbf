"""The processes that train one model together, seen from one of them; alone, it is a group of one.

One idea: what differs between the processes is asked here and nowhere else: which one writes, and what they add up to.
Asking costs no import: torch is there wherever a group is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def join(number: int, processes: int, meeting: Path, *, cpu: bool) -> None:
    """Become process `number` of `processes` on this machine, which meet in the file `meeting`; returns once all are there.

    A file and no port: no race for a free one, and nothing listens to the network.
    """
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in places.items()})
    import torch

    if not cpu:
        torch.cuda.set_device(number)
    torch.distributed.init_process_group(
        "gloo" if cpu else "cpu:gloo,cuda:nccl", init_method=f"file://{meeting}", rank=number, world_size=processes
    )


def leave() -> None:
    """Part from the group."""
    sys.modules["torch"].distributed.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return int(sys.modules["torch"].distributed.get_world_size()) if _joined() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(sys.modules["torch"].distributed.get_rank()) if _joined() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def total(numbers: Sequence[int]) -> list[int]:
    """The sums over all processes; every one of them has to ask."""
    if not _joined():
        return list(numbers)
    import torch

    sums = torch.tensor(numbers, dtype=torch.int64)
    torch.distributed.all_reduce(sums)
    return [int(value) for value in sums]


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process through, and the others once it is done."""
    if not first():
        total([0])
    yield
    if _joined() and first():
        total([0])


def _joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
