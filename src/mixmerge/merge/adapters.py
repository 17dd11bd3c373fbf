"""LoRA adapters folded into their models as the tensors are read: `model+adapter` is one more model of a merge.

The one idea: a folded matrix is gain * (W + scale * left @ right), so a stretch of it needs its rows of `left` and the
whole of `right`, and no folded model is ever written. What an adapter carries whole (modules_to_save, biases) stands in
for the model's own tensor. Invariants: the result is what PEFT computes at inference, in float64, rounded once to float32;
every tensor of the adapter finds its place, and what cannot be folded is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge import kernels
from mixmerge.merge.align import HEAD, says_tied
from mixmerge.merge.block import Float32, Float64
from mixmerge.merge.checkpoint import (
    FLOATS,
    Checkpoint,
    Tensor,
    config_says,
    locate_model,
    open_checkpoint,
    read_header,
    read_json,
)
from mixmerge.merge.sources import Files, Raw, Source, Stored, read_decoded, stored

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STRETCH = 1 << 18  # elements at a time while DoRA's norms are summed

# of adapter_config.json: what is read here, and what says how the training went and changes no result
_READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights"}
_TOLD = {"r", "rank_pattern", "bias", "lora_bias", "modules_to_save", "target_modules", "exclude_modules"}
_TOLD |= {"layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "task_type", "auto_mapping"}
_TOLD |= {"base_model_name_or_path", "revision", "peft_version", "ensure_weight_tying", "megatron_core"}
_TOLD |= {"eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"}
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # they leave the model's own weights alone

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)


@dataclass(frozen=True, slots=True)
class Fold:
    """How one tensor changes. `right` is (r, columns) and `left` (rows, r), or both lie transposed where `swapped`.

    A bias has no `left`: its change is `right` alone. DoRA's `magnitude` is one number per output of the layer.
    """

    scale: float
    right: Tensor
    left: Tensor | None = None
    swapped: bool = False
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FoldedCheckpoint(Checkpoint):
    """A model with an adapter on it. `tensors` are the model's own, or the adapter's where it carries them whole."""

    adapter: Path = Path()
    folds: Mapping[str, Fold] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder, self.adapter)

    @property
    def files(self) -> list[Path]:
        parts = (
            part for fold in self.folds.values() for part in (fold.right, fold.left, fold.magnitude) if part is not None
        )
        return sorted({self.adapter / CONFIG, *(tensor.file for tensor in (*self.tensors.values(), *parts))})


def split_reference(reference: str, relative_to: Path) -> tuple[str, str | None]:
    """The model and the adapter of `model[@revision][+adapter[@revision]]`; a folder's own name may hold a plus.

    Raises:
        ModelError: an empty part, or more than one adapter.
    """
    if "+" not in reference or (relative_to / Path(reference).expanduser()).is_dir():
        return reference, None
    model, *adapters = reference.split("+")
    if not model or not all(adapters):
        raise ModelError(f"'{reference}' lacks a part", do="a model with an adapter is MODEL+ADAPTER")
    if len(adapters) > 1:
        do = "fold the first into a model of its own (a linear merge of that one model), and put the next on its output"
        raise ModelError(f"'{reference}' names {len(adapters)} adapters, and one can be folded at a time", do=do)
    return model, adapters[0]


def open_model(reference: str, relative_to: Path, *, pickles: bool = False) -> Checkpoint:
    """Read and check the headers of a model, and of the adapter that its reference puts on it.

    Raises:
        ModelError: a folder that cannot be used, or an adapter that does not fit the model or cannot be folded.
        CheckpointError: a damaged file.
    """
    model, adapter = split_reference(reference, relative_to)
    if adapter is None:
        return open_checkpoint(locate_model(model, relative_to, pickles=pickles), model, pickles=pickles)
    checkpoint = open_checkpoint(locate_model(model, relative_to, pickles=pickles), reference, pickles=pickles)
    return _put_on(checkpoint, locate_model(adapter, relative_to, pickles=pickles), pickles)


def sources_of(checkpoint: Checkpoint, files: Files) -> dict[str, Source]:
    """Every tensor of a model as a source, with its adapter folded in."""
    found: dict[str, Source] = dict(stored(checkpoint, files))
    if isinstance(checkpoint, FoldedCheckpoint):
        held = _Held()
        for name, fold in checkpoint.folds.items():
            found[name] = Folded(found[name], fold, files, held)
    return found


class Folded:
    """A tensor with its part of an adapter folded in, as float32."""

    dtype = "F32"

    def __init__(self, base: Source, fold: Fold, files: Files, held: _Held) -> None:
        self.base, self.fold, self._files, self._held = base, fold, files, held
        self.model, self.name, self.shape = base.model, base.name, base.shape

    def ahead(self) -> None:
        self.base.ahead()

    def read(self, start: int, into: Raw) -> int:
        factors, made = self._held.of(self)
        out = into.view(np.float32)
        values, read = self.before_gain(start, len(out), factors.right)
        kernels.gain(values, start, self.shape[-1], factors.by_row, factors.by_column, out)
        return made + read

    def before_gain(self, start: int, size: int, right: Float32) -> tuple[Float64, int]:
        """W + scale * left @ right from flat index `start` on, and the bytes read for it."""
        columns = self.shape[-1]
        first, end = start // columns, -(-(start + size) // columns)
        base, read = read_decoded(self.base, start, size)
        left, left_read = self._left(first, end, len(right))
        values = np.empty(size, np.float64)
        kernels.low_rank(base, left, right, self.fold.scale, start - first * columns, values)
        return values, read + left_read

    def factor(self, tensor: Tensor) -> Stored:
        """A tensor of the adapter that belongs to this one."""
        return Stored(self.model, f"{self.name} (its adapter)", tensor, self._files)

    def _left(self, first: int, end: int, rank: int) -> tuple[Float32, int]:
        """Rows `first` .. `end` of `left`: float32 (end - first, r)."""
        if self.fold.left is None:
            return np.ones((1, 1), np.float32), 0
        left, rows = self.factor(self.fold.left), self.shape[0]
        if not self.fold.swapped:
            values, read = read_decoded(left, first * rank, (end - first) * rank)
            return values.reshape(-1, rank), read
        pieces = [read_decoded(left, k * rows + first, end - first) for k in range(rank)]
        return np.stack([values for values, _ in pieces], axis=1), sum(read for _, read in pieces)


@dataclass(frozen=True, slots=True)
class _Factors:
    """What every stretch of a folded tensor needs: `right`, and DoRA's gains by row or by column (empty: none)."""

    right: Float32
    by_row: Float64
    by_column: Float64


