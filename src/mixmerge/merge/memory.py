"""Merging state dicts that are in memory, into new tensors or into those of a loaded model.

The one idea: a tensor in memory is one more `Source`, and a tensor to be filled one more place to write, so methods,
checks and numbers are those of `merge`. An element is written after all that it is made from has been read, so the
target may be one of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import ModelError, RecipeError, did_you_mean
from mixmerge.merge.align import Model
from mixmerge.merge.checkpoint import ITEM_BYTES, Checkpoint, Tensor
from mixmerge.merge.config import parse_config
from mixmerge.merge.models import without_twins
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Raw, Source
from mixmerge.merge.stream import Job, staff
from mixmerge.merge.targets import plan_targets

if TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, as its raw bytes."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Raw

    def read(self, start: int, into: Raw) -> int:
        place = start * ITEM_BYTES[self.dtype]
        into[:] = self.data[place : place + into.size]
        return 0

    def ahead(self) -> None:
        pass


def merge_state_dicts(
    models: Mapping[str, StateDict],
    config: MergeConfig | Mapping[str, Any],
    *,
    into: StateDict | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Merge state dicts by a configuration that calls them by their keys in `models`.

    Without `into` the tensors are new, on the CPU. With it, they are those of `into`, filled in place: each must have the
    name, shape and dtype of the result. Tensors of other devices are copied to the CPU and back. The order of names is
    that of the base, else of the first model.

    Raises:
        RecipeError: a configuration that cannot hold, names a model that is not there, or is more than whole models.
        ModelError: tensors that do not fit each other or `into` (nothing is written then), or NaN or infinity in an input
            or result (`into` may then hold part of the merge).
    """
    if not isinstance(config, MergeConfig):
        config = parse_config(config)
    if not config.models or config.earlier or config.vocabulary or config.chat_template:
        do = "merge folders with mixmerge.merge for slices, modules, several merges, tokenizers or chat templates"
        raise RecipeError("state dicts are merged whole", where=config.where(), do=do)
    for name in config.references:
        if name not in models:
            raise RecipeError(f"there is no state dict '{name}'", where=config.where(), do=did_you_mean(name, models))
    opened = {name: _hold(name, models[name]) for name in config.references}
    together = without_twins(opened)
    job = Job(config, together, plan_targets(config, together.models))
    order = [name for name in opened[config.donor].tensors if name in job.outputs]
    results = {name: _empty(tensor) for name, tensor in job.outputs.items() if into is None}
    if into is not None:
        _require_fitting(job.outputs, into)
        results = {name: into[name].detach() for name in job.outputs}
    with staff(job, threads, device) as crew:
        for name in order:
            target = results[name]
            direct = target.device.type == "cpu" and target.is_contiguous()
            filled = target if direct else _empty(job.outputs[name])
            data, item = _bytes(filled), ITEM_BYTES[job.outputs[name].dtype]

            def write(start: int, raw: Raw, data: Raw = data, item: int = item) -> None:
                data[start * item : start * item + raw.size] = raw

            job.make(name, crew, write)
            if not direct:
                target.copy_(filled)
    return {name: results[name] for name in order}


def _hold(name: str, tensors: StateDict) -> Model:
    held: dict[str, Source] = {}
    for tensor_name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        shape = tuple(whole.shape)
        held[tensor_name] = Held(name, tensor_name, _name_of(whole.dtype, tensor_name, name), shape, _bytes(whole))
    return Model(Checkpoint(name, Path(), {n: Tensor(s.dtype, s.shape) for n, s in held.items()}, {}), held)


def _require_fitting(outputs: Mapping[str, Tensor], into: StateDict) -> None:
    for name, tensor in outputs.items():
        if name not in into:
            raise ModelError(f"there is no tensor '{name}' to merge into", do="give a model of the same architecture")
        found = (_name_of(into[name].dtype, name, "into"), tuple(into[name].shape))
        if found != (tensor.dtype, tensor.shape):
            what = f"tensor '{name}' to merge into is {found[0]} {list(found[1])}, the result {tensor.dtype} "
            raise ModelError(f"{what}{list(tensor.shape)}", do="set out_dtype, or give a model that fits")


def _bytes(tensor: torch.Tensor) -> Raw:
    """The storage of a contiguous CPU tensor as flat bytes, shared."""
    import torch

    data: Raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return data


def _empty(tensor: Tensor) -> torch.Tensor:
    import torch

    dtypes = {name: dtype for dtype, name in _dtypes().items()}
    return torch.empty(tensor.shape, dtype=dtypes[tensor.dtype])


def _name_of(dtype: torch.dtype, tensor: str, model: str) -> str:
    try:
        return _dtypes()[dtype]
    except KeyError:
        raise ModelError(f"tensor '{tensor}' is {dtype}, which cannot be merged or copied", where=model) from None


def _dtypes() -> dict[torch.dtype, str]:
    """torch's dtypes by the names of safetensors."""
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
