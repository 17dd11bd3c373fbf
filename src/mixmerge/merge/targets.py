"""What each output tensor is made from: a configuration and opened models become targets, checked from headers alone.

The one idea: the output's tensors are named first (those of whole models by their own names, layers of slices renumbered,
what lies outside of layers with the first slice, the final norm and head with the last), then each is checked against
its inputs. A model is a mapping of tensor names to sources, so a source may be put together in any way.
Invariant: no input of the configuration is left out silently, and config.json describes what is written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.errors import ModelError, RecipeError
from mixmerge.merge.align import ALIKE, OTHER_VOCABULARY, Model, agree
from mixmerge.merge.checkpoint import Tensor
from mixmerge.merge.settings import Combination, Entry, MergeConfig
from mixmerge.merge.sources import Source
from mixmerge.merge.stacks import Origin, Stack, find_stacks, module_of, shared_part, with_layers
from mixmerge.merge.tensors import Target
from mixmerge.merge.values import layer_depths, split_layer
from mixmerge.merge.vocabulary import vocabulary_tensors

# outside of layers, what comes after them; embeddings, which have norms too, come before
_AFTER = re.compile(r"(^|[._])(norm|ln|layernorm|head|lm_head|output|score|classifier|embed_out)([._\d]|$)|norm\b")
_EMBEDDING = re.compile(r"embed(?!_out)|(^|[._])(wte|wpe|shared)[._]")


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor of the output, merged or copied, and the config.json that goes with them."""

    targets: Mapping[str, Target]
    copied: Mapping[str, Source]
    config: Mapping[str, Any]

    @property
    def outputs(self) -> dict[str, Tensor]:
        merged = {target.name: Tensor(target.dtype, target.shape) for target in self.targets.values()}
        return merged | {name: Tensor(source.dtype, source.shape) for name, source in self.copied.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """An output tensor before it is checked: its name, its combination, and its name in each model that is read.

    `names` follow `combination.read` (the base first, where it stands apart).
    """

    name: str
    combination: Combination
    names: tuple[str, ...]
    depth: float = 0.0


def plan_targets(config: MergeConfig, models: Mapping[str, Model]) -> Plan:
    """The targets of a merge. `models`: every model of `config.references`, brought into one vocabulary.

    Raises:
        ModelError: models that do not fit each other or the configuration.
        RecipeError: layers or modules that are not there, a parameter without a value at a tensor.
    """
    per_token = set(vocabulary_tensors([model.checkpoint for model in models.values()]))
    donor, described = models[config.donor], dict(models[config.donor].checkpoint.config)
    if config.models:
        depths = layer_depths(donor.tensors)
        places = [dataclasses.replace(p, depth=depths.get(p.name, 0.0)) for p in _whole(config.whole, models)]
    else:
        places, described = _Modules(config, models).places()
    targets: dict[str, Target] = {}
    copied: dict[str, Source] = {}
    for place in sorted(places, key=lambda place: place.name):
        read = [
            _source(place, entry, models, name) for entry, name in zip(place.combination.read, place.names, strict=True)
        ]
        _require_described(place.name, read[0], donor, OTHER_VOCABULARY if place.name in per_token else _OTHER_BASE)
        if agree(place.name, read, per_token=place.name in per_token):
            targets[place.name] = _target(config, place, read, models)
        else:
            copied[place.name] = read[0]
    _require_all({*targets, *copied}, donor)
    return Plan(targets, copied, described)


def _target(config: MergeConfig, place: Place, read: Sequence[Source], models: Mapping[str, Model]) -> Target:
    combination = place.combination
    first = int(combination.base is not None)
    at = combination.at(place.name, read[0].shape, place.depth, place.names[first:])
    # a folded tensor is read as float32: what is stored is as its model is
    donor, own = (models[name].checkpoint.tensors for name in (config.donor, combination.read[0].model))
    dtype = config.stored_dtype or (donor[place.name] if place.name in donor else own[place.names[0]]).dtype
    return Target(place.name, at.shape, dtype, config.method, at, tuple(read[first:]), read[0] if first else None)


def _source(place: Place, entry: Entry, models: Mapping[str, Model], name: str) -> Source:
    found = models[entry.model].tensors.get(name)
    if found is not None:
        return found
    owner, there = next(
        (other.model, its)
        for other, its in zip(place.combination.read, place.names, strict=True)
        if its in models[other.model].tensors
    )
    renamed = f"as '{name}' " if name != there else ""
    raise ModelError(f"tensor '{there}' is in '{owner}' and not {renamed}in '{entry.model}'", do=ALIKE)


def _whole(combination: Combination, models: Mapping[str, Model], within: str = "") -> Iterator[Place]:
    """The tensors of whole models, or those whose names begin with `within`: each under its own name."""
    for name in _names(combination, models):
        if name.startswith(within):
            yield Place(name, combination, (name,) * len(combination.read))


def _names(combination: Combination, models: Mapping[str, Model]) -> dict[str, None]:
    return dict.fromkeys(name for entry in combination.read for name in models[entry.model].tensors)


def _require_described(name: str, made: Source, donor: Model, do: str) -> None:
    """Outside of layers, what is made must have the shape that the donor's config.json stands for."""
    described = donor.tensors.get(name)
    if described is not None and split_layer(name) is None and described.shape != made.shape:
        what = f"tensor '{name}' of '{made.model}' has shape {list(made.shape)}, and '{donor.name}', which gives "
        raise ModelError(f"{what}config.json, {list(described.shape)}", do=do)


def _require_all(names: set[str], donor: Model) -> None:
    """Outside of layers, nothing that the donor's config.json stands for may be missing."""
    for name in donor.tensors:
        if split_layer(name) is None and name not in names:
            what = f"tensor '{name}' is in '{donor.name}', which gives config.json, and in no model it would come from"
            raise ModelError(what, do="merge models of one architecture")


class _Modules:
    """The layout of an output put together from slices, module by module."""

    def __init__(self, config: MergeConfig, models: Mapping[str, Model]) -> None:
        self.config, self.models = config, models
        self.stacks = {name: find_stacks(model.tensors, model.checkpoint.config) for name, model in models.items()}
        donor = models[config.donor]
        self.donor = self.stacks[config.donor]
        self.described = dict(donor.checkpoint.config)
        self.inside = {name: _by_layer(model) for name, model in models.items()}
        if not self.donor:
            do = "merge whole models: list them under 'models'"
            raise ModelError("config.json does not say how many layers there are", where=donor.name, do=do)
        self.prefix = shared_part(stack.prefix for stack in self.donor.values())
        for name, stacks in self.stacks.items():
            for module, stack in self.donor.items():
                if module not in stacks or stacks[module].prefix != stack.prefix:
                    raise ModelError(f"'{name}' has no layers '{stack.prefix}', which '{config.donor}' has")

    def places(self) -> tuple[list[Place], dict[str, Any]]:
        """All output tensors, and config.json with the new layers."""
        listed = {name: self.config.module(name) for name in self.config.modules} or {"default": self.config.stack}
        self.check_names(listed)
        places: list[Place] = []
        for name, parts in listed.items():
            places += self.sliced(name, parts) if parts[0].entries[0].layers else self.complete(name, parts[0])
        if len(self.donor) > 1:
            places += self.shared(listed)
        return places, self.described

    def check_names(self, listed: Mapping[str, Sequence[Combination]]) -> None:
        if len(self.donor) > 1 and not self.config.modules:
            do = f"give slices for each under 'modules': {', '.join(self.donor)}"
            what = f"'{self.config.donor}' has several stacks of layers"
            raise RecipeError(what, where=self.config.where("slices"), do=do)
        others = [] if len(self.donor) == 1 else list(dict.fromkeys(self.module(name) for name in self.outside()))
        known = [*self.donor, *(name for name in others if name not in self.donor)]
        for name in listed:
            if name not in known:
                what = f"'{self.config.donor}' has no module '{name}'"
                raise RecipeError(what, where=self.config.where("modules", name), do=f"it has: {', '.join(known)}")
            if name not in self.donor and self.config.modules[name].slices:
                do = "list its models under 'models'"
                what = f"module '{name}' has no layers to slice"
                raise RecipeError(what, where=self.config.where("modules", name, "slices"), do=do)
        for name in self.donor:
            if name not in listed:
                do = f"add it, with 'models' where it is merged whole (all modules: {', '.join(known)})"
                raise RecipeError(f"module '{name}' is missing", where=self.config.where("modules"), do=do)

    def sliced(self, module: str, parts: Sequence[Combination]) -> Iterator[Place]:
        """A stack put together from slices, its layers renumbered, and what stands before and after it."""
        stack = self.donor[module]
        layers: list[Sequence[Origin]] = []
        for part in parts:
            for entry in part.read:
                self.check_layers(entry, self.stacks[entry.model][module], part)
            first, end = part.read[0].layers or (0, 0)
            for offset in range(end - first):
                depth = offset / (end - first - 1) if end - first > 1 else 1.0  # mergekit's for a single layer
                origins = [self.origin(entry, module, offset) for entry in part.read]
                inside = dict.fromkeys(inner for origin in origins for inner in self.inner(origin))
                self.check_layer(module, len(layers), origins, inside)
                for inner in inside:
                    names = tuple(f"{stack.prefix}.{origin.layer}.{inner}" for origin in origins)
                    yield Place(f"{stack.prefix}.{len(layers)}.{inner}", part, names, depth)
                layers.append(origins)
        self.described = with_layers(self.described, stack, layers)
        for part, after in ((parts[0], False), (parts[-1], True)):
            for place in _whole(part, self.models, self.within(module)):
                if not self.in_stack(place.name) and _comes_after(place.name) == after:
                    yield place

    def complete(self, module: str, part: Combination) -> Iterator[Place]:
        """A module merged whole: its layers keep their places."""
        depths = layer_depths(self.models[self.config.donor].tensors)
        for place in _whole(part, self.models, self.within(module)):
            if len(self.donor) == 1 or self.module(place.name) == module:
                yield dataclasses.replace(place, depth=depths.get(place.name, 0.0))

    def shared(self, listed: Mapping[str, Sequence[Combination]]) -> Iterator[Place]:
        """What belongs to no listed module (shared embeddings, heads, projectors), from the models that all modules merge."""
        parts = [part for its in listed.values() for part in its]
        names = [name for name in _names(parts[-1], self.models) if self.module(name) not in listed]
        if not names:
            return
        for part in parts[:-1]:
            if _without_layers(part) != _without_layers(parts[-1]):
                module = self.module(names[0])
                what = f"'{names[0]}' belongs to no module listed, and the modules merge different models"
                do = f"say what it is made from: add the module '{module}' with its 'models'"
                raise RecipeError(what, where=self.config.where("modules"), do=do)
        for name in names:
            yield Place(name, parts[-1], (name,) * len(parts[-1].read))

    def module(self, tensor: str) -> str:
        return module_of(tensor, self.prefix)

    def within(self, module: str) -> str:
        """What the names of a module's tensors begin with."""
        return "" if len(self.donor) == 1 else self.begins(module)

    def begins(self, module: str) -> str:
        shared = any(name.startswith(f"{self.prefix}{module}.") for name in self.models[self.config.donor].tensors)
        return f"{self.prefix}{module}." if shared else f"{module}."

    def outside(self) -> Iterable[str]:
        return (name for name in self.models[self.config.donor].tensors if not self.in_stack(name))

    def in_stack(self, tensor: str) -> bool:
        split = split_layer(tensor)
        return split is not None and any(stack.prefix == split[0] for stack in self.donor.values())

    def origin(self, entry: Entry, module: str, offset: int) -> Origin:
        first, _ = entry.layers or (0, 0)
        config = self.models[entry.model].checkpoint.config
        return Origin(entry.model, config, self.stacks[entry.model][module], first + offset)

    def inner(self, origin: Origin) -> Mapping[str, Source]:
        """The tensors of a model's layer by their names inside of it."""
        return self.inside[origin.model].get((origin.stack.prefix, origin.layer), {})

    def check_layer(self, module: str, at: int, origins: Sequence[Origin], inside: Mapping[str, None]) -> None:
        """An output layer must be like one of the donor's, which config.json describes.

        What only the first layer has (T5's relative positions) must stay with the first layer.
        """
        stack, donor = self.donor[module], self.config.donor
        layers = [self.inside[donor][stack.prefix, layer] for layer in range(stack.count)]
        place = f"layer {origins[0].layer} of '{origins[0].model}'"
        for inner in layers[0]:
            first_alone = stack.count > 1 and not any(inner in layer for layer in layers[1:])
            if first_alone and (inner in inside) != (at == 0):
                what = f"only layer 0 of '{donor}' has '{inner}', and in the output layer {at} "
                what += "would have it too" if inner in inside else "would lack it"
                raise ModelError(what, do=f"take layer 0 of '{stack.prefix}' as the first layer, and only there")
        if not any(layer.keys() == inside.keys() for layer in layers):
            odd = next(iter(inside.keys() ^ layers[-1].keys()))
            what = f"{place} has other tensors than any layer of '{donor}', which gives config.json ('{odd}')"
            raise ModelError(what, do=_OTHER_BASE)
        for inner, source in self.inner(origins[0]).items():
            shapes = {layer[inner].shape for layer in layers if inner in layer}
            if shapes and source.shape not in shapes:
                what = (
                    f"'{inner}' in {place} has shape {list(source.shape)}, and in '{donor}', which gives config.json, "
                )
                raise ModelError(f"{what}{list(min(shapes))}", do=_OTHER_BASE)

    def check_layers(self, entry: Entry, stack: Stack, part: Combination) -> None:
        first, end = entry.layers or (0, 0)
        if end > stack.count:
            at = part.entries.index(entry)
            where = self.config.where(*part.path, "sources", at, "layer_range")
            what = f"layer_range [{first}, {end}] goes beyond the {stack.count} layers of '{entry.model}'"
            raise RecipeError(what, where=where, do=f"end it at {stack.count}")


def _by_layer(model: Model) -> dict[tuple[str, int], dict[str, Source]]:
    """The tensors of a model by what stands before their first number, the number, and what stands after it."""
    layers: dict[tuple[str, int], dict[str, Source]] = {}
    for name, source in model.tensors.items():
        if (split := split_layer(name)) is not None:
            layers.setdefault(split[:2], {})[split[2]] = source
    return layers


def _comes_after(name: str) -> bool:
    return not _EMBEDDING.search(name) and _AFTER.search(name) is not None


def _without_layers(part: Combination) -> tuple[object, ...]:
    read = tuple((entry.model, dict(entry.parameters)) for entry in part.read)
    return read, part.base_model, tuple(dict(level) for level in part.levels if level)


_OTHER_BASE = "merge models of one architecture and size, or name another base_model"
