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
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mixmerge import kept
from mixmerge.errors import CheckpointError, UserError
from mixmerge.machine import usable_cores
from mixmerge.merge.block import Measured
from mixmerge.merge.card import languages_of, model_card, to_yaml
from mixmerge.merge.checkpoint import COPIED, ITEM_BYTES, Checkpoint, Tensor, as_json, files_like, read_json
from mixmerge.merge.config import load_config
from mixmerge.merge.engines import engine
from mixmerge.merge.models import Opened, foresee, open_models, with_zeros
from mixmerge.merge.record import RECORD, fingerprint, make_record
from mixmerge.merge.settings import MergeConfig, unmatched_filters
from mixmerge.merge.sources import Files, Raw, Source
from mixmerge.merge.targets import Plan, plan_targets
from mixmerge.merge.tensors import Crew, Target, Write, merge_tensor
from mixmerge.merge.tokenizer import TOKENIZER, choose_template, set_template
from mixmerge.merge.writer import CheckpointWriter, refuse_existing

SHARD_BYTES = 2_000_000_000
COPIED_AT_ONCE = 1 << 20  # elements
_OURS = re.compile(r"\.?\w[\w.-]*-[0-9a-f]{16}(\.partial)?")  # the folder of an earlier merge, finished or growing
_MEANING = 5  # raised when the same configuration and inputs would give other bytes than before


