"""What a merge says to a person: one line for what was done, a few for what would be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def merged(found: Mapping[str, Any], out: Path) -> str:
    rate = found["bytes_read"] / max(found["seconds"], 1e-9)
    again = f", {found['tensors_resumed']} tensors were there already" if found["tensors_resumed"] else ""
    return (
        f"{out}: {found['parameters']:,} parameters in {found['tensors']} tensors by {found['method']}, "
        f"{found['seconds']:.1f} s ({amount(rate)}/s read){again}"
    )


def verified(found: Mapping[str, Any], model: Path) -> str:
    return (
        f"{model}: all {found['tensors']} tensors ({found['parameters']:,} parameters) and the files beside them are byte "
        f"for byte the merge of its record, {found['seconds']:.1f} s"
    )


def rehearsed(found: Mapping[str, Any]) -> str:
    models = "\n".join(f"  {name}: {amount(size)}" for name, size in found["models"].items())
    copied = f", {found['copied']} of them copied" if found["copied"] else ""
    return (
        f"{found['method']} would merge {len(found['models'])} models:\n{models}\n"
        f"read {amount(found['bytes_read'])}, write {amount(found['bytes_written'])}: "
        f"{found['parameters']:,} parameters in {found['tensors']} tensors{copied}\n"
        f"about {found['seconds']:.1f} s of work, more if the disk is slower; nothing was written"
    )


def amount(size: float) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
