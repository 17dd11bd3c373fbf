"""Two looks at a merge that write nothing: is this model what its record says, and what would this merge read and write?

The one idea: both are the merge itself with another sink: one compares each stretch with what lies on the disk, the
other throws a sample of the work away and keeps the time that it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mixmerge.errors import CheckpointError, RecipeError
from mixmerge.merge.checkpoint import ITEM_BYTES, open_checkpoint
from mixmerge.merge.config import parse_config
from mixmerge.merge.record import fingerprint, read_record
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Files, Raw, stored
from mixmerge.merge.stream import prepare, staff
from mixmerge.merge.tensors import Target, merge_tensor
from mixmerge.yaml import Marks

SAMPLE = 1 << 23  # elements that a rehearsal merges to learn the speed
NAMED = 5  # differing tensors that a message names


def verify(
    model: Path, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Compute the merge that made `model` again and compare every byte of its weights; nothing is written.

    Returns:
        tensors, parameters, seconds: all of them are the same.

    Raises:
        CheckpointError: no record; a file of several merges made it; inputs that are not those of the record; or tensors that differ, which are named.
    """
    began = time.monotonic()
    record = read_record(model)
    if record.get("earlier"):
        what = f"it was made from results that are gone: {', '.join(record['earlier'])}"
        do = "merge its mergekit_config.yml into another folder, and compare the two"
        raise CheckpointError(what, where=str(model), do=do)
    config = parse_config(record["config"], Marks(str(Path(record["relative_to"]) / "record")))
    made = open_checkpoint(model)
    with closing(Files()) as files:
        job = prepare(config, files)
        for source in job.models:
            if fingerprint(source) != record["inputs"].get(source.name):
                what = f"model '{source.name}' is not the one that this merge was made from"
                raise CheckpointError(what, where=str(source.folder), do="put the old one back to compare")
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in job.outputs.items()}
        if wanted != {name: (tensor.dtype, tensor.shape) for name, tensor in made.tensors.items()}:
            raise CheckpointError("its tensors are not those of its record", where=str(model))
        there, done = stored(made, files), 0
        differing: list[str] = []
        with staff(job, threads) as crew:
            for name, (dtype, _) in wanted.items():
                item, same = ITEM_BYTES[dtype], [True]

                def compare(start: int, raw: Raw, name: str = name, same: list[bool] = same) -> None:
                    found = np.empty(raw.size, np.uint8)
                    there[name].read(start, found)
                    if not np.array_equal(found, raw):
                        same[0] = False

                job.make(name, crew, compare)
                done += made.tensors[name].bytes // item
                if not same[0]:
                    differing.append(name)
                if progress is not None:
                    progress(done, sum(tensor.size for tensor in made.tensors.values()))
    if differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        what = f"{len(differing)} of {len(wanted)} tensors differ from the merge of its record: "
        raise CheckpointError(f"{what}{', '.join(differing[:NAMED])}{more}", where=str(model), do="merge it again")
    return {"tensors": len(wanted), "parameters": done, "seconds": time.monotonic() - began}


def rehearse(config: MergeConfig, *, threads: int | None = None) -> dict[str, Any]:
    """What a merge would read and write; the work of a few tensors is done and thrown away to tell the time.

    Returns:
        method, models {name: bytes of its weights}, tensors, copied, parameters, bytes_read, bytes_written, and `seconds`, which holds as long as
        the disk keeps up.

    Raises:
        As `merge` does before it writes; and RecipeError for a file of several merges.
    """
    if config.earlier:
        names = ", ".join(f"'{merge.name}'" for merge in config.earlier)
        what = f"the last of several merges reads what {names} have yet to write"
        raise RecipeError(what, where=config.where(), do="put each merge into a file of its own to rehearse it")
    with closing(Files()) as files:
        job = prepare(config, files)
        with staff(job, threads) as crew:
            # the largest and the smallest say little: tensors around the middle, until there is enough
            ranked = sorted(job.targets, key=lambda target: target.size)
            sample: list[Target] = []
            for target in reversed(ranked[: len(ranked) * 3 // 4 + 1]):
                if sum(chosen.size for chosen in sample) < SAMPLE:
                    sample.append(target)
            for target in sample[-1:]:
                merge_tensor(target, crew, _nowhere)  # compile, open, warm up
            began = time.monotonic()
            for target in sample:
                merge_tensor(target, crew, _nowhere)
            taken = time.monotonic() - began
    merged, measured = sum(target.size for target in job.targets), sum(target.size for target in sample)
    read = {source for target in job.targets for source in target.read} | set(job.copied.values())
    notes = {"notes": list(job.notes)} if job.notes else {}
    return notes | {
        "method": config.merge_method,
        "models": {model.name: sum(tensor.bytes for tensor in model.tensors.values()) for model in job.models},
        "tensors": len(job.outputs),
        "copied": len(job.copied),
        "parameters": sum(tensor.size for tensor in job.outputs.values()),
        "bytes_read": sum(_bytes(source.dtype, source.shape) for source in read),
        "bytes_written": sum(tensor.bytes for tensor in job.outputs.values()),
        "seconds": taken * merged / measured if measured else 0.0,
    }


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]


def _nowhere(_: int, __: Raw) -> None:
    pass
