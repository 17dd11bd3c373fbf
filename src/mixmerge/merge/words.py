"""What a merge says to a person: one line for what was done, a few for what would be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.amounts import in_bytes


def merged(found: Mapping[str, Any], out: Path) -> str:
    rate = found["bytes_read"] / max(found["seconds"], 1e-9)
    again = f", {found['tensors_resumed']} tensors were there already" if found["tensors_resumed"] else ""
    return (
        f"{out}: {found['parameters']:,} parameters in {found['tensors']} tensors by {found['method']}, "
        f"{found['seconds']:.1f} s ({in_bytes(rate)}/s read){again}"
    )


def verified(found: Mapping[str, Any], model: Path) -> str:
    return (
        f"{model}: all {found['tensors']} tensors ({found['parameters']:,} parameters) and the files beside them are byte "
        f"for byte the merge of its record, {found['seconds']:.1f} s"
    )


def rehearsed(found: Mapping[str, Any]) -> str:
    models = "\n".join(f"  {name}: {in_bytes(size)}" for name, size in found["models"].items())
    copied = f", {found['copied']} of them copied" if found["copied"] else ""
    return (
        f"{found['method']} would merge {len(found['models'])} models:\n{models}\n"
        f"read {in_bytes(found['bytes_read'])}, write {in_bytes(found['bytes_written'])}: "
        f"{found['parameters']:,} parameters in {found['tensors']} tensors{copied}\n"
        f"about {found['seconds']:.1f} s of work, more if the disk is slower; nothing was written"
    )
