"""A merge configuration as values: models, parameters, and what each parameter is at a given tensor.

The one idea: a value is a scalar, a gradient over the layers or a list of {filter, value}, and is resolved per tensor in
the order per model, top level, the method's default. Layers are known from the tensors' names, so no architecture is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmerge.errors import RecipeError
from mixmerge.merge.block import At
from mixmerge.merge.methods import METHODS, Method, Parameter
from mixmerge.yaml import Marks

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# It chose the type of mergekit's sign masks. We keep no such masks, so it changes no number; we accept it and say so.
NO_EFFECT = {"int8_mask": Parameter("shared", default=False)}

Number = int | float


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors whose name contains `filter` (None or "*": for every tensor)."""

    filter: str | None
    value: Number | bool | tuple[Number, ...]

    def matches(self, tensor: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor


Value = Number | bool | tuple[Number, ...] | tuple[Filtered, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the merge as the user wrote it, and its own parameters."""

    model: str
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A checked merge configuration; `marks` knows where each key stands in its file."""

    merge_method: str
    models: tuple[Entry, ...]
    base_model: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    seed: int = 0
    marks: Marks | None = field(default=None, compare=False, repr=False)

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def base(self) -> str | None:
        """The base that stands apart from the inputs, for methods that take task vectors from it."""
        return None if self.method.base == "none" else self.base_model

    @property
    def inputs(self) -> tuple[Entry, ...]:
        """What is combined: the listed models without the base apart; else with the base, last if it is not listed."""
        if self.base is not None:
            return tuple(entry for entry in self.models if entry.model != self.base)
        if self.base_model is None or any(entry.model == self.base_model for entry in self.models):
            return self.models
        return (*self.models, Entry(self.base_model))

    @property
    def donor(self) -> str:
        """The model that config, generation config and tokenizer come from."""
        return self.base_model or self.models[0].model

    @property
    def stored_dtype(self) -> str | None:
        """The safetensors dtype of merged tensors; None keeps the donor's."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    @property
    def folder(self) -> Path:
        """The folder that model references are relative to."""
        return Path() if self.marks is None else Path(self.marks.file).parent

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about this configuration beyond what it says."""
        ignored = [name for name in NO_EFFECT if name in self.parameters]
        return tuple(f"{name} has no numeric effect here: it is accepted and ignored" for name in ignored)

    def where(self, *path: str | int) -> str:
        return (self.marks or Marks("merge configuration")).where(path)

    def at(self, tensor: str, shape: tuple[int, ...], depth: float = 0.0) -> At:
        """Every parameter's value at a tensor; `depth` is the position of its layer, 0 (first) to 1 (last).

        Raises:
            RecipeError: a required parameter has no value here, the weights cannot be normalised, or epsilon is too wide.
        """
        shared: dict[str, float] = {}
        per_input: list[dict[str, float]] = [{} for _ in self.inputs]
        for name, parameter in self.method.parameters.items():
            if parameter.scope == "shared":
                shared[name] = self._value(name, tensor, depth, None)
                continue
            for entry, values in zip(self.inputs, per_input, strict=True):
                values[name] = self._value(name, tensor, depth, entry)
        at = At(tensor, shape, self.seed, shared, tuple(per_input), has_base=self.base is not None)
        # all weights 0 with a base apart is a wish that has a meaning: this tensor stays the base's
        normalizes = shared.get("normalize") or shared.get("normalize_weights")
        if normalizes and sum_to_zero(at.each("weight")) and (self.base is None or any(at.each("weight"))):
            raise self.zero_weights(f"at tensor '{tensor}'")
        for entry, values in zip(self.inputs, per_input, strict=True):
            if "epsilon" in values and not _spreads(values["density"], values["epsilon"]):
                raise RecipeError(
                    f"density {values['density']:g} with epsilon {values['epsilon']:g} for model '{entry.model}' gives "
                    f"probabilities outside 0 to 1 at tensor '{tensor}'",
                    where=self.where("models"),
                    do="keep density - epsilon above 0 and density + epsilon below 1",
                )
        return at

    def to_mergekit(self) -> dict[str, Any]:
        """The configuration as mergekit's YAML would be read; `parse_config` gives this configuration back."""
        models = []
        for entry in self.models:
            own = {"parameters": _plain(entry.parameters)} if entry.parameters else {}
            models.append({"model": entry.model, **own})
        out: dict[str, Any] = {"merge_method": self.merge_method, "models": models}
        for key in ("base_model", "dtype", "out_dtype", "tokenizer_source", "seed"):
            if value := getattr(self, key):
                out[key] = value
        if self.parameters:
            out["parameters"] = _plain(self.parameters)
        return out

    def _value(self, name: str, tensor: str, depth: float, entry: Entry | None) -> float:
        for level in (self.parameters,) if entry is None else (entry.parameters, self.parameters):
            if name in level and (found := _resolve(level[name], tensor, depth)) is not None:
                return found
        default = self.method.parameters[name].default
        if default is None:
            who = "" if entry is None else f" for model '{entry.model}'"
            raise RecipeError(
                f"{self.merge_method} needs '{name}', and no value of it covers tensor '{tensor}'{who}",
                where=self.where("parameters" if entry is None else "models"),
                do="end its list with an entry without a filter, which covers the rest",
            )
        return default

    def zero_weights(self, place: str) -> RecipeError:
        return RecipeError(
            f"the weights sum to 0 {place}, so they cannot be normalised",
            where=self.where("models"),
            do="change the weights, or set normalize: false",
        )


def layer_depths(tensors: Iterable[str]) -> dict[str, float]:
    """The position of each tensor's layer, idx / (L - 1), 0 outside of layers: known from the names alone.

    A layer's index is the first number in the dotted name, and L counts what shares the part before it.

    >>> layer_depths(["embed.weight", "h.0.mlp.weight", "h.1.mlp.weight", "h.2.mlp.weight"])
    {'embed.weight': 0.0, 'h.0.mlp.weight': 0.0, 'h.1.mlp.weight': 0.5, 'h.2.mlp.weight': 1.0}
    """
    places: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        stack, index = ("", 0) if number is None else (".".join(parts[:number]), int(parts[number]))
        places[name] = stack, index
        last[stack] = max(last.get(stack, 0), index)
    return {name: index / last[stack] if last[stack] else 0.0 for name, (stack, index) in places.items()}


def sum_to_zero(weights: Sequence[float]) -> bool:
    """Whether weights cannot be normalised; 0.1 + 0.2 - 0.3 is 0 to whoever wrote it."""
    return abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights))


def _spreads(density: float, epsilon: float) -> bool:
    """Whether density +- epsilon are probabilities; the ends 0 and 1 keep nothing and everything, and need no epsilon."""
    return density in (0.0, 1.0) or 0.0 < density - epsilon <= density + epsilon < 1.0


def _resolve(value: Value, tensor: str, depth: float) -> float | None:
    """The value at a tensor: of filtered values the first that matches, of a gradient its value at `depth`."""
    if not isinstance(value, tuple):
        return value
    if isinstance(value[0], Filtered):
        match = next((item for item in value if isinstance(item, Filtered) and item.matches(tensor)), None)
        return None if match is None else _resolve(match.value, tensor, depth)
    points = [float(point) for point in value if not isinstance(point, Filtered)]
    place = depth * (len(points) - 1)
    low = min(int(place), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    return points[low] + (place - low) * (points[high] - points[low])


def _plain(parameters: Mapping[str, Value]) -> dict[str, Any]:
    """Parameters as YAML would give them: lists and mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Filtered):
            name = {} if value.filter is None else {"filter": value.filter}
            return {**name, "value": plain(value.value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in parameters.items()}
