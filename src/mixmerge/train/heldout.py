"""Rows that are never trained on, and by which learning is shown, language by language.

One idea: which rows these are follows from a hash of seed, objective and the row's id without its language: all uses of a
row, and its parallels in other languages, are held out together; no order of rows or files plays a part.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PREFIX = "held_out/"


def held_out_rows(rows: Sequence[Mapping[str, Any]], share: float, seed: int) -> set[int]:
    """The places of the rows of rows.jsonl to hold out: about `share` of each language's distinct rows, at least one.

    A language with one distinct row keeps it for training.
    """
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, row in enumerate(rows):
        _, _, number = row["id"].partition("/")
        places[row["lang"]][f"{row['objective']}/{number}"].append(place)
    held: set[int] = set()
    for uses in places.values():
        count = min(max(1, round(share * len(uses))), len(uses) - 1) if share > 0 else 0
        ranked = sorted(uses, key=lambda key: hashlib.sha256(f"{seed}/held out/{key}".encode()).digest())
        held.update(place for key in ranked[:count] for place in uses[key])
    return held


def by_language(rows: Sequence[Mapping[str, Any]], places: Iterable[int]) -> dict[str, list[Mapping[str, Any]]]:
    """Held-out rows by language, each distinct row once."""
    found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for place in sorted(places):
        row = rows[place]
        found[row["lang"]].setdefault(f"{row['objective']}/{row['id']}", row)
    return {lang: list(found[lang].values()) for lang in sorted(found)}


def nested(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Language -> measure -> value, from a log entry's keys `held_out/<language>/<measure>`."""
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in entry.items():
        if key.startswith(PREFIX):
            lang, _, measure = key.removeprefix(PREFIX).partition("/")
            out[lang][measure] = value
    return dict(out)
