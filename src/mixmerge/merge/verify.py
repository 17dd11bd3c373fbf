"""Two looks at a merge that write nothing: is this model what its record says, and what would this merge read and write?

The one idea: both are the merge itself with another sink: one compares each stretch with what lies on the disk, the
other throws a sample of the work away and keeps the time that it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mixmerge.errors import CheckpointError, RecipeError
from mixmerge.merge.checkpoint import INDEX, Checkpoint, Tensor, open_checkpoint
from mixmerge.merge.config import parse_config
from mixmerge.merge.record import RECORD, read_record
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Files, Raw, Source, stored
from mixmerge.merge.stream import Job, companions, foreseen_jobs, prepare, run, staff
from mixmerge.merge.tensors import Crew, Target, merge_tensor
from mixmerge.yaml import Marks

SAMPLE = 1 << 23  # elements that a rehearsal merges to learn the speed
NAMED = 5  # differing tensors that a message names
READ = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".py", ".model"}  # what loaders may take up


def verify(
    model: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compute the merge that made `model` again and compare every byte, but of its card; nothing is left behind.

    Of a file of several merges, those that feed the last are made again in a hidden folder beside the model, and removed.

    Returns:
        tensors, parameters, seconds: all of them are the same.

    Raises:
        CheckpointError: no record; inputs that are not those of the record; or tensors or files that differ, which are named.
    """
    began = time.monotonic()
    record = read_record(model)
    marks = Marks(str(Path(record["relative_to"]) / "record"))
    held = [parse_config(one, marks) for one in (*record["earlier"], record["config"])]
    *earlier, config = (replace(one, pickles=bool(record.get("pickles"))) for one in held)
    made = open_checkpoint(model)
    with ExitStack() as stack:
        files = stack.enter_context(closing(Files()))
        folders: dict[str, Path] = {}
        if earlier:
            hidden = TemporaryDirectory(prefix=f".{model.absolute().name}.", dir=model.absolute().parent)
            folders = _made_again(earlier, Path(stack.enter_context(hidden)), record, threads, device)
        job = prepare(replace(config, earlier=tuple(earlier)), files, folders)
        _require_inputs(job, record)
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in job.outputs.items()}
        if wanted != {name: (tensor.dtype, tensor.shape) for name, tensor in made.tensors.items()}:
            raise CheckpointError("its tensors are not those of its record", where=str(model))
        with staff(job, threads, device) as crew:
            differing = _differing(job, crew, stored(made, files), progress)
        others = _other_files(model, made, job)
    if differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        what = f"{len(differing)} of {len(wanted)} tensors differ from the merge of its record: "
        raise CheckpointError(
            f"{what}{', '.join(differing[:NAMED])}{more}",
            where=str(model),
            do="merge it again; or an input was changed in a few places",
        )
    if others:
        what = f"the tensors are those of its record, and these files are not: {', '.join(others)}"
        raise CheckpointError(what, where=str(model), do="merge it again, or put the files back")
    parameters = sum(tensor.size for tensor in made.tensors.values())
    return {"tensors": len(wanted), "parameters": parameters, "seconds": time.monotonic() - began}


def _made_again(
    earlier: Sequence[MergeConfig], scratch: Path, record: Mapping[str, Any], threads: int | None, device: str
) -> dict[str, Path]:
    """The merges that feed the last one, made in a folder, by their names."""
    folders: dict[str, Path] = {}
    for one in earlier:
        with closing(Files()) as files:
            job = prepare(one, files, folders)
            _require_inputs(job, record)
            folders[str(one.name)] = scratch / str(one.name)
            run(job, folders[str(one.name)], threads, device=device)
    return folders


