"""What kind of machine this is, told without torch: its processor, cores and GPUs.

Shared by `run/`, which shares it out and writes it into records, `plan/`, which learns from records of the same kind, and
`merge/`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/gpus")
CPUINFO = Path("/proc/cpuinfo")
SHOWN = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Machine:
    """Two machines of one kind do the same work in about the same time."""

    processor: str
    cores: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def of_record(cls, provenance: Mapping[str, Any]) -> Machine | None:
        """The machine of a step's record; None where the record does not tell it, as those of earlier mixmerge: no processor."""
        gpus = provenance.get("gpus")
        if gpus is None and str(provenance.get("versions", {}).get("torch", "")).endswith("+cpu"):
            gpus = ()
        if gpus is None or "processor" not in provenance or "cores" not in provenance:
            return None
        return cls(str(provenance["processor"]), int(provenance["cores"]), tuple(gpus))

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
    return Machine(processor_model(), usable_cores(), visible(gpu_models(), os.environ.get(SHOWN)))


@cache
def processor_model() -> str:
    """The processor's name as its maker gives it; where the system does not tell, its architecture."""
    with suppress(OSError):
        found = re.search(
            r"^model name[ \t]*:[ \t]*(\S.*?)\s*$", CPUINFO.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible(gpus: tuple[str, ...], said: str | None) -> tuple[str, ...]:
    """The GPUs that are left by what CUDA_VISIBLE_DEVICES says: the first name that is none of them ends the list.

    >>> visible(("A", "B"), None), visible(("A", "B"), "1"), visible(("A",), ""), visible(("A", "B"), "0,-1,1")
    (('A', 'B'), ('B',), (), ('A',))
    """
    if said is None:
        return gpus
    words = _named(said)
    if any(not re.fullmatch(r"-?\d+", word) for word in words):
        return gpus[: len(words)]  # by UUID
    shown = takewhile(lambda number: 0 <= number < len(gpus), map(int, words))
    return tuple(gpus[number] for number in shown)


def named_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, as it names them; None where it is not set."""
    said = os.environ.get(SHOWN)
    return None if said is None else _named(said)


def _named(said: str) -> list[str]:
    """As CUDA reads it: what is empty or -1 ends the list."""
    return list(takewhile(lambda name: name not in ("", "-1"), (part.strip() for part in said.split(","))))


@cache
def gpu_models() -> tuple[str, ...]:
    """The model of each GPU that the driver lists, in its order, none where there is no driver.

    torch is not asked: it would take the devices.
    """
    if (program := shutil.which("nvidia-smi")) is not None:
        with suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(
                [program, "-L"], capture_output=True, encoding="utf-8", timeout=20, check=True
            ).stdout
            return tuple(re.findall(r"^GPU \d+: (.+?)(?: \(UUID: .*)?$", listed, re.MULTILINE))
    names = []
    for told in sorted(DRIVER.glob("*/information")):
        with suppress(OSError):
            text = told.read_text(encoding="utf-8", errors="replace")
            names += re.findall(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
    return tuple(names)