def merge(
    config: MergeConfig | Path | str,
    out: Path | str,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Merge models into a new folder and return what was measured.

    Run again after a kill it carries on from the tensors that are finished. `progress` gets parameters done and in all;
    `threads` defaults to the cores given to this process. `device` is where blocks are worked on, "cpu" or a torch device
    such as "cuda"; it changes no byte.

    Returns:
        method, seed, tensors, parameters; `kept_share` (methods that thin: elements kept) or `parallel_share` (slerp:
        tensors merged as parallel); `notes` where a person should know something; of this run alone bytes_read, bytes_written, seconds, and tensors_resumed.

    Raises:
        RecipeError: a configuration that cannot hold. ModelError: models that do not fit each other, a NaN or infinity.
        CheckpointError: a damaged file, a full disk.
    """
    began = time.monotonic()
    out = Path(out)
    if not isinstance(config, MergeConfig):
        config = load_config(config)
    refuse_existing(out)
    if not config.earlier:
        with closing(Files()) as files:
            measured = run(prepare(config, files), out, threads, progress, shard_bytes, device)
    else:
        measured = _run_chain(config, out, threads, progress, shard_bytes, device)
    return measured | {"seconds": time.monotonic() - began}


def _run_chain(
    config: MergeConfig,
    out: Path,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    shard_bytes: int,
    device: str,
) -> dict[str, Any]:
    """The named merges that feed the last, each into a folder of its own beside OUT until OUT is there, then the last.

    A folder has its merge's digest in its name: one that is there after a kill is this very merge's, where it has not changed.
    """
    earlier = out.absolute().parent / f".{out.absolute().name}.earlier"
    if earlier.exists() and not (earlier.is_dir() and all(_OURS.fullmatch(path.name) for path in earlier.iterdir())):
        raise CheckpointError("this folder is in the way and is not ours", where=str(earlier), do="move it away")
    folders, inputs = dict[str, Path](), dict[str, Any]()
    with closing(Files()) as files:
        total = sum(tensor.size for _, _, plan in foresee(config, files) for tensor in plan.outputs.values())
    done = bytes_read = bytes_written = resumed = 0
    notes: list[str] = []

    def counted(now: int, whole: int, before: int = 0) -> None:
        if progress is not None:
            progress(before + now, max(total, before + whole))

    try:
        for one in (*config.earlier, config):
            with closing(Files()) as files:
                job = replace(prepare(one, files, folders), before=dict(inputs))
                inputs |= job.inputs
                place = out if one is config else earlier / f"{one.name}-{job.digest(shard_bytes)[:16]}"
                folders[str(one.name)] = place
                if one is config or kept.marked(place) is None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    if one is not config:
                        shutil.rmtree(place, ignore_errors=True)
                    onward = partial(counted, before=done)
                    measured = run(job, place, threads, onward, shard_bytes, device, mark=one is not config)
                    bytes_read += measured["bytes_read"]
                    bytes_written += measured["bytes_written"]
                    resumed += measured["tensors_resumed"]
                done += sum(tensor.size for tensor in job.plan.outputs.values())
                notes += job.notes
    except UserError:  # running again would end the same way
        shutil.rmtree(earlier, ignore_errors=True)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    told = {"notes": list(dict.fromkeys(notes))} if notes else {}
    return measured | told | {"bytes_read": bytes_read, "bytes_written": bytes_written, "tensors_resumed": resumed}


def run(
    job: Job,
    out: Path,
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
    *,
    mark: bool = False,
) -> dict[str, Any]:
    """One merge whose models are all there, into its folder, with a `mark` if it is to be carried on from."""
    outputs, config = job.outputs, job.config
    digest = job.digest(shard_bytes)
    counting = _Counting(progress, sum(tensor.size for tensor in outputs.values()))
    with (
        staff(job, threads, device) as crew,
        CheckpointWriter(out, outputs, job=digest, shard_bytes=shard_bytes) as writer,
    ):
        resumed = dict(writer.finished)
        counting.add(sum(outputs[name].size for name in resumed))
        notes = resumed | _work(job, crew, writer, counting)
        measured: dict[str, Any] = {
            "method": config.merge_method,
            "seed": config.seed,
            "tensors": len(outputs),
            "parameters": counting.total,
        }
        if told := job.notes:
            measured["notes"] = list(told)
        if config.method.share is not None:
            part, whole = (math.fsum(note[i] for note in notes.values()) for i in range(2))
            measured[config.method.share] = part / whole if whole else 0.0
        writer.publish(companions(job) | _told(job, measured), mark=mark)
    return measured | {
        "bytes_read": crew.bytes_read,
        "bytes_written": writer.bytes_written,
        "tensors_resumed": len(resumed),
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
    opened: Opened
    plan: Plan
    template: str | None = None
    before: Mapping[str, Any] = field(default_factory=dict)  # inputs of the merges that feed this one

    @property
    def inputs(self) -> dict[str, Any]:
        """The fingerprint of every model that is read, by its name."""
        return {model.name: fingerprint(model) for model in self.models}

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """All that are read, the donor first, each once; those that only give rows of tokens last."""
        vocabulary = self.opened.vocabulary
        outside = () if vocabulary is None else vocabulary.outside
        return (*(model.checkpoint for model in self.opened.models.values()), *outside)

    @property
    def donor(self) -> Checkpoint:
        return self.models[0]

    @property
    def fingerprints(self) -> list[str]:
        return [part.fingerprint() for part in (*self.models, self.opened.vocabulary) if part is not None]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about this merge."""
        vocabulary = self.opened.vocabulary
        names = {*self.outputs, *(name for model in self.models for name in model.tensors)}
        notes = (*self.config.notes, *unmatched_filters(self.config, names))
        return (*notes, *(() if vocabulary is None else vocabulary.notes))

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(self.plan.targets.values())

    @property
    def copied(self) -> Mapping[str, Source]:
        return self.plan.copied

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self.plan.outputs

    def digest(self, shard_bytes: int) -> str:
        """A hash of all that decides the bytes of the output."""
        identity = [_MEANING, self.config.to_mergekit(), self.fingerprints, shard_bytes]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read_for(self, name: str) -> tuple[Source, ...]:
        """What is read to make an output tensor."""
        return (self.copied[name],) if name in self.copied else self.plan.targets[name].read

    def make(self, name: str, crew: Crew, write: Write) -> Measured:
        """Merge or copy one output tensor into `write`."""
        if name in self.copied:
            source = self.copied[name]
            _copy(source, Tensor(source.dtype, source.shape).size, write)
            return Measured()
        return merge_tensor(self.plan.targets[name], crew, write)


def staff(job: Job, threads: int | None, device: str = "cpu") -> Crew:
    """Threads with memory for the widest of a job's tensors."""
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    widest = max((target.at.row for target in job.targets if target.method.rows), default=0)
    most = max((len(target.sources) for target in job.targets), default=0)
    works = engine(device)
    return Crew(threads or works.threads or usable_cores(), most, widest, engine=works)


def prepare(config: MergeConfig, files: Files, folders: Mapping[str, Path] | None = None) -> Job:
    """Open and check all that a merge reads; `folders`: those of the named merges before it."""
    opened = open_models(config, files, folders or {})
    template = None
    if config.chat_template is not None:
        beside = [model.checkpoint.folder for model in opened.models.values()]
        template = choose_template(config.chat_template, beside)
    return Job(config, opened, plan_targets(config, opened.models), template)


def foreseen_jobs(config: MergeConfig, files: Files) -> list[Job]:
    """A merge after all that feed it, to be looked at: results that are not there yet read as zeros."""
    return [Job(one, opened, with_zeros(plan)) for one, opened, plan in foresee(config, files)]


def _copy(source: Source, size: int, write: Write) -> None:
    item = ITEM_BYTES[source.dtype]
    raw = np.empty(min(size, COPIED_AT_ONCE) * item, np.uint8)
    for start in range(0, size, COPIED_AT_ONCE):
        piece = raw[: min(COPIED_AT_ONCE, size - start) * item]
        source.read(start, piece)
        write(start, piece)


def companions(job: Job) -> dict[str, bytes | Path]:
    """The files beside the weights that loaders read: configuration and tokenizer of the donor; and the merge configuration."""
    folder, vocabulary = job.donor.folder, job.opened.vocabulary
    files = files_like(folder, COPIED if vocabulary is None else set(COPIED) - set(TOKENIZER))
    generation = folder / "generation_config.json"
    if generation.exists():
        files[generation.name] = generation
    if vocabulary is not None:
        files |= vocabulary.files()
        if generation.exists():
            held = read_json(generation)
            renumbered = vocabulary.numbering.renumbered(held, vocabulary.numbering.generation)
            files[generation.name] = generation if held == renumbered else as_json(renumbered)
    if job.template is not None:
        files = set_template(files, job.template)
    files["config.json"] = _config_json(job)
    files["mergekit_config.yml"] = to_yaml(job.config).encode()
    return files


def _told(job: Job, measured: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """Our card and the record."""
    files: dict[str, bytes | Path] = {}
    files["README.md"] = model_card(job.config, measured, languages_of(model.folder for model in job.models)).encode()
    files[RECORD] = (
        json.dumps(make_record(job.config, {**job.before, **job.inputs}, measured), indent=2).encode() + b"\n"
    )
    return files


def _config_json(job: Job) -> bytes:
    """The donor's config.json; only what the merge made untrue is changed."""
    stored, config = job.config.out_dtype or job.config.dtype, job.opened.describe(job.plan.config)
    if stored is not None:
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text | {key: stored for key in ("dtype", "torch_dtype") if key in text}
        config |= {key: stored for key in ("dtype", "torch_dtype") if key in config} or {"dtype": stored}
    file = job.donor.folder / "config.json"
    return file.read_bytes() if read_json(file) == config else as_json(config)
