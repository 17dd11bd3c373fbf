"""Where a step's output comes from: the command, the recipe's commit, the machine, and what the work took.

The runner says once how it was called (`invocation`, kept in the study's plan file); the process of a step measures the
step (`Meter`). What a machine does not tell is left out, never guessed.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from mixmerge.errors import reason
from mixmerge.machine import gpu_models, processor_model, usable_cores

VERSIONS = (
    *("mixmerge", "torch", "transformers", "trl", "tokenizers", "safetensors", "numpy"),
    *("peft", "accelerate", "datasets", "scikit-learn", "lm-eval"),
)
DRIVER = Path("/proc/driver/nvidia/version")
PROC = Path("/proc/self")
IO = {
    "rchar": "bytes_read",
    "wchar": "bytes_written",
    "read_bytes": "disk_bytes_read",
    "write_bytes": "disk_bytes_written",
}
MB = 1 << 20
PEAK_UNIT = MB if sys.platform == "darwin" else 1024  # of getrusage(2), in a MB
NO_REPOSITORY = "not a git repository"
GIT_S = 20  # a repository on a slow disk


def invocation(recipe: str) -> dict[str, Any]:
    """How this process was called: its words, its folder, the recipe, and the commit of the recipe's folder."""
    told: dict[str, Any] = {"argv": list(sys.argv), "folder": str(Path.cwd())}
    if (own := own_git(Path(__file__).resolve())) is not None:
        told["mixmerge_git"] = own
    return told | ({"recipe": recipe, "git": git_state(Path(recipe))} if recipe else {})


def git_state(recipe: Path) -> dict[str, Any] | None:
    """The commit of the repository that the recipe is in, and whether anything there differs from it; None outside of one.

    Files that git does not know make no difference (outputs lie about), but for the recipe itself. Where git does not tell
    the commit, it is None, and `why` is what git says.
    """
    commit, why = _git(recipe.parent, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None if NO_REPOSITORY in why else {"commit": None, "why": why}
    changed, _ = _git(recipe.parent, "status", "--porcelain", "--untracked-files=no")
    known, _ = _git(recipe.parent, "ls-files", "--error-unmatch", "--", recipe.name)
    return {"commit": commit.strip(), "dirty": changed is None or bool(changed.strip()) or known is None}


def own_git(module: Path) -> dict[str, Any] | None:
    """As `git_state`, of mixmerge itself where it runs from a checkout; None where it is installed."""
    known, _ = _git(module.parent, "ls-files", "--error-unmatch", "--", module.name)
    return None if known is None else git_state(module)


class Meter:
    """Measures the work of one step in this process, from now on; other steps may have been done in it before."""

    def __init__(self) -> None:
        with suppress(OSError):
            (PROC / "clear_refs").write_text("5")  # the peak begins anew
        self._torch = _cuda()
        if self._torch is not None:
            self._torch.reset_peak_memory_stats()
        self._io, self._began, self.started = _io(), time.perf_counter(), time.time()
        self._largest_child = _largest_child()

    def read(self) -> dict[str, Any]:
        """Seconds, peak memory, and bytes read and written, also by processes that the step started and waited for.

        `bytes_` are those that were asked of the system, `disk_bytes_` those that a disk had to move.
        """
        found: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.perf_counter() - self._began, 3),
            "peak_rss_mb": _peak_mb(),
        }
        if (largest := _largest_child()) > self._largest_child:  # else it is that of an earlier step
            found["peak_rss_of_a_child_mb"] = round(largest / PEAK_UNIT, 1)
        if (cuda := _cuda()) is not None:
            peaks = [cuda.max_memory_allocated(device) for device in range(cuda.device_count())]
            found["peak_gpu_mb"] = [round(peak / MB, 1) for peak in peaks]
        now = _io()
        return found | {name: now[name] - self._io[name] for name in now if name in self._io}


def machine() -> dict[str, Any]:
    """This machine and what is installed on it."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "processor": processor_model(),
        "cores": usable_cores(),
        "gpus": gpu_names(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS} | _of_cuda(),
    }


def gpu_names() -> list[str]:
    """The accelerators that torch uses in this process; where it uses none, those that the driver has on this machine."""
    if (cuda := _cuda()) is not None:
        return [str(cuda.get_device_name(device)) for device in range(cuda.device_count())]
    return list(gpu_models())


def seeds(what: Mapping[str, Any]) -> dict[str, int]:
    """Every seed in a step's settings, by its path."""
    return dict(_seeds(what, ""))


def _seeds(value: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            below = f"{path}.{key}" if path else str(key)
            if isinstance(inner, int) and (key == "seed" or str(key).endswith("_seed")):
                yield below, inner
            else:
                yield from _seeds(inner, below)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _seeds(inner, f"{path}.{index}")


def _git(folder: Path, *words: str) -> tuple[str | None, str]:
    """What git says there; None where it says no, is not installed, or takes too long, and why."""
    # no index is refreshed and no program of the repository's own settings is run
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=GIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return None, "git is not installed"
    except (OSError, subprocess.SubprocessError) as error:
        return None, reason(error)
    return (done.stdout, "") if done.returncode == 0 else (None, done.stderr.partition("\n")[0])


def _cuda() -> Any:
    """torch.cuda where torch is loaded and at work on a device; asking never starts it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _of_cuda() -> dict[str, str]:
    """The CUDA that torch was built for, where torch is loaded, and the NVIDIA driver of this machine, if any."""
    torch = sys.modules.get("torch")
    found = {"CUDA": str(torch.version.cuda)} if torch is not None and torch.version.cuda else {}
    with suppress(OSError, UnicodeDecodeError):
        driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", DRIVER.read_text(encoding="utf-8"))
        found |= {} if driver is None else {"NVIDIA driver": driver[1]}
    return found


def _peak_mb() -> float:
    """The most memory that this process held since its peak was begun anew, or else since its start."""
    with suppress(OSError, ValueError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", (PROC / "status").read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return round(int(found[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PEAK_UNIT, 1)


def _largest_child() -> int:
    """The most memory, in units of the system, that any process held which this one has started and waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _io() -> dict[str, int]:
    try:
        lines = (PROC / "io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    said = {name: number for name, _, number in (line.partition(": ") for line in lines)}
    return {name: int(said[key]) for key, name in IO.items() if said.get(key, "").isdecimal()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
