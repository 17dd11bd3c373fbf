"""What a machine has, what a step takes of it, and what is free: GPUs one by one, host memory in bytes.

Cores are shared out evenly, as threads for each of `jobs` steps. A step that wants more than the machine has gets all of it,
alone: it may be less greedy than it looks, and a step that never starts helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from mixmerge.errors import MixmergeError
from mixmerge.machine import gpu_models, named_gpus, usable_cores
from mixmerge.plan.graph import Step
from mixmerge.plan.work import ON_MODELS
from mixmerge.run.store import Store
from mixmerge.train.memory import settings_memory, shape_of
from mixmerge.train.settings import Devices, settings_from

RUNNING = 1 << 30  # bytes that a process with the libraries and a bounded block of work holds
LOADED = 1.3  # of a model's bytes: with its cache and what a batch needs
ON_DEVICE = ("train", "generate", "harness")


class Resources(NamedTuple):
    """Cores, bytes of memory that are free now, and GPUs by the names that CUDA_VISIBLE_DEVICES takes."""

    cores: int
    memory: int
    gpus: tuple[str, ...] = ()


class Demand(NamedTuple):
    """What a step takes: GPUs, and bytes of the host's memory."""

    gpus: int = 0
    memory: int = 0


class Share(NamedTuple):
    """What a step was given."""

    gpus: tuple[str, ...]
    memory: int


class Pool:
    """What is free of a machine."""

    def __init__(self, machine: Resources) -> None:
        self.machine = machine
        self._gpus, self._memory = list(machine.gpus), machine.memory

    def take(self, demand: Demand) -> Share | None:
        """What is wanted, or None while it is not free."""
        demand = Demand(min(demand.gpus, len(self.machine.gpus)), min(demand.memory, self.machine.memory))
        if demand.gpus > len(self._gpus) or demand.memory > self._memory:
            return None
        self._memory -= demand.memory
        gpus, self._gpus = self._gpus[: demand.gpus], self._gpus[demand.gpus :]
        return Share(tuple(gpus), demand.memory)

    def give(self, share: Share) -> None:
        """Take back what a step had."""
        self._memory += share.memory
        # in their old order, so that the same study uses the same devices
        self._gpus = [gpu for gpu in self.machine.gpus if gpu in {*self._gpus, *share.gpus}]


def free_here() -> Resources:
    """What this machine has free, as far as this process may use it."""
    named = named_gpus()
    gpus = map(str, range(len(gpu_models()))) if named is None else named
    return Resources(usable_cores(), psutil.virtual_memory().available, tuple(gpus))


def usual_jobs(machine: Resources) -> int:
    """Steps at once where nobody says: for each GPU one at work on it and one on the cores; else one, with all cores."""
    return max(1, 2 * len(machine.gpus))


def jobs_at_once(asked: int | None, machine: Resources) -> int:
    """Steps at once: what is asked, else the usual; no more than there are cores for, but for the usual of GPUs.

    >>> jobs_at_once(6, Resources(cores=2, memory=0)), jobs_at_once(None, Resources(cores=2, memory=0))
    (2, 1)
    """
    usual = usual_jobs(machine)
    return min(asked or usual, max(machine.cores, usual))


def demand_of_all(batch: Iterable[Step], demand: Callable[[Step], Demand]) -> Demand:
    """What a process takes that carries out these steps one after another."""
    demands = [demand(step) for step in batch]
    return Demand(max(d.gpus for d in demands), max(d.memory for d in demands))


def demand_of(step: Step, store: Store, machine: Resources) -> Demand:
    """What a step takes of this machine; its inputs are finished.

    A server that is started takes all GPUs, since its command says how many it shares its model out to. What runs on GPUs
    has its model in their memory, so that only loading counts.
    """
    if step.how.get("start") or (step.how.get("server") or {}).get("start"):
        return Demand(len(machine.gpus), RUNNING)
    works = step.kind in ON_DEVICE or (step.kind == "judge" and step.what.get("judge") in ON_MODELS)
    on_gpu = bool(machine.gpus) and works and step.how.get("device", "auto") != "cpu"
    gpus = int(step.how.get("processes", 1)) if on_gpu else 0
    return Demand(gpus, RUNNING + _model_memory(step, store, on_gpu=on_gpu))


def _model_memory(step: Step, store: Store, *, on_gpu: bool) -> int:
    folder = store.find(step.inputs["model"]) if "model" in step.inputs else None
    if folder is None or step.what.get("engine") == "command" or "server" in step.what:
        return 0
    size = _bytes_of(folder)
    if step.kind == "train" and not on_gpu:
        shape = None
        with suppress(MixmergeError):
            shape = shape_of(folder)
        if shape is not None:
            devices = Devices.of(step.how)
            checkpointing = bool(step.how.get("gradient_checkpointing"))
            needed = settings_memory(shape, settings_from(step.what), checkpointing=checkpointing, devices=devices)
            return needed.total * devices.processes
    return int(LOADED * size) * (int(step.how.get("processes", 1)) if step.kind == "generate" else 1)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
