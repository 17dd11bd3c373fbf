"""A merge configuration as values: which models, or layers of them, are combined, and with which parameters.

The one idea: whatever the YAML's form (models, slices, modules), it comes down to combinations: inputs, a base that may
stand apart, and the levels where a parameter is looked up, nearest first: per model, slice, module, top, the default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmerge.errors import RecipeError, did_you_mean
from mixmerge.merge.block import At
from mixmerge.merge.methods import METHODS, Method, Parameter
from mixmerge.merge.values import Filtered, Parameters, Value, as_yaml, resolve, sum_to_zero
from mixmerge.merge.vocabulary import VocabularyChoice
from mixmerge.yaml import KeyPath, Marks

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# It chose the type of mergekit's sign masks. We keep no such masks, so it changes no number; we accept it and say so.
NO_EFFECT = {"int8_mask": Parameter("shared", default=False)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as the user wrote it, its own parameters, and its layers first, .. end - 1 (None: all it has)."""

    model: str
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Some layers of the output: as many as each source gives, and one after the other's."""

    sources: tuple[Entry, ...]
    parameters: Parameters = field(default_factory=dict)
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the output with layers of its own: whole, or put together from slices."""

    models: tuple[Entry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A checked merge configuration; `marks` knows where each key stands in its file.

    One of `models`, `slices` and `modules` is given. `earlier` are the named merges of the same file that have to run
    first, in order; where a model has the name of one, its result is meant.
    """

    merge_method: str
    models: tuple[Entry, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: VocabularyChoice | None = None
    chat_template: str | None = None
    seed: int = 0
    name: str | None = None
    earlier: tuple[MergeConfig, ...] = ()
    marks: Marks | None = field(default=None, compare=False, repr=False)
    relative_to: Path | None = field(default=None, compare=False, repr=False)
    # whether pickled weights may be read where there are no others
    pickles: bool = field(default=False, compare=False, repr=False)
    # where another model might have been meant
    doubts: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def whole(self) -> Combination:
        """The one combination of a merge of whole models."""
        assert self.models
        return _whole(self, self.models, (self.parameters,), ("models",))

    @property
    def stack(self) -> tuple[Combination, ...]:
        """The slices at the top, in the order of the output's layers."""
        return _sliced(self, self.slices, (self.parameters,), ())

    def module(self, name: str) -> tuple[Combination, ...]:
        """A module's slices in the order of its layers, or the one combination that it is as a whole."""
        module, path = self.modules[name], ("modules", name)
        levels = (module.parameters, self.parameters)
        if module.models:
            return (_whole(self, module.models, levels, (*path, "models")),)
        return _sliced(self, module.slices, levels, path)

    @property
    def combinations(self) -> Iterator[Combination]:
        """All of them, in the order of the file."""
        if self.models:
            yield self.whole
        yield from self.stack
        for name in self.modules:
            yield from self.module(name)

    @property
    def references(self) -> tuple[str, ...]:
        """Every model that is read, each once: the donor first."""
        read = (entry.model for part in self.combinations for entry in part.read)
        return tuple(dict.fromkeys([self.donor, *read]))

    @property
    def vocabulary(self) -> VocabularyChoice | None:
        """What tokens the output has; None where the models' own are left as they are."""
        return VocabularyChoice(self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @property
    def donor(self) -> str:
        """The model that config, generation config and tokenizer come from: the base, else the first listed."""
        return self.base_model or next(self.combinations).entries[0].model

    @property
    def stored_dtype(self) -> str | None:
        """The safetensors dtype of merged tensors; None keeps the donor's."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    @property
    def folder(self) -> Path:
        """The folder that model references are relative to: by default that of the file."""
        if self.relative_to is not None:
            return self.relative_to
        return Path() if self.marks is None else Path(self.marks.file).parent

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about this configuration beyond what it says."""
        given = {name for part in self.combinations for level in part.levels for name in level}
        notes = list(self.doubts)
        notes += [
            f"{name} has no numeric effect here: it is accepted and ignored" for name in NO_EFFECT if name in given
        ]
        inputs = {entry.model for part in self.combinations for entry in part.read}
        if self.base_model is not None and self.base_model not in inputs:
            notes.append(f"{self.base_model} gives configuration and tokenizer only: no slice lists it as a source")
        return tuple(notes)

    def where(self, *path: str | int) -> str:
        return (self.marks or Marks("merge configuration")).where(path)

    def to_mergekit(self) -> dict[str, Any]:
        """The configuration as mergekit's YAML would be read; `parse_config` gives it back (without `earlier`)."""
        out: dict[str, Any] = {"name": self.name} if self.name is not None else {}
        out |= {"merge_method": self.merge_method, **_parts(self.models, self.slices)}
        if self.modules:
            out["modules"] = {
                name: _parts(module.models, module.slices) | _own(module.parameters)
                for name, module in self.modules.items()
            }
        for key in ("base_model", "dtype", "out_dtype", "tokenizer_source", "chat_template", "seed"):
            if value := getattr(self, key):
                out[key] = value
        if self.tokenizer is not None:
            out["tokenizer"] = self.tokenizer.to_mergekit()
        return out | _own(self.parameters)


@dataclass(frozen=True, slots=True)
class Combination:
    """Models that are combined with each other: all of them in a merge of whole models, the sources of one slice.

    `levels`: the parameters that hold here beside a model's own, nearest first. `path`: where it stands in the YAML.
    """

    config: MergeConfig
    entries: tuple[Entry, ...]
    base_model: str | None
    levels: tuple[Parameters, ...]
    path: KeyPath

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def base(self) -> Entry | None:
        """The base that stands apart from the inputs, for methods that take task vectors from it."""
        if self.method.base == "none" or self.base_model is None:
            return None
        return next((entry for entry in self.entries if entry.model == self.base_model), Entry(self.base_model))

    @property
    def inputs(self) -> tuple[Entry, ...]:
        """What is combined: what is listed, without the base apart."""
        base = self.base
        return self.entries if base is None else tuple(entry for entry in self.entries if entry.model != base.model)

    @property
    def read(self) -> tuple[Entry, ...]:
        """The inputs, after the base apart."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    def level_with(self, name: str, entry: Entry | None = None) -> Parameters | None:
        """The nearest level that gives a parameter, of this input or of all."""
        return next((level for level in self._levels_of(entry) if name in level), None)

    def at(self, tensor: str, shape: tuple[int, ...], depth: float = 0.0, names: Sequence[str] | None = None) -> At:
        """Every parameter's value at an output tensor; `depth` is the position of its layer, 0 (first) to 1 (last).

        `names` are the tensor's names in the inputs (default: as in the output), which filters of their own see.

        Raises:
            RecipeError: a required parameter has no value here, the weights cannot be normalised, or epsilon is too wide.
        """
        shared: dict[str, float] = {}
        per_input: list[dict[str, float]] = [{} for _ in self.inputs]
        inputs = list(zip(self.inputs, names or [tensor] * len(per_input), per_input, strict=True))
        for name, parameter in self.method.parameters.items():
            if parameter.scope == "shared":
                shared[name] = self._value(name, tensor, depth, None)
                continue
            for entry, own, values in inputs:
                values[name] = self._value(name, own, depth, entry)
        has_base = self.base is not None
        at = At(tensor, shape, self.config.seed, shared, tuple(per_input), has_base=has_base)
        # all weights 0 with a base apart is a wish that has a meaning: this tensor stays the base's
        normalizes = (shared.get("normalize") and not self.method.elects) or shared.get("normalize_weights")
        if normalizes and sum_to_zero(at.each("weight")) and (not has_base or any(at.each("weight"))):
            raise self.zero_weights(f"at tensor '{tensor}'")
        for entry, values in zip(self.inputs, per_input, strict=True):
            if "epsilon" in values and not _spreads(values["density"], values["epsilon"]):
                raise RecipeError(
                    f"density {values['density']:g} with epsilon {values['epsilon']:g} for model '{entry.model}' gives "
                    f"probabilities outside 0 to 1 at tensor '{tensor}'",
                    where=self.config.where(*self.path),
                    do="keep density - epsilon above 0 and density + epsilon below 1",
                )
        return at

    def zero_weights(self, place: str) -> RecipeError:
        return RecipeError(
            f"the weights sum to 0 {place}, so they cannot be normalised",
            where=self.config.where(*self.path),
            do="change the weights, or set normalize: false",
        )

    def _levels_of(self, entry: Entry | None) -> tuple[Parameters, ...]:
        return self.levels if entry is None else (entry.parameters, *self.levels)

    def _value(self, name: str, tensor: str, depth: float, entry: Entry | None) -> float:
        for level in self._levels_of(entry):
            if name in level and (found := resolve(level[name], tensor, depth)) is not None:
                return found
        default = self.method.parameters[name].default
        if default is None:
            who = "" if entry is None else f" for model '{entry.model}'"
            path = ("parameters",) if entry is None and self.path == ("models",) else self.path
            raise RecipeError(
                f"{self.config.merge_method} needs '{name}', and no value of it covers tensor '{tensor}'{who}",
                where=self.config.where(*path),
                do="end its list with an entry without a filter, which covers the rest",
            )
        return default


def _spreads(density: float, epsilon: float) -> bool:
    """Whether density +- epsilon are probabilities; the ends 0 and 1 keep nothing and everything, and need no epsilon."""
    return density in (0.0, 1.0) or 0.0 < density - epsilon <= density + epsilon < 1.0


def _whole(
    config: MergeConfig, models: tuple[Entry, ...], levels: tuple[Parameters, ...], path: KeyPath
) -> Combination:
    """Whole models; a base that is an input like the others comes last where it is not listed."""
    base = config.base_model
    if config.method.base == "none" and base is not None and all(entry.model != base for entry in models):
        models = (*models, Entry(base))
    return Combination(config, models, base, levels, path)


def _sliced(
    config: MergeConfig, slices: tuple[Slice, ...], levels: tuple[Parameters, ...], path: KeyPath
) -> tuple[Combination, ...]:
    return tuple(
        Combination(config, s.sources, s.base_model or config.base_model, (s.parameters, *levels), (*path, "slices", i))
        for i, s in enumerate(slices)
    )


def _parts(models: tuple[Entry, ...], slices: tuple[Slice, ...]) -> dict[str, Any]:
    if models:
        return {"models": [{"model": entry.model, **_own(entry.parameters)} for entry in models]}
    return {"slices": [_slice(one) for one in slices]} if slices else {}


def _slice(one: Slice) -> dict[str, Any]:
    sources = [
        {"model": entry.model, "layer_range": list(entry.layers or ()), **_own(entry.parameters)}
        for entry in one.sources
    ]
    base = {} if one.base_model is None else {"base_model": one.base_model}
    return {"sources": sources, **base, **_own(one.parameters)}


def _own(parameters: Mapping[str, Value]) -> dict[str, Any]:
    return {"parameters": as_yaml(parameters)} if parameters else {}


def unmatched_filters(config: MergeConfig, tensors: Collection[str]) -> tuple[str, ...]:
    """A note for each filter that is part of no tensor's name: its value is never used."""
    held = [level for part in config.combinations for level in (*part.levels, *(e.parameters for e in part.read))]
    values = [value for level in held for value in level.values() if isinstance(value, tuple)]
    filters = [
        item for value in values for item in value if isinstance(item, Filtered) and item.filter not in (None, "*")
    ]
    words = sorted({part for name in tensors for part in name.split(".") if not part.isdecimal()})
    wanted = dict.fromkeys(str(item.filter) for item in filters if not any(item.matches(name) for name in tensors))
    return tuple(
        f"filter '{word}' is part of no tensor's name, so its value is never used; {did_you_mean(word, words)}"
        for word in wanted
    )
