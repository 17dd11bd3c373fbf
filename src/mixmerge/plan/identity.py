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
from difflib import SequenceMatcher
from typing import Any, NamedTuple

ID_LENGTH = 12
ABSENT = "(absent)"  # in the place of the value of a field that one of two has not
LONGEST, BEFORE = 60, 20  # characters of a value in a line, and those before where it begins to differ
PLAIN = (str, int, type(None))  # types whose values are told apart without the encoder
ALIGNED = 1000  # elements of a list that are compared with those of another, wherever they stand


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


class Change(NamedTuple):
    """A field that differs, with both values; ABSENT where one has none."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """`field: old -> new`, long values cut to what stands where they differ."""
        return self._in_words(*brief(self.old, self.new))

    @property
    def whole(self) -> str:
        """As the text, with nothing cut."""
        return self._in_words(_text(self.old), _text(self.new))

    def to_json(self) -> dict[str, Any]:
        """The field and the values that there are."""
        values = {"old": self.old, "new": self.new}
        return {"field": self.field} | {key: value for key, value in values.items() if value is not ABSENT}

    def _in_words(self, old: str, new: str) -> str:
        if self.old is ABSENT:
            return f"{self.field}: added {new}"
        return f"{self.field}: removed {old}" if self.new is ABSENT else f"{self.field}: {old} -> {new}"


def changes(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """Each field that differs with both values, ABSENT where one has none, in path order; of lists, each element.

    Elements that have names go by these. Of others one that went has its number in the old list, one that came or changed that in the new one.

    >>> [str(change) for change in changes({"lr": 1e-5, "rows": 8}, {"lr": 2e-5, "rows": 8})]
    ['lr: 1e-05 -> 2e-05']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else str(key)
            if key in old and key in new:
                yield from changes(old[key], new[key], below)
            else:
                yield Change(below, old.get(key, ABSENT), new.get(key, ABSENT))
    elif isinstance(old, list) and isinstance(new, list):
        named = _named(old), _named(new)
        if named[0] and named[1] and ([*named[0]] == [*named[1]] or named[0].keys() != named[1].keys()):
            yield from changes(*named, path)
            return
        for before, after in _aligned(old, new):
            if before is not None and after is not None:
                yield from changes(old[before], new[after], f"{path}.{after}")
            elif after is not None:
                yield Change(f"{path}.{after}", ABSENT, new[after])
            elif before is not None:
                yield Change(f"{path}.{before}", old[before], ABSENT)
    elif not _same_scalar(old, new) and canonical(old) != canonical(new):
        yield Change(path, old, new)


def _named(values: list[Any]) -> dict[str, Any]:
    """The elements of a list by their names; nothing where not each is a mapping with a name of its own."""
    found = {
        value["name"]: value for value in values if isinstance(value, Mapping) and isinstance(value.get("name"), str)
    }
    return found if len(found) == len(values) else {}


def _aligned(old: list[Any], new: list[Any]) -> Iterator[tuple[int | None, int | None]]:
    """Which element of one list stands for which of the other: by place in lists of one length, else by what is equal."""
    blocks = [(0, len(old), 0, len(new))]
    if len(old) != len(new) and max(len(old), len(new)) <= ALIGNED:
        texts = [canonical(value) for value in old], [canonical(value) for value in new]
        codes = SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
        blocks = [(start, end, first, last) for word, start, end, first, last in codes if word != "equal"]
    for start, end, first, last in blocks:
        both = min(end - start, last - first)
        yield from ((start + at, first + at) for at in range(both))
        yield from ((at, None) for at in range(start + both, end))
        yield from ((None, at) for at in range(first + both, last))


def brief(old: Any, new: Any) -> tuple[str, str]:
    """Two values as texts of at most some 60 characters; longer ones show where they differ.

    >>> brief("a" * 99 + "b", "a" * 99 + "c")[0]
    '...aaaaaaaaaaaaaaaaaaaab"'
    """
    texts = _text(old), _text(new)
    same = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = 0 if same < LONGEST - BEFORE else same - BEFORE
    return _cut(texts[0], start), _cut(texts[1], start)


def _cut(text: str, start: int) -> str:
    if len(text) <= LONGEST:
        return text
    end = start + LONGEST - (6 if start else 3)
    return "..." * (start > 0) + text[start:end] + "..." * (end < len(text))


def _text(value: Any) -> str:
    return ABSENT if value is ABSENT else json.dumps(value, ensure_ascii=False)


def _same_scalar(old: Any, new: Any) -> bool:
    """Whether two values are one text, word or whole number: a quick look, which leaves the rest to the encoder."""
    return type(old) is type(new) and isinstance(old, PLAIN) and bool(old == new)


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
