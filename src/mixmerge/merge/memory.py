"""Merging state dicts that are in memory, into new tensors or into those of a loaded model.

The one idea: a tensor in memory is one more `Source`, and a tensor to be filled one more place to write, so methods,
checks and numbers are those of `merge`. An element is written after all that it is made from has been read, so the
target may be one of the inputs; memory that would be written before it is read is refused. Names of one tensor (tied
embeddings) are merged once, under the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixmerge.errors import ModelError, RecipeError, did_you_mean
from mixmerge.merge.align import Model
from mixmerge.merge.checkpoint import ITEM_BYTES, Checkpoint, Tensor, dtype_names
from mixmerge.merge.config import parse_config
from mixmerge.merge.models import without_twins
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Raw, Source
from mixmerge.merge.stream import Job, staff
from mixmerge.merge.targets import plan_targets
from mixmerge.merge.tensors import Write

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
    that of the base, else of the first model. Names that stand for one tensor in all models do so in the result, and the
    first of them counts for filters and random draws.

    Raises:
        RecipeError: a configuration that cannot hold, names a model that is not there, or is more than whole models.
        ModelError: what is not a state dict of dense tensors; tensors that do not fit each other or `into`, or that would be
            written before they are read (nothing is written then); or NaN or infinity in an input
            or result (`into` may then hold part of the merge).
    """
    if not isinstance(config, MergeConfig):
        config = parse_config(config)
    _require_mergeable(config, models)
    twins = _twins(models[config.donor], [models[name] for name in config.references])
    opened = {name: _hold(name, models[name], twins) for name in config.references}
    together = without_twins(opened)
    job = Job(config, together, plan_targets(config, together.models))
    outputs = job.outputs
    beside: dict[str, torch.Tensor] = {}
    if into is None:
        results = {name: _empty(tensor) for name, tensor in outputs.items()}
    else:
        results = _targets(outputs, into, twins)
        beside = {
            name: into[name].detach()
            for name, first in twins.items()
            if first in results and name in into and not _is_one(into[name], results[first])
        }
        _require_apart(results | beside, opened)
    with staff(job, threads, device) as crew:
        for name in opened[config.donor].tensors:
            if name in outputs:
                _fill(results[name], outputs[name], partial(job.make, name, crew))
    for name, first in twins.items():
        if first in results:
            results[name] = beside[name].copy_(results[first]) if name in beside else results[first]
    return {name: results[name] for name in models[config.donor] if name in results}


def _fill(target: torch.Tensor, tensor: Tensor, make: Callable[[Write], object]) -> None:
    """Have a result made in the memory of its target, or beside it where raw elements cannot be put there."""
    direct = target.device.type == "cpu" and target.is_contiguous() and not target.is_neg()
    filled = target if direct else _empty(tensor)
    data, item = _bytes(filled), ITEM_BYTES[tensor.dtype]

    def write(start: int, raw: Raw) -> None:
        data[start * item : start * item + raw.size] = raw

    make(write)
    if not direct:
        target.copy_(filled)


def _require_mergeable(config: MergeConfig, models: Mapping[str, StateDict]) -> None:
    """Refuse a configuration of more than whole models, and what is no state dict under the names it calls."""
    if not config.models or config.earlier or config.vocabulary or config.chat_template:
        do = "merge folders with mixmerge.merge for slices, modules, several merges, tokenizers or chat templates"
        raise RecipeError("state dicts are merged whole", where=config.where(), do=do)
    for name in config.references:
        if name not in models:
            raise RecipeError(f"there is no state dict '{name}'", where=config.where(), do=did_you_mean(name, models))
    for name in config.references:
        _require_tensors(name, models[name])


def _require_tensors(name: str, tensors: Any) -> None:
    import torch

    if not isinstance(tensors, Mapping):
        what = f"a {type(tensors).__name__} is not a state dict"
        raise ModelError(what, where=name, do="give a mapping of names to tensors: of a module, its state_dict()")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            what = f"{key!r} is a {type(tensor).__name__}, not a torch tensor under its name"
            raise ModelError(what, where=name, do="of numpy arrays make tensors with torch.from_numpy")
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
            layout = "a nested tensor" if tensor.is_nested else f"stored as {tensor.layout}"
            kind = "on the meta device" if tensor.device.type == "meta" else layout
            raise ModelError(f"tensor '{key}' is {kind}", where=name, do="give dense tensors that hold their elements")


