"""One of the processes that train a model together: `python -m mixmerge.train.rank SPEC RANK`.

It calls the very training that a process alone calls. What the process that started it needs to know goes to standard output
as JSON lines: progress and result from the first, and from any how it failed; all else that is printed goes to the log.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from mixmerge.errors import MixmergeError, UserError, told
from mixmerge.events import Emit, take_stdout
from mixmerge.leaving import leave
from mixmerge.train import group
from mixmerge.train.methods import train_by
from mixmerge.train.settings import Devices

# What a process says when another one of its group is gone: never the cause.
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


def main(argv: list[str]) -> int:
    """Train as the file SPEC says, as process RANK of its group."""
    spec, rank = json.loads(Path(argv[0]).read_text(encoding="utf-8")), int(argv[1])
    emit = take_stdout()
    try:
        measured = train(spec, rank, emit)
    except Exception as error:
        traceback.print_exc()
        emit("failed", **failure(error))
        # Without the others, taking the group apart in good order would wait for them.
        sys.stderr.flush()
        os._exit(1)
    emit("done", measured=measured if rank == 0 else None)
    return 0


def failure(error: Exception) -> dict[str, Any]:
    """What is told of an error; `lost`: it only says that another process is gone."""
    lost = not isinstance(error, MixmergeError) and any(word in str(error).lower() for word in LOST)
    return told(error) | {"lost": lost}


def train(spec: dict[str, Any], rank: int, emit: Emit, *, joined: bool = False) -> dict[str, Any]:
    """Train as the `spec` says, as process `rank` of its group; `joined`: it is part of the group already."""
    import torch

    cpu = spec["device"] == "cpu" or not torch.cuda.is_available()
    devices = Devices(**spec["devices"])
    if joined:
        group.joined(devices)
    elif not cpu and torch.cuda.device_count() < devices.processes:
        what = f"{devices.processes} processes, and {torch.cuda.device_count()} CUDA device(s) here"
        raise UserError(what, where="how.processes", do="a process needs a device of its own")
    else:
        group.join(rank, devices, Path(spec["meeting"]), cpu=cpu)
    measured = train_by(
        spec["what"],
        Path(spec["model"]),
        Path(spec["mixture"]),
        Path(spec["out"]),
        work=Path(spec["work"]),
        cache=Path(spec["cache"]) if spec["cache"] else None,
        device=spec["device"],
        threads=spec["threads"],
        progress=(lambda done, total: emit("progress", done=done, total=total)) if rank == 0 else None,
        **spec["place"],
    )
    group.leave()
    return measured


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
