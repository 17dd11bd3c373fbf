"""The merge itself: models stream through a method block by block, into a folder that appears whole.

The one idea: everything is checked first (configuration, headers, every parameter at every tensor, free space); then each
tensor is measured and combined in blocks on a pool of threads, and its blocks are written in order.
Invariants: memory does not grow with the model; no NaN or infinity gets in or out; threads, kills and runs that carry on
change no byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge.align import Agreed, agree
from mixmerge.merge.card import model_card, to_yaml
from mixmerge.merge.checkpoint import (
    COPIED,
    Checkpoint,
    Tensor,
    encode,
    locate_model,
    open_checkpoint,
)
from mixmerge.merge.config import load_config
from mixmerge.merge.methods import At, Block, Float32, Measured
from mixmerge.merge.settings import MergeConfig, layer_depths
from mixmerge.merge.writer import CheckpointWriter, Shard, refuse_existing

BLOCK = 1 << 16  # elements: float64 copies of a few inputs fit a core's cache
SHARD_BYTES = 2_000_000_000  # a killed merge starts again from the last whole shard
_UNDER_WAY = 64  # blocks waiting to be written or worked on: bounds memory, keeps up to half as many threads busy
_MEANING = 1  # raised when the same configuration and inputs would give other bytes than before

T = TypeVar("T")
A = TypeVar("A")


def merge(
    config: MergeConfig | Path,
    out: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Merge models into a new folder and return what was measured.

    Run again after a kill it carries on from the shards that are whole. `progress` gets parameters done and in all;
    `threads` defaults to the cores given to this process.

    Returns:
        method, seed, tensors, parameters; `kept_share` (ties, dare_ties: elements kept) or `parallel_share` (slerp:
        tensors merged as parallel); of this run alone bytes_read, bytes_written, seconds, and shards_resumed.

    Raises:
        RecipeError: a configuration that cannot hold. ModelError: models that do not fit each other, a NaN or infinity.
        CheckpointError: a damaged file, a full disk.
    """
    began = time.monotonic()
    if not isinstance(config, MergeConfig):
        config = load_config(config)
    refuse_existing(out)
    job = _prepare(config)
    identity = json.dumps([_MEANING, config.to_mergekit(), [m.fingerprint() for m in job.models], shard_bytes])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    writer = CheckpointWriter(out, job.outputs, job=digest, shard_bytes=shard_bytes)
    total, done, resumed = sum(tensor.size for tensor in job.outputs.values()), 0, 0
    part = whole = 0.0
    _keep_freed_memory()
    with writer.discarding(ModelError), ThreadPoolExecutor(threads or _cores()) as pool:
        for shard in writer.shards:
            note = writer.finished(shard)
            if note is None:
                note = {"part": 0.0, "whole": 0.0}
                writer.write(shard, _shard(job, shard, pool, note, _counting(progress, done, total)), note)
            else:
                resumed += 1
            done += sum(tensor.size for tensor in shard.tensors.values())
            part, whole = part + note["part"], whole + note["whole"]
            if progress is not None:
                progress(done, total)
    measured: dict[str, Any] = {
        "method": config.merge_method,
        "seed": config.seed,
        "tensors": len(job.outputs),
        "parameters": total,
    }
    if config.method.share is not None:
        measured[config.method.share] = part / whole if whole else 0.0
    writer.publish(_companions(job, measured))
    return measured | {
        "bytes_read": job.meter.bytes,
        "bytes_written": writer.bytes_written,
        "shards_resumed": resumed,
        "seconds": time.monotonic() - began,
    }


@dataclass(slots=True)
class _Meter:
    bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self.lock:
            self.bytes += count


@dataclass(frozen=True, slots=True)
class _Job:
    """A merge in which everything has been checked that can be without reading the tensors."""

    config: MergeConfig
    models: tuple[Checkpoint, ...]  # the donor first, each once
    base: Checkpoint | None
    inputs: tuple[Checkpoint, ...]
    agreed: Agreed
    at: Mapping[str, At]
    outputs: Mapping[str, Tensor]
    meter: _Meter = field(default_factory=_Meter)

    @property
    def donor(self) -> Checkpoint:
        return self.models[0]


