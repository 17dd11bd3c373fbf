"""What a parameter can be in the YAML, and what it is at one tensor.

The one idea: a value is a scalar, a gradient over the layers or a list of {filter, value}. Layers are known from the
tensors' names, so no architecture is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Number = int | float


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors whose name contains `filter` (None or "*": for every tensor)."""

    filter: str | None
    value: Number | bool | tuple[Number, ...]

    def matches(self, tensor: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor


Value = Number | bool | tuple[Number, ...] | tuple[Filtered, ...]
Parameters = Mapping[str, Value]


def resolve(value: Value, tensor: str, depth: float) -> float | None:
    """The value at a tensor: of filtered values the first that matches, of a gradient its value at `depth`."""
    if not isinstance(value, tuple):
        return value
    if isinstance(value[0], Filtered):
        match = next((item for item in value if isinstance(item, Filtered) and item.matches(tensor)), None)
        return None if match is None else resolve(match.value, tensor, depth)
    points = [float(point) for point in value if not isinstance(point, Filtered)]
    place = depth * (len(points) - 1)
    low = min(int(place), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    return points[low] + (place - low) * (points[high] - points[low])


def as_yaml(parameters: Parameters) -> dict[str, Any]:
    """Parameters as YAML would give them: lists and mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Filtered):
            name = {} if value.filter is None else {"filter": value.filter}
            return {**name, "value": plain(value.value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in parameters.items()}


def layer_depths(tensors: Iterable[str]) -> dict[str, float]:
    """The position of each tensor's layer, idx / (L - 1), 0 outside of layers: known from the names alone.

    A layer's index is the first number in the dotted name, and L counts what shares the part before it. The layer of a
    model of one layer lies at 1, as mergekit has it.

    >>> layer_depths(["embed.weight", "h.0.mlp.weight", "h.1.mlp.weight", "h.2.mlp.weight"])
    {'embed.weight': 0.0, 'h.0.mlp.weight': 0.0, 'h.1.mlp.weight': 0.5, 'h.2.mlp.weight': 1.0}
    """
    places = {name: split_layer(name) for name in tensors}
    last: dict[str, int] = {}
    for stack, index, _ in filter(None, places.values()):
        last[stack] = max(last.get(stack, 0), index)
    alone = 0.0 if any(last.values()) else 1.0
    return {
        name: 0.0 if place is None else place[1] / last[place[0]] if last[place[0]] else alone
        for name, place in places.items()
    }


def split_layer(tensor: str) -> tuple[str, int, str] | None:
    """A tensor's name around its first number, None where there is none.

    A number that the name begins with counts where there is no other: it is the place of a model in a sequence of modules.

    >>> split_layer("model.layers.3.mlp.experts.1.weight")
    ('model.layers', 3, 'mlp.experts.1.weight')
    >>> split_layer("0.encoder.layer.3.weight")
    ('0.encoder.layer', 3, 'weight')
    """
    parts = tensor.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    at = next((i for i in numbers if i), numbers[0] if numbers else None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def sum_to_zero(weights: Sequence[float]) -> bool:
    """Whether weights cannot be normalised; 0.1 + 0.2 - 0.3 is 0 to whoever wrote it."""
    return abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights))