class _Held:
    """The factors of the one tensor that is being merged."""

    def __init__(self) -> None:
        self._lock, self._name = Lock(), ""
        self._factors: _Factors | None = None

    def of(self, folded: Folded) -> tuple[_Factors, int]:
        """The factors of this tensor, and the bytes read to make them now."""
        with self._lock:
            if self._factors is not None and self._name == folded.name:
                return self._factors, 0
            self._factors = None  # the old ones go before the new ones come
            factors, read = _factors(folded)
            self._factors, self._name = factors, folded.name
            return factors, read


def _factors(folded: Folded) -> tuple[_Factors, int]:
    fold, shape, none = folded.fold, folded.shape, np.empty(0, np.float64)
    values, read = read_decoded(folded.factor(fold.right), 0, fold.right.size)
    right = values.reshape(-1, shape[-1])
    if fold.swapped:
        right = np.ascontiguousarray(values.reshape(shape[-1], -1).T)
    if fold.magnitude is None:
        return _Factors(right, none, none), read
    squares = np.zeros(fold.magnitude.size, np.float64)
    for start in range(0, math.prod(shape), STRETCH):
        changed, got = folded.before_gain(start, min(STRETCH, math.prod(shape) - start), right)
        kernels.add_squares(changed, start, shape[-1], fold.swapped, squares)
        read += got
    magnitude, got = read_decoded(folded.factor(fold.magnitude), 0, fold.magnitude.size)
    with np.errstate(divide="ignore", invalid="ignore"):  # not finite, and refused with the tensor's name as it passes
        gain = magnitude / np.sqrt(squares)
    return _Factors(right, none if fold.swapped else gain, gain if fold.swapped else none), read + got


