"""The merge itself: models stream through a method block by block, into a folder that appears whole.

The one idea: everything is checked first (configuration, headers, every parameter at every tensor, free space); then each
tensor is measured and combined in blocks on a pool of threads, and its blocks are written in order.
Invariants: memory does not grow with the model; no NaN or infinity gets in or out; threads, kills and runs that carry on
change no byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mixmerge.merge.adapters import open_model, sources_of
from mixmerge.merge.align import Agreed, agree
from mixmerge.merge.block import Measured
from mixmerge.merge.card import model_card, to_yaml
from mixmerge.merge.checkpoint import COPIED, ITEM_BYTES, Checkpoint, Tensor
from mixmerge.merge.config import load_config
from mixmerge.merge.record import RECORD, make_record
from mixmerge.merge.settings import MergeConfig, layer_depths
from mixmerge.merge.sources import Files, Raw, Source
from mixmerge.merge.tensors import Crew, Target, Write, merge_tensor
from mixmerge.merge.writer import CheckpointWriter, refuse_existing

SHARD_BYTES = 2_000_000_000
COPIED_AT_ONCE = 1 << 20  # elements
_MEANING = 3  # raised when the same configuration and inputs would give other bytes than before


def merge(
    config: MergeConfig | Path,
    out: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Merge models into a new folder and return what was measured.

    Run again after a kill it carries on from the tensors that are finished. `progress` gets parameters done and in all;
    `threads` defaults to the cores given to this process.

    Returns:
        method, seed, tensors, parameters; `kept_share` (methods that thin: elements kept) or `parallel_share` (slerp:
        tensors merged as parallel); of this run alone bytes_read, bytes_written, seconds, and tensors_resumed.

    Raises:
        RecipeError: a configuration that cannot hold. ModelError: models that do not fit each other, a NaN or infinity.
        CheckpointError: a damaged file, a full disk.
    """
    began = time.monotonic()
    if not isinstance(config, MergeConfig):
        config = load_config(config)
    refuse_existing(out)
    files = Files()
    with closing(files):
        job = prepare(config, files)
        outputs = job.outputs
        identity = json.dumps([_MEANING, config.to_mergekit(), [m.fingerprint() for m in job.models], shard_bytes])
        digest = hashlib.sha256(identity.encode()).hexdigest()
        writer = CheckpointWriter(out, outputs, job=digest, shard_bytes=shard_bytes)
        counting = _Counting(progress, sum(tensor.size for tensor in outputs.values()))
        with staff(job, threads) as crew, writer:
            resumed = dict(writer.finished)
            counting.add(sum(outputs[name].size for name in resumed))
            notes = resumed | _work(job, crew, writer, counting)
            measured: dict[str, Any] = {
                "method": config.merge_method,
                "seed": config.seed,
                "tensors": len(outputs),
                "parameters": counting.total,
            }
            if config.method.share is not None:
                part, whole = (math.fsum(note[i] for note in notes.values()) for i in range(2))
                measured[config.method.share] = part / whole if whole else 0.0
            writer.publish(_companions(job, measured))
    return measured | {
        "bytes_read": crew.bytes_read,
        "bytes_written": writer.bytes_written,
        "tensors_resumed": len(resumed),
        "seconds": time.monotonic() - began,
    }


