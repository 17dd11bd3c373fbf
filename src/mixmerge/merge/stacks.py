"""Which tensors of a model are its layers, and where config.json says how many there are.

The one idea: no table of architectures. A stack is a run of tensors numbered 0 .. n - 1 whose n is a layer count of
config.json; several stacks (encoder and decoder, text and vision) are told apart by the words in their names.
Invariant: a config.json made here describes the layers of the output one by one, or the merge is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.errors import ModelError
from mixmerge.merge.values import split_layer

KeyPath = tuple[str, ...]

_COUNT = re.compile(r"(n|num)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|depth")
_LAYERS = ("layers", "layer", "h", "blocks", "block")
_PER_LAYER = re.compile(r".*(layer|block|pattern).*|intermediate_size|num_(key_value|attention)_heads")
_EVERY_FEW = re.compile(r".*(pattern|interval|period)")
_LEADING = ("first_k_dense_replace", "max_window_layers")
_SENSES = {"vision": "vision|visual|image", "audio": "audio|speech|sound"}


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers `prefix.0` .. `prefix.{count - 1}`; `keys`: where config.json holds their count."""

    prefix: str
    count: int
    keys: tuple[KeyPath, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """The layer of a model that an output layer is made from: the model's name, its config.json and its stack."""

    model: str
    config: Mapping[str, Any]
    stack: Stack
    layer: int


def find_stacks(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, Stack]:
    """A model's stacks by module name: 'default' where there is one, else the part of the name that tells them apart.

    >>> names = [f"{side}.block.{i}.w" for side in ("encoder", "decoder") for i in range(2)]
    >>> {name: stack.prefix for name, stack in find_stacks(names, {"num_layers": 2, "num_decoder_layers": 2}).items()}
    {'encoder': 'encoder.block', 'decoder': 'decoder.block'}
    """
    indices: dict[str, list[int]] = {}
    for name in tensors:
        if (split := split_layer(name)) is not None:
            indices.setdefault(split[0], []).append(split[1])
    found: dict[tuple[KeyPath, ...], Stack] = {}
    # where two could be what a key counts, it is the one that is called layers, or has more tensors
    for prefix, numbers in sorted(indices.items(), key=lambda item: (_named_layers(item[0]), len(item[1]))):
        count = max(numbers) + 1
        if len(set(numbers)) == count and (keys := _keys(prefix, count, config)):
            found[keys] = Stack(prefix, count, keys)
    stacks = {stack.prefix: stack for stack in found.values()}
    shared = shared_part(stacks)
    ordered = [stacks[prefix] for prefix in indices if prefix in stacks]
    return {module_of(f"{stack.prefix}.", shared) if len(stacks) > 1 else "default": stack for stack in ordered}


def shared_part(prefixes: Iterable[str]) -> str:
    """What the names of all stacks begin with, up to a dot and with it."""
    parts = [prefix.split(".") for prefix in prefixes]
    same = 0
    while parts and all(len(part) > same and part[same] == parts[0][same] for part in parts):
        same += 1
    return "".join(f"{part}." for part in parts[0][:same]) if parts else ""


def module_of(tensor: str, shared: str) -> str:
    """The module of a tensor in a model with several stacks.

    >>> module_of("model.vision_tower.patch.weight", "model."), module_of("lm_head.weight", "model.")
    ('vision_tower', 'lm_head')
    """
    return tensor.removeprefix(shared).split(".")[0]


def with_layers(config: Mapping[str, Any], stack: Stack, layers: Sequence[Sequence[Origin]]) -> dict[str, Any]:
    """config.json for an output whose layers come from these; each has one origin per model that takes part.

    Raises:
        ModelError: config.json tells layers apart in a way that the new order cannot keep.
    """
    changed = copy.deepcopy(dict(config))
    for path in {key[:-1] for key in stack.keys}:
        place = _place(changed, path)
        for name, value in list(place.items()):
            if isinstance(value, list) and len(value) == stack.count and _PER_LAYER.fullmatch(name):
                place[name] = [_agreed(name, origins) for origins in layers]
            elif isinstance(value, list) and name.endswith("_layers") and value:
                kinds = [_agreed(name, origins) for origins in layers]
                place[name] = [at for at, chosen in enumerate(kinds) if chosen]
            elif name in _LEADING and isinstance(value, int):
                place[name] = _leading(name, [_agreed(name, origins) for origins in layers], value)
            elif type(value) is int and value > 1 and _EVERY_FEW.fullmatch(name) and "layer_types" not in place:
                _require_same_place(name, value, layers)
    for key in stack.keys:
        _place(changed, key[:-1])[key[-1]] = len(layers)
    return changed


def _keys(prefix: str, count: int, config: Mapping[str, Any]) -> tuple[KeyPath, ...]:
    """Where config.json holds the layer count of this stack."""
    keys: list[KeyPath] = []
    silent: list[KeyPath] = []
    configs = list(_configs(config))
    for path, inner in configs:
        if len(configs) > 1 and _sense(prefix) != _sense(".".join(path)):
            continue
        counts = [key for key, value in inner.items() if type(value) is int and _COUNT.fullmatch(key)]
        sides = "decoder" if any("decoder" in key for key in counts) else "encoder"
        for key in counts:
            side = next((side for side in ("decoder", "encoder") if side in key), None)
            if side is None and len(counts) > 1 and sides == "decoder":
                side = "encoder"  # beside a count of the decoder's, the plain one is the encoder's
            if inner[key] == count and (side is None or side in prefix):
                keys.append((*path, key))
        if not counts and path:
            silent.append((*path, "num_hidden_layers"))
    if keys or not _named_layers(prefix):
        return tuple(keys)
    return tuple(silent) if len(silent) == 1 else ()  # a part of config.json may leave its defaults out


def _named_layers(prefix: str) -> bool:
    return prefix.split(".")[-1] in _LAYERS


def _configs(config: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _configs(value, (*path, key))


def _sense(name: str) -> str:
    """Whether a stack or a part of config.json is for images, for sound or for text."""
    return next((sense for sense, words in _SENSES.items() if re.search(words, name)), "text")


def _place(config: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def _said(name: str, origin: Origin) -> Any:
    """What an origin's config.json says of its layer under this key; None where it has no such key."""
    for path in {key[:-1] for key in origin.stack.keys}:
        value = _place(dict(origin.config), path).get(name)
        if isinstance(value, list) and len(value) == origin.stack.count and _PER_LAYER.fullmatch(name):
            return value[origin.layer]
        if isinstance(value, list):
            return origin.layer in value
        if isinstance(value, int):
            return origin.layer < value
    return None


def _agreed(name: str, origins: Sequence[Origin]) -> Any:
    """What all origins of one output layer say of theirs."""
    said = [(origin, answer) for origin in origins if (answer := _said(name, origin)) is not None]
    if not said:
        raise ModelError(
            f"config.json of '{origins[0].model}' has no '{name}', which tells its layers apart",
            do="load that model with transformers and save it again: that writes it",
        )
    first, answer = said[0]
    for origin, other in said[1:]:
        if other != answer:
            raise ModelError(
                f"layer {first.layer} of '{first.model}' and layer {origin.layer} of '{origin.model}' differ in "
                f"{name} ({answer} and {other})",
                do="combine layers of one kind",
            )
    return answer


def _leading(name: str, first: list[bool], value: int) -> int:
    """How many of the first layers are of the first kind."""
    count = sum(first)
    if not all(first[:count]):
        what = f"the first {value} layers differ from the rest ({name}), and the slices put them elsewhere"
        raise ModelError(what, do="keep those layers first")
    return count


def _require_same_place(name: str, period: int, layers: Sequence[Sequence[Origin]]) -> None:
    for at, origins in enumerate(layers):
        for origin in origins:
            if (origin.layer - at) % period:
                raise ModelError(
                    f"one layer in {period} is of another kind ({name}), and layer {origin.layer} of "
                    f"'{origin.model}' would become layer {at}",
                    do="move layers by multiples of it, or load the models with a transformers that writes layer_types",
                )