def _put_on(model: Checkpoint, folder: Path, pickles: bool) -> FoldedCheckpoint:
    """Find the place of every tensor of an adapter in the model, from the headers."""
    settings, held = _read_settings(folder), _headers(folder, pickles)
    twin = _shares_embedding(model) and settings.get("ensure_weight_tying")
    whole: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in held.items():
        if tensor.dtype not in FLOATS:
            raise _refusal(folder, f"tensor '{key}' is stored as {tensor.dtype}")
        path = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        part = _PART.fullmatch(path)
        module = part[1] if part else path.rpartition(".")[0]
        if twin and f"{module}.weight" == HEAD:
            continue  # PEFT keeps it equal to the embedding's, and the model has no such tensor
        if part:
            layers.setdefault(module, {})[part[2]] = tensor
        else:
            whole[_stand_in(path, tensor, model, folder)] = tensor
    tensors = {**model.tensors, **whole}
    folds: dict[str, Fold] = {}
    for module, parts in layers.items():
        name = _place(f"{module}.weight", model, folder)
        if name is None:
            raise _refusal(folder, f"it changes '{module}', and the model has no tensor '{module}.weight'")
        folds[name] = fold = _fold(module, parts, tensors[name], settings, _across(model, settings), folder)
        if "lora_B.bias" in parts:
            folds |= _fold_bias(name, fold.scale, parts["lora_B.bias"], tensors, folder)
    _require_kept_tie(settings, whole, folds, model, folder)
    rows = {tensor.shape[0] for name, tensor in whole.items() if tensor.shape != model.tensors.get(name, tensor).shape}
    config = with_vocab_size(model.config, max(rows)) if rows else model.config
    return FoldedCheckpoint(model.name, model.folder, tensors, config, folder, folds)


def _fold(
    module: str, parts: Mapping[str, Tensor], base: Tensor, settings: Mapping[str, Any], across: bool, folder: Path
) -> Fold:
    """The fold of a module's weight of this shape, from its parts of the adapter."""
    embedding = "lora_embedding_A" in parts
    a, b = (parts.get(f"lora_embedding_{x}" if embedding else f"lora_{x}.weight") for x in "AB")
    if a is None or b is None:
        raise _refusal(folder, f"of '{module}' it holds {', '.join(parts)}: one of lora_A and lora_B is missing")
    fits = len(a.shape) == len(b.shape) == len(base.shape) == 2 and a.shape[0] == b.shape[1] > 0
    straight, crossed = ((b.shape[0], a.shape[-1]) == shape for shape in (base.shape, base.shape[::-1]))
    swapped = crossed and (embedding or not straight or across)
    if not fits or not (swapped or straight) or base.dtype not in FLOATS:
        shapes = f"A {list(a.shape)} and B {list(b.shape)} on a {base.dtype} {list(base.shape)}"
        raise _refusal(folder, f"its part for '{module}' does not fit: {shapes}")
    _require_rank(module, a.shape[0], settings, folder)
    left, right = (a, b) if swapped else (b, a)
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(settings.get("use_dora")):
        said = f"use_dora is {bool(settings.get('use_dora'))}"
        raise _refusal(folder, f"{said}, and of '{module}' it holds {', '.join(parts)}")
    if magnitude is not None and magnitude.size != b.shape[0]:
        raise _refusal(folder, f"its magnitudes for '{module}' are {magnitude.size} where the layer has {b.shape[0]}")
    return Fold(_scale(module, a.shape[0], settings, folder), right, left, swapped, magnitude)


def _fold_bias(
    weight: str, scale: float, change: Tensor, tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Fold]:
    name = f"{weight.removesuffix('weight')}bias"
    if name not in tensors or tensors[name].shape != change.shape or tensors[name].dtype not in FLOATS:
        raise _refusal(folder, f"it changes the bias '{name}', and the model has none of its shape")
    return {name: Fold(scale, change)}


