"""A cache whose rows come from several passes and leave one by one: keys and values are written in place.

transformers' own cache is copied whole at every step (it grows by concatenation) and whenever a row leaves. Here room for
the response is taken once; prompts of different lengths are read in passes of their own, without padding, and stand
right-aligned in the same tensors; where a row has ended, the last row takes its place, so that only that row is copied.
Places before a prompt are zeros, which the attention mask hides. A layer of another kind than plain and sliding-window
attention (recurrent, indexed, shared) is left to transformers: `joinable` says whether there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def joinable(cache: Any) -> bool:
    """Whether `join` knows every layer of a cache that a model has filled."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized for layer in cache.layers
    )


def join(parts: Sequence[Any], width: int, room: int) -> Any:
    """One cache of all rows of `parts`, in order, as after a pass over `width` tokens; `room` tokens can follow.

    The parts are used up, layer by layer: at no time is more than one layer there twice.
    """
    whole = parts[0]
    for number in range(len(whole.layers)):
        layers = [part.layers[number] for part in parts]
        window = layers[0].sliding_window if isinstance(layers[0], DynamicSlidingWindowLayer) else None
        whole.layers[number] = (
            _FullRows(layers, width, room) if window is None else _WindowRows(layers, width, room, window)
        )
        for layer in layers:
            layer.reset()
    return whole


def keep(cache: Any, order: Any, holes: Any, sources: Any) -> None:
    """Keep the rows `order` [rows]: those of before, but that the rows `sources` stand in the places `holes` now."""
    for layer in cache.layers:
        if isinstance(layer, _FullRows | _WindowRows):
            layer.room.keep(len(order), holes, sources)
        else:
            layer.reorder_cache(order)  # the selection that recurrent layers have as well


class _Room:
    """Keys and values [rows, heads, room, width of a head], of which the first `filled` tokens are there."""

    def __init__(self, layers: Sequence[Any], filled: int, room: int) -> None:
        self.filled = filled
        self.tensors = [_side_by_side([getattr(layer, name) for layer in layers], filled, room) for name in _NAMES]

    def add(self, new: Sequence[Any], seen: int | None) -> tuple[Any, Any]:
        """Write keys and values behind the others, and give the last `seen` tokens of each (None: all)."""
        end = self.filled + new[0].shape[-2]
        start = 0 if seen is None else max(0, end - seen)
        for tensor, states in zip(self.tensors, new, strict=True):
            tensor[:, :, self.filled : end] = states
        self.filled = end
        keys, values = (tensor[:, :, start:end] for tensor in self.tensors)
        return keys, values

    def keep(self, rows: int, holes: Any, sources: Any) -> None:
        for place, tensor in enumerate(self.tensors):
            if len(holes):
                tensor[holes] = tensor[sources]
            self.tensors[place] = tensor[:rows]


class _FullRows(DynamicLayer):  # type: ignore[misc]
    def __init__(self, layers: Sequence[Any], width: int, room: int) -> None:
        super().__init__()
        self.room, self.is_initialized = _Room(layers, width, room), True

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.room.add((key_states, value_states), None)

    def get_seq_length(self) -> int:
        return self.room.filled


class _WindowRows(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The last `window` - 1 tokens of the prompt, and all that follow; each step sees the last `window`."""

    def __init__(self, layers: Sequence[Any], width: int, room: int, window: int) -> None:
        super().__init__(sliding_window=window)
        self.room, self.is_initialized = _Room(layers, min(width, window - 1), room), True
        self.cumulative_length = width

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        added = key_states.shape[-2]
        self.cumulative_length += added
        return self.room.add((key_states, value_states), self.sliding_window - 1 + added)


_NAMES = ("keys", "values")


def _side_by_side(parts: Sequence[Any], filled: int, room: int) -> Any:
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    whole = first.new_zeros((rows, first.shape[1], filled + room, first.shape[-1]))
    start = 0
    for part in parts:
        end = start + part.shape[0]
        whole[start:end, :, filled - part.shape[-2] : filled] = part
        start = end
    return whole