def _differing(
    job: Job, crew: Crew, there: Mapping[str, Source], progress: Callable[[int, int], None] | None
) -> list[str]:
    """The tensors of a merge, made again, that are not byte for byte those that are there."""
    outputs, done = job.outputs, 0
    total = sum(tensor.size for tensor in outputs.values())
    differing: set[str] = set()
    for name, tensor in outputs.items():

        def compare(start: int, raw: Raw, name: str = name) -> None:
            found = np.empty(raw.size, np.uint8)
            there[name].read(start, found)
            if not np.array_equal(found, raw):
                differing.add(name)

        job.make(name, crew, compare)
        done += tensor.size
        if progress is not None:
            progress(done, total)
    return [name for name in outputs if name in differing]


def _other_files(model: Path, made: Checkpoint, job: Job) -> list[str]:
    """What lies beside the weights and is not what the merge writes, or is more that loaders read."""
    found, beside = [], companions(job)
    for name, content in sorted(beside.items()):
        wanted, path = content if isinstance(content, bytes) else content.read_bytes(), model / name
        if not path.is_file():
            found.append(f"{name} (gone)")
        elif path.read_bytes() != wanted:
            found.append(name)
    known = {*beside, "README.md", RECORD, INDEX, *(tensor.file.name for tensor in made.tensors.values())}
    others = (path.relative_to(model) for path in sorted(model.rglob("*")) if path.is_file())
    strange = (path for path in others if path.suffix in READ or path.name in ("merges.txt", "vocab.txt"))
    return found + [f"{path} (added)" for path in strange if str(path) not in known]


def _require_inputs(job: Job, record: Mapping[str, Any]) -> None:
    for name, found in job.inputs.items():
        if found != record["inputs"].get(name):
            what = f"model '{name}' is not the one that this merge was made from"
            folder = next(model.folder for model in job.models if model.name == name)
            raise CheckpointError(what, where=str(folder), do="put the old one back to compare")


def rehearse(config: MergeConfig, *, threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """What a merge would read and write; the work of a few tensors is done and thrown away to tell the time.

    Of a file of several merges, all of them in sum; a result that is not there yet is rehearsed with zeros in its place.

    Returns:
        method, models {name: bytes of its weights}, tensors, copied, parameters, bytes_read, bytes_written, and `seconds`, which holds as long as
        the disk keeps up. Tensors, copied and parameters are those of the last merge.

    Raises:
        As `merge` does before it writes; RecipeError where a merge aligns the tokens of a result that is not there yet.
    """
    with closing(Files()) as files:
        jobs = foreseen_jobs(config, files) if config.earlier else [prepare(config, files)]
        if len(jobs) <= len(config.earlier):
            what = "which tokens this merge meets is known once the earlier merges are made"
            raise RecipeError(what, where=config.where(), do="put each merge into a file of its own to rehearse it")
        told = [_rehearsed(job, threads, device) for job in jobs]
    made = {str(one.name) for one in config.earlier}
    models = {name: size for one in told for name, size in one["models"].items() if name not in made}
    sums = {key: sum(one[key] for one in told) for key in ("bytes_read", "bytes_written", "seconds")}
    notes = list(dict.fromkeys(note for one in told for note in one.get("notes", ())))
    return told[-1] | sums | {"models": models} | ({"notes": notes} if notes else {})


def _rehearsed(job: Job, threads: int | None, device: str) -> dict[str, Any]:
    with staff(job, threads, device) as crew:
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
    read = [source for target in job.targets for source in target.read] + list(job.copied.values())
    notes = {"notes": list(job.notes)} if job.notes else {}
    return notes | {
        "method": job.config.merge_method,
        "models": {model.name: sum(tensor.bytes for tensor in model.tensors.values()) for model in job.models},
        "tensors": len(job.outputs),
        "copied": len(job.copied),
        "parameters": sum(tensor.size for tensor in job.outputs.values()),
        "bytes_read": sum(Tensor(source.dtype, source.shape).bytes for source in read),
        "bytes_written": sum(tensor.bytes for tensor in job.outputs.values()),
        "seconds": taken * merged / measured if measured else 0.0,
    }


def _nowhere(_: int, __: Raw) -> None:
    pass