def _scale(module: str, rank: int, settings: Mapping[str, Any], folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    try:
        alpha = float(_by_pattern("alpha_pattern", module, settings, folder, settings.get("lora_alpha")))
    except ModelError:  # a ValueError too
        raise
    except (TypeError, ValueError) as error:
        raise _refusal(folder, f"{CONFIG} has no usable lora_alpha for '{module}'") from error
    if not math.isfinite(alpha):
        raise _refusal(folder, f"{CONFIG} gives '{module}' the lora_alpha {alpha}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _require_rank(module: str, rank: int, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter whose settings tell of another rank than its tensors have: its scale would be in doubt."""
    said = _by_pattern("rank_pattern", module, settings, folder, settings.get("r", rank))
    if said != rank:
        raise _refusal(folder, f"{CONFIG} gives '{module}' the rank {said!r}, and its tensors have {rank}")


def _by_pattern(kind: str, module: str, settings: Mapping[str, Any], folder: Path, default: Any) -> Any:
    """What PEFT takes for a module: the value of the first pattern of this kind that ends its name, else the default."""
    patterns = settings.get(kind) or {}
    if not isinstance(patterns, Mapping):
        raise _refusal(folder, f"the {kind} of {CONFIG} is no mapping", "correct it there")
    for pattern in patterns:
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, OverflowError, RecursionError) as error:
            what = f"{CONFIG} has the {kind} '{pattern}', which is no regular expression"
            raise _refusal(folder, what, "correct it there") from error
        if found is not None:
            return patterns[pattern]
    return default


def _place(path: str, model: Checkpoint, folder: Path) -> str | None:
    """The model's tensor of this path; where one was saved with a longer prefix, the one that ends alike."""
    if path in model.tensors:
        return path
    alike = [name for name in model.tensors if f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}")]
    if len(alike) > 1:
        raise _refusal(folder, f"its '{path}' could be any of {', '.join(alike[:3])} of the model")
    return alike[0] if alike else None


def _stand_in(path: str, tensor: Tensor, model: Checkpoint, folder: Path) -> str:
    """The name under which a tensor that the adapter carries whole stands in for the model's; rows may have been added."""
    name = _place(path, model, folder)
    if name is None:
        if path == HEAD:  # of a model that ties it: whether that can be is seen when all models are compared
            return path
        raise _refusal(folder, f"it holds '{path}', and the model has no such tensor")
    own = model.tensors[name].shape
    if tensor.shape != own and (len(own) != 2 or own[0] != vocab_size(model.config) or tensor.shape[1:] != own[1:]):
        raise _refusal(folder, f"its '{path}' has shape {list(tensor.shape)} where the model's has {list(own)}")
    return name


def _across(model: Checkpoint, settings: Mapping[str, Any]) -> bool:
    """Whether square matrices lie (in, out), as GPT-2's do: PEFT says so of its last layer, or other matrices' biases do."""
    if settings.get("fan_in_fan_out"):
        return True
    for name, tensor in model.tensors.items():
        bias = model.tensors.get(f"{name.removesuffix('weight')}bias")
        if bias and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1] and bias.shape == tensor.shape[1:]:
            return True
    return False


def _shares_embedding(model: Checkpoint) -> bool:
    """Whether the output layer is the embedding: as config.json says, else where no output layer is stored."""
    said = says_tied(model)
    return not any(name.endswith(HEAD) for name in model.tensors) if said is None else said


def _require_kept_tie(
    settings: Mapping[str, Any], whole: Mapping[str, Tensor], folds: Mapping[str, Fold], model: Checkpoint, folder: Path
) -> None:
    """Refuse an adapter that changes one of the two uses of a tied embedding: no folded model would be its equal."""
    if settings.get("ensure_weight_tying") or not _shares_embedding(model) or HEAD in whole:
        return
    size = vocab_size(model.config)
    for name in (*whole, *folds):
        shape = model.tensors[name].shape
        if len(shape) == 2 and shape[0] == size:
            what = f"it changes '{name}', which the model uses both as embedding and as output layer: PEFT changes one"
            raise _refusal(folder, what, "train it with ensure_weight_tying, or on a model saved untied")


def with_vocab_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """config.json's content for another number of rows in the embedding."""
    text = config.get("text_config")
    if "vocab_size" not in config and isinstance(text, dict):
        return {**config, "text_config": {**text, "vocab_size": size}}
    return {**config, "vocab_size": size}


def vocab_size(config: Mapping[str, Any]) -> Any:
    """The rows of the embedding, as config.json says."""
    return config_says(config, "vocab_size")


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once nothing in it asks for what cannot be folded."""
    if not (folder / CONFIG).exists():
        raise ModelError(f"{CONFIG} is missing", where=str(folder), do="name a folder that PEFT saved an adapter to")
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise _refusal(folder, f"its peft_type is {kind}, and only LORA (with rsLoRA and DoRA) can be folded")
    for name, value in settings.items():
        if name not in _READ | _TOLD and value:
            raise _refusal(folder, f"{CONFIG} has {name}: {json.dumps(value)}")
    start = settings.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        do = "convert it with PEFT (save_pretrained, path_initial_model_for_weight_conversion)"
        raise _refusal(folder, f"init_lora_weights is {start}, which began by changing the model's own weights", do)
    return settings


def _headers(folder: Path, pickles: bool) -> dict[str, Tensor]:
    pickled = folder / PICKLED
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not pickled.exists() or not pickles:
        do = "save it again with a PEFT that writes safetensors: a pickle can run code when read; or ask for --pickle"
        raise ModelError(f"{WEIGHTS} is missing", where=str(folder), do=do if pickled.exists() else None)
    from mixmerge.merge.pickles import read_pickle

    return read_pickle(pickled)


def _refusal(
    folder: Path, what: str, do: str = "merge it into its model with PEFT, if that can, and name that folder"
) -> ModelError:
    return ModelError(f"this adapter cannot be folded: {what}", where=str(folder), do=do)
