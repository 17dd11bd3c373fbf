"""What makes two steps the same: canonical JSON of everything that can change the output, hashed.

A payload has four parts: kind, revision (raised when the kind's meaning changes), `what`, and the ids of the inputs.
The encoder knows str, int, float, bool, None, lists and string-keyed dicts, and refuses everything else, so nothing
enters an identity by accident. The payload is kept beside the hash, so a change is shown as fields, not as hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

ID_LENGTH = 12
ABSENT = "(absent)"  # in the place of the value of a field that one of two has not


def canonical(value: Any) -> str:
    """The one JSON text of a value.

    >>> canonical({"b": 1.0, "a": [True, None]})
    '{"a":[true,null],"b":1.0}'

    Raises:
        TypeError: a value of a type that has no one text (a path, a set, an object).
        ValueError: NaN or infinity.
    """
    _check(value, "$")
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def step_id(payload: Mapping[str, Any]) -> str:
    """The id of a step: the first 12 hex digits (48 bits) of its payload's fingerprint."""
    return fingerprint(dict(payload))[:ID_LENGTH]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Each field that differs, as `path: old -> new`, in path order.

    >>> list(differences({"lr": 1e-5, "rows": 8}, {"lr": 2e-5, "rows": 8}))
    ['lr: 1e-05 -> 2e-05']
    """
    for field, before, after in changes(old, new, path):
        if before is ABSENT:
            yield f"{field}: added {_short(after)}"
        elif after is ABSENT:
            yield f"{field}: removed {_short(before)}"
        else:
            yield f"{field}: {_short(before)} -> {_short(after)}"


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each field that differs with both values, ABSENT where one has none, in path order.

    >>> list(changes({"lr": 1e-5, "rows": 8}, {"lr": 2e-5, "rows": 8}))
    [('lr', 1e-05, 2e-05)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else str(key)
            if key in old and key in new:
                yield from changes(old[key], new[key], below)
            else:
                yield below, old.get(key, ABSENT), new.get(key, ABSENT)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, f"{path}.{index}")
    elif not _same_scalar(old, new) and canonical(old) != canonical(new):
        yield path, old, new


def _same_scalar(old: Any, new: Any) -> bool:
    """Whether two values are one text, word or whole number: a quick look, which leaves the rest to the encoder."""
    return type(old) is type(new) and isinstance(old, str | int | None) and bool(old == new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path}: {value} has no place in an identity")
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
        return
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _check(item, f"{path}.{key}")
        return
    raise TypeError(f"{path}: {type(value).__name__} has no canonical form; encode it as text, number, list or dict")