def _work(job: Job, crew: Crew, writer: CheckpointWriter, counting: _Counting) -> dict[str, tuple[float, float]]:
    """Make every tensor that is not finished yet, in the order of the files; what each measured."""
    notes: dict[str, tuple[float, float]] = {}
    names = [name for name in writer.tensors if name not in writer.finished]
    for name, following in zip_longest(names, names[1:]):
        for source in job.read_for(following) if following is not None else ():
            source.ahead()

        def write(start: int, raw: Raw, name: str = name) -> None:
            writer.write(name, start, raw)
            counting.add(len(raw) // ITEM_BYTES[writer.tensors[name].dtype])

        measured = job.make(name, crew, write)
        notes[name] = (float(measured.part), float(measured.whole))
        writer.finish(name, notes[name])
    return notes


class _Counting:
    """Parameters done, told from any thread."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.total, self._done, self._progress, self._lock = total, 0, progress, threading.Lock()

    def add(self, parameters: int) -> None:
        with self._lock:
            self._done += parameters
            if self._progress is not None:
                self._progress(self._done, self.total)


@dataclass(frozen=True, slots=True)
class Job:
    """A merge in which everything has been checked that can be without reading the tensors."""

    config: MergeConfig
    models: tuple[Checkpoint, ...]  # the donor first, each once
    agreed: Agreed
    targets: tuple[Target, ...]
    copied: Mapping[str, Source]

    @property
    def donor(self) -> Checkpoint:
        return self.models[0]

    @property
    def outputs(self) -> dict[str, Tensor]:
        merged = {target.name: Tensor(target.dtype, target.shape) for target in self.targets}
        return merged | {name: Tensor(source.dtype, source.shape) for name, source in self.copied.items()}

    def read_for(self, name: str) -> tuple[Source, ...]:
        """What is read to make an output tensor."""
        if name in self.copied:
            return (self.copied[name],)
        return next((target.read for target in self.targets if target.name == name), ())

    def make(self, name: str, crew: Crew, write: Write) -> Measured:
        """Merge or copy one output tensor into `write`."""
        if name in self.copied:
            source = self.copied[name]
            _copy(source, Tensor(source.dtype, source.shape).size, write)
            return Measured()
        return merge_tensor(next(target for target in self.targets if target.name == name), crew, write)


def staff(job: Job, threads: int | None) -> Crew:
    """Threads with memory for the widest of a job's tensors."""
    widest = max((target.at.row for target in job.targets if target.method.rows), default=0)
    most = max((len(target.sources) for target in job.targets), default=0)
    return Crew(threads or _cores(), most, widest)


def prepare(config: MergeConfig, files: Files) -> Job:
    names = dict.fromkeys([config.donor, *(entry.model for entry in config.inputs)])
    opened = {name: open_model(name, config.folder) for name in names}
    agreed = agree(list(opened.values()))
    donor = opened[config.donor]
    sources = {name: sources_of(checkpoint, files) for name, checkpoint in opened.items()}
    depths = layer_depths(donor.tensors)
    targets = [
        Target(
            name,
            donor.tensors[name].shape,
            config.stored_dtype or donor.tensors[name].dtype,
            config.method,
            config.at(name, donor.tensors[name].shape, depths[name]),
            tuple(sources[entry.model][name] for entry in config.inputs),
            None if config.base is None else sources[config.base][name],
        )
        for name in agreed.merged
    ]
    copied = {name: sources[config.donor][name] for name in agreed.copied}
    return Job(config, tuple(opened.values()), agreed, tuple(targets), copied)


def _copy(source: Source, size: int, write: Write) -> None:
    item = ITEM_BYTES[source.dtype]
    raw = np.empty(min(size, COPIED_AT_ONCE) * item, np.uint8)
    for start in range(0, size, COPIED_AT_ONCE):
        piece = raw[: min(COPIED_AT_ONCE, size - start) * item]
        source.read(start, piece)
        write(start, piece)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _companions(job: Job, measured: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """The files beside the weights: configuration and tokenizer of the donor, our card and the merge configuration."""
    folder = job.donor.folder
    files: dict[str, bytes | Path] = {
        path.name: path for pattern in COPIED for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    if (folder / "generation_config.json").exists():
        files["generation_config.json"] = folder / "generation_config.json"
    files["config.json"] = _config_json(job)
    files["mergekit_config.yml"] = to_yaml(job.config).encode()
    files["README.md"] = model_card(job.config, measured).encode()
    files[RECORD] = json.dumps(make_record(job.config, job.models, measured), indent=2).encode() + b"\n"
    return files


def _config_json(job: Job) -> bytes:
    """The donor's config.json; only what the merge made untrue is changed."""
    stored, config = job.config.out_dtype or job.config.dtype, dict(job.donor.config)
    if stored is None and not job.agreed.tied:
        return (job.donor.folder / "config.json").read_bytes()
    if stored is not None:
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text | {key: stored for key in ("dtype", "torch_dtype") if key in text}
        config |= {key: stored for key in ("dtype", "torch_dtype") if key in config} or {"dtype": stored}
    if job.agreed.tied:
        config["tie_word_embeddings"] = True
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
