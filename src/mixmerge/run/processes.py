"""Which process this is, and whether another one that said so of itself is still there.

A pid means something only within one boot of one kernel and one process namespace (a container has its own), and may be
given to another process later: so boot, namespace and the moment of birth are told with it. That moment is counted from the
boot where the system tells it so, since a clock that is set moves every other one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PROC = Path("/proc")
BIRTH = 19  # of the fields of /proc/<pid>/stat after the name: clock ticks since the boot
ENDED = "ZXx"  # states of a process that is over and only waits to be asked how


def this_process() -> dict[str, Any]:
    """What tells this process from every other one."""
    pid = os.getpid()
    return {"host": socket.gethostname(), **_namespace(), "pid": pid, "born": _born(pid)}


def alive(told: Mapping[str, Any]) -> bool | None:
    """Whether the process that said this of itself is there; None where that cannot be seen from here."""
    own = {"host": socket.gethostname(), **_namespace()}
    same = ("boot", "namespace") if own["boot"] is not None else ("host",)
    if not all(told.get(key) == own[key] for key in same) or not isinstance(told.get("pid"), int):
        return None
    try:
        born = _born(told["pid"])
    except PermissionError:
        return None
    return born is not None and born == told.get("born")


@cache
def _namespace() -> dict[str, str | None]:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"boot": boot, "namespace": str((PROC / "self/ns/pid").readlink())}
    except OSError:  # no Linux
        return {"boot": None, "namespace": None}


def _born(pid: int) -> float | None:
    """When a process of this namespace began; None if it is over.

    Raises:
        PermissionError: it is there and hidden, being another user's.
    """
    if _namespace()["boot"] is None:
        return _born_by_the_clock(pid)
    try:
        fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
        raise PermissionError(pid) from None
    return None if fields[0] in ENDED else float(fields[BIRTH])


def _born_by_the_clock(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError):
        return None