def _prepare(config: MergeConfig) -> _Job:
    inputs = [entry.model for entry in config.inputs]
    names = dict.fromkeys([config.donor, *inputs])
    opened = {name: open_checkpoint(locate_model(name, config.folder), name) for name in names}
    donor = opened[config.donor]
    agreed = agree(list(opened.values()))
    depths = layer_depths(donor.tensors)
    at = {name: config.at(name, donor.tensors[name].size, depths[name]) for name in agreed.merged}
    outputs = {name: Tensor(donor.tensors[name].dtype, donor.tensors[name].shape) for name in agreed.copied}
    for name in agreed.merged:
        outputs[name] = Tensor(config.stored_dtype or donor.tensors[name].dtype, donor.tensors[name].shape)
    base = None if config.base is None else opened[config.base]
    return _Job(config, tuple(opened.values()), base, tuple(opened[name] for name in inputs), agreed, at, outputs)


def _shard(
    job: _Job, shard: Shard, pool: ThreadPoolExecutor, note: dict[str, float], count: Callable[[int], None]
) -> Iterator[bytes]:
    """The bytes of a shard's tensors in order; what the method measured is added to `note`."""
    for name, tensor in shard.tensors.items():
        if name in job.agreed.copied:
            for start in range(0, tensor.size, BLOCK):
                size = min(BLOCK, tensor.size - start)
                yield bytes(job.donor.read_bytes(name, start, size))
                count(size)
            continue
        for piece in _tensor(job, name, tensor, pool, note):
            yield piece
            count(len(piece) * tensor.size // tensor.bytes)


def _tensor(job: _Job, name: str, out: Tensor, pool: ThreadPoolExecutor, note: dict[str, float]) -> Iterator[bytes]:
    """Measure, then combine: the two passes over one tensor."""

    def read(index: int | None, start: int, size: int) -> Float32:
        model = job.base if index is None else job.inputs[index]
        assert model is not None, f"{job.config.merge_method} asked for a base that it does not require"
        values = model.read_floats(name, start, size)
        job.meter.add(size * model.tensors[name].bytes // model.tensors[name].size)
        if not np.isfinite(values).all():
            raise ModelError(
                f"tensor '{name}' holds NaN or infinity", where=model.name, do="take another checkpoint of it"
            )
        return values

    def block(start: int) -> Block:
        size = min(BLOCK, out.size - start)
        return Block(start, size, lambda index: read(index, start, size))

    def over(function: Callable[[Block], A]) -> Iterator[A]:
        def apply(start: int) -> A:
            # what overflows is infinite where it is stored, and refused there
            with np.errstate(over="ignore"):
                return function(block(start))

        return _in_order(pool, apply, range(0, out.size, BLOCK))

    method, at = job.config.method, job.at[name]
    measured = method.measure(over, at) if method.measure is not None else Measured()
    note["part"] += measured.part
    note["whole"] += measured.whole

    def combine(piece: Block) -> bytes:
        stored, finite = encode(method.combine(piece, at, measured.statistic), out.dtype)
        if not finite:
            do = "store a wider dtype (out_dtype: bfloat16 or float32), or use smaller weights"
            raise ModelError(f"the merged tensor '{name}' does not fit {out.dtype}", do=do)
        return stored

    return over(combine)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[A], T], items: Iterable[A]) -> Iterator[T]:
    """Map on the pool, results in the order of the items, with few enough under way that memory stays flat."""
    under_way: deque[Future[T]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > _UNDER_WAY:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _keep_freed_memory() -> None:
    """Free one large array: glibc then stops giving every block's memory back, which cost half of the time."""
    np.empty(16 << 20, np.uint8)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _counting(progress: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    def count(parameters: int) -> None:
        nonlocal done
        done = min(total, done + parameters)
        if progress is not None:
            progress(done, total)

    return count


def _companions(job: _Job, measured: Mapping[str, Any]) -> dict[str, bytes | Path]:
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
    return files


def _config_json(job: _Job) -> bytes:
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
