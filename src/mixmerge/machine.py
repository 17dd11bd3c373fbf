"""What kind of machine this is, told without torch: its processor, cores and GPUs.

Shared by `run/`, which writes it into records, and `plan/`, which learns from records of the same kind.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Machine:
    """Two machines of one kind do the same work in about the same time."""

    processor: str
    cores: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def of_record(cls, provenance: Mapping[str, Any]) -> Machine | None:
        """The machine of a step's record; None where the record does not tell it."""
        gpus = provenance.get("gpus")
        if gpus is None and str(provenance.get("versions", {}).get("torch", "")).endswith("+cpu"):
            gpus = ()
        if gpus is None or "machine" not in provenance or "cores" not in provenance:
            return None
        return cls(str(provenance["machine"]), int(provenance["cores"]), tuple(gpus))

    def of_kind(self, other: Machine) -> bool:
        """Whether they do the same work in about the same time, on as many GPUs."""
        mine, theirs = (self.processor, self.cores, {*self.gpus}), (other.processor, other.cores, {*other.gpus})
        return mine == theirs

    def __str__(self) -> str:
        cores = f"{self.cores} cores of {self.processor}"
        kinds = {name: self.gpus.count(name) for name in self.gpus}
        return ", ".join([cores, *(f"{count} {name}" for name, count in kinds.items())])


def this_machine() -> Machine:
    """The machine that this process runs on, with the cores and GPUs that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(platform.machine(), cores, visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")))


def visible(gpus: tuple[str, ...], said: str | None) -> tuple[str, ...]:
    """The GPUs that are left by what CUDA_VISIBLE_DEVICES says.

    >>> visible(("A", "B"), None), visible(("A", "B"), "1"), visible(("A",), "")
    (('A', 'B'), ('B',), ())
    """
    if said is None:
        return gpus
    words = [word.strip() for word in said.split(",") if word.strip()]
    if all(word.isdecimal() for word in words):
        return tuple(gpus[int(word)] for word in words if int(word) < len(gpus))
    return gpus[: len(words)]  # by UUID


@cache
def _gpus() -> tuple[str, ...]:
    """The names of the GPUs as the driver tells them; none where there is no driver."""
    found = []
    for file in sorted(DRIVER.glob("*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    if found or not Path("/dev/nvidiactl").exists():
        return tuple(found)
    try:  # a container may see the devices and not the driver's folder
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, encoding="utf-8", timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in told.splitlines() if line.strip())
