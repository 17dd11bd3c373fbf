"""One of the processes that Ray Train starts: the training of `mixmerge.train.rank`, heard by a queue on the cluster."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from mixmerge.train.rank import failure, train
from mixmerge.train.together import PRINTED


def in_process_of_ray(config: dict[str, Any]) -> None:
    """What Ray Train calls in each process, which is part of the group already."""
    from ray.train import get_context

    rank, said, spec = get_context().get_world_rank(), config["said"], Path(config["spec"])
    with (spec.parent / f"{PRINTED}{rank}").open("ab") as printed:
        for stream in (1, 2):  # until the process ends
            os.dup2(printed.fileno(), stream)

    def emit(event: str, **data: Any) -> None:
        said.put({"rank": rank, "event": event, **data})

    if rank == 0:
        emit("began")
    try:
        given = json.loads(spec.read_text(encoding="utf-8")) | {"device": config["device"]}
        measured = train(given, rank, emit, joined=True)
    except Exception as error:
        os.write(2, traceback.format_exc().encode(errors="replace"))  # Ray would print it twice
        os.fsync(2)  # another node reads it
        told = failure(error)
        if told["lost"]:
            raise  # another one died: all start again
        emit("failed", **told)
        return
    emit("done", measured=measured if rank == 0 else None)