def _is_one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two names stand for one tensor, as those of tied embeddings do."""
    return a is b or (
        a.numel() > 0
        and (a.device, a.data_ptr(), a.dtype, a.shape, a.stride())
        == (b.device, b.data_ptr(), b.dtype, b.shape, b.stride())
    )


def _twins(donor: StateDict, models: Sequence[StateDict]) -> dict[str, str]:
    """Names of tensors that are the tensor of an earlier name, in every state dict that has both: {name: that name}."""
    first: dict[tuple[Any, ...], str] = {}
    twins: dict[str, str] = {}
    for name, tensor in donor.items():
        other = first.setdefault((tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape), name)
        if other != name and all(
            _is_one(model[name], model[other]) for model in models if name in model and other in model
        ):
            twins[name] = other
    return twins


def _targets(outputs: Mapping[str, Tensor], into: StateDict, twins: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors to fill, by the names of what fills them; of twins either name may be there."""
    _require_tensors("into", into)
    others = {first: name for name, first in twins.items() if name in into}
    found = {name: name if name in into else others.get(name, name) for name in outputs}
    _require_fitting({found[name]: tensor for name, tensor in outputs.items()}, into)
    _require_fitting({name: outputs[first] for name, first in twins.items() if first in outputs and name in into}, into)
    return {name: into[place].detach() for name, place in found.items()}


class _Span(NamedTuple):
    """The memory of a tensor, from address `begin` to before `end`: of an input of `model`, or (None) to merge into."""

    device: str
    begin: int
    end: int
    name: str
    model: str | None = None


def _require_apart(targets: Mapping[str, torch.Tensor], models: Mapping[str, Model]) -> None:
    """Refuse targets in each other's memory, or in that of an input which is read for another tensor."""
    spans = [_span(name, tensor) for name, tensor in targets.items()]
    for model, held in models.items():
        for name, source in held.tensors.items():
            if isinstance(source, Held):
                begin = source.data.ctypes.data
                spans.append(_Span("cpu", begin, begin + source.data.size, name, model))
    reaching: list[_Span] = []
    for span in sorted((span for span in spans if span.end > span.begin), key=lambda span: span[:3]):
        reaching = [other for other in reaching if other.device == span.device and other.end > span.begin]
        for other in reaching:
            _require_harmless(other, span)
        reaching.append(span)


def _span(name: str, tensor: torch.Tensor) -> _Span:
    """The memory of a tensor to merge into, whose elements must not share any."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            raise ModelError(f"the elements of tensor '{name}' to merge into share their memory", do=_OWN_MEMORY)
        last += (size - 1) * stride
    begin, elements = tensor.data_ptr(), last + 1 if tensor.numel() else 0
    return _Span(str(tensor.device), begin, begin + elements * tensor.element_size(), name)


def _require_harmless(first: _Span, second: _Span) -> None:
    """Refuse two that overlap where one is written, unless it is the very tensor that it is made from."""
    target, other = (first, second) if first.model is None else (second, first)
    if target.model is not None:
        return
    if other.model is None:
        what = f"tensors '{first.name}' and '{second.name}' to merge into lie in each other's memory, and the result has two"
        raise ModelError(what, do=_OWN_MEMORY)
    if (target.begin, target.end, target.name) != (other.begin, other.end, other.name):
        what = f"tensor '{target.name}' to merge into lies in the memory of '{other.name}' of '{other.model}'"
        raise ModelError(f"{what}, which is read for another", do=_OWN_MEMORY)


def _hold(name: str, tensors: StateDict, twins: Mapping[str, str]) -> Model:
    held: dict[str, Source] = {}
    for tensor_name, tensor in tensors.items():
        if twins.get(tensor_name) in tensors:
            continue
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
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

    dtypes = {name: dtype for dtype, name in dtype_names().items()}
    return torch.empty(tensor.shape, dtype=dtypes[tensor.dtype])


def _name_of(dtype: torch.dtype, tensor: str, model: str) -> str:
    try:
        return dtype_names()[dtype]
    except KeyError:
        raise ModelError(f"tensor '{tensor}' is {dtype}, which cannot be merged or copied", where=model) from None


_OWN_MEMORY = "give tensors that have memory of their own, or merge into none and copy the result"
