"""Rough rates: how long a step takes where no earlier one here has shown it, from the size of the model and the data.

Each rate is stated below with what it was taken from. They are meant to tell minutes from days: the range of such an estimate
is a third to three times its value. Disk is told far better, since a model's bytes are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.machine import Machine
from mixmerge.plan.size import Size
from mixmerge.plan.work import PROMPT_TOKENS, READ, Work

SPREAD = 3.0
CORE = 80e9  # operations a second of a CPU core; 150M weights in bf16 on two cores of a server: 100e9 and 140e9 a core
CORE_BYTES = 20e9  # bytes a second from memory
# makers' data sheets: dense operations a second in 16 bits, bytes a second from memory
GPUS: Mapping[str, tuple[float, float]] = {
    "B200": (2250e12, 8.0e12),
    "H200": (990e12, 4.8e12),
    "H100": (990e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40": (181e12, 0.86e12),
    "A10": (125e12, 0.6e12),
    "L4": (121e12, 0.3e12),
    "V100": (125e12, 0.9e12),
    "T4": (65e12, 0.3e12),
    "4090": (165e12, 1.0e12),
}
ANY_GPU = (100e12, 1.0e12)
USED = 0.35  # share of the data sheet that trainings reach
MERGED = 150e6  # weights read a second and core, by methods of all kinds; 150M of two models took 2 to 10 s
# answers a second, of judges without a model; a refusal judge embeds each one
JUDGED = {
    "language": 2000.0,
    "quality": 400.0,
    "check": 2000.0,
    "paired-check": 2000.0,
    "refusal": 50.0,
    "ngrams": 2000.0,
}
ANSWER_TOKENS = 300  # read by a classifier or a guard for one verdict
STARTING = {"base": 2.0, "train": 8.0, "generate": 3.0, "harness": 15.0, "judge": 0.1, "score": 2.0, "report": 3.0}
LIBRARIES, FORKED = 15.0, 0.5  # torch, transformers and TRL; a process that has them: of a tiny study on two cores
DRAWN, COUNTED, UNPACKED = 20_000.0, 5_000.0, 30e6  # tokens of mixtures, verdicts of scores, bytes of bases: a second
FITTED = 30.0  # seconds to fit a judge
# bytes a token of a mixture or of an answer, and those of a row beside it
TOKEN_BYTES, ROW_BYTES, SCORED = 5.0, 300.0, 30.0


def rough_seconds(
    kind: str, what: Mapping[str, Any], how: Mapping[str, Any], work: Work, size: Size | None, on: Machine
) -> float | None:
    """Seconds by the rates above; None where they do not tell: a server elsewhere, tasks of unknown length."""
    if work.amount is None or not work.here or kind == "harness":
        return None
    gpus = gpus_of(how, work, on)
    operations, memory = _rates(on, gpus)
    seconds = {
        "train": work.amount / operations,
        "merge": work.amount / (MERGED * on.cores),
        "mixture": work.amount / DRAWN,
        "fit-judge": FITTED,
        "score": work.amount / COUNTED,
        "report": work.amount / COUNTED,
        "base": (0.0 if size is None else size.weight_bytes) / UNPACKED,
        "adopt": (0.0 if size is None else size.weight_bytes) / UNPACKED,
    }.get(kind)
    if kind == "generate" and size is not None:
        batches = math.ceil(how["prompts"] / how.get("batch_size", 1))
        seconds = work.amount / operations + batches * what["max_new_tokens"] * size.weight_bytes / memory
    if kind == "judge":
        seconds = _judging(what, how, work.amount, operations)
    return None if seconds is None else seconds + STARTING.get(kind, 0.5)


def rough_bytes(
    kind: str, what: Mapping[str, Any], how: Mapping[str, Any], work: Work, size: Size | None
) -> float | None:
    """Bytes that a step leaves on disk."""
    if kind in ("base", "adopt", "train", "merge"):
        if size is None:
            return None
        dtype = what.get("config", {}).get("dtype") or what.get("save_dtype")
        item = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(dtype))
        return float(size.weight_bytes if item is None else item * size.parameters)
    if work.bulk is None:
        return None
    if kind == "generate":
        return work.bulk * TOKEN_BYTES + float(how["prompts"]) * ROW_BYTES
    each = {"mixture": TOKEN_BYTES, "judge": ROW_BYTES, "score": SCORED, "report": ROW_BYTES}
    return work.bulk * each.get(kind, 100_000.0)


def rough_starting(processes: int, on: Machine) -> float:
    """Seconds until so many processes, one after another, have loaded their libraries: where there is no GPU, they share them."""
    if processes == 0:
        return 0.0
    return LIBRARIES * (processes if on.gpus else 1) + FORKED * (0 if on.gpus else processes)


def gpus_of(how: Mapping[str, Any], work: Work, on: Machine) -> int:
    """How many GPUs a step takes: none where it is told to leave them, or there are none and it is not told to have one."""
    device = how.get("device", "auto")
    return 0 if device == "cpu" or (device == "auto" and not on.gpus) else work.gpus


def _rates(on: Machine, gpus: int) -> tuple[float, float]:
    if gpus == 0:
        return CORE * on.cores, CORE_BYTES
    # the longest name that fits: an L40 is no L4
    known = [name for name in GPUS if on.gpus and name in on.gpus[0]]
    peak, memory = GPUS[max(known, key=len)] if known else ANY_GPU
    return peak * USED * gpus, memory


def _judging(what: Mapping[str, Any], how: Mapping[str, Any], answers: float, operations: float) -> float | None:
    if what["judge"] in JUDGED:
        return answers / JUDGED[what["judge"]]
    if "path" not in how or not Path(how["path"]).is_dir():
        return None
    held = sum(file.stat().st_size for file in Path(how["path"]).glob("*.safetensors"))
    return answers * READ * (ANSWER_TOKENS + PROMPT_TOKENS) * held / 2 / operations
