"""Rows that are never trained on, and by which learning is shown, language by language.

One idea: whether a row is held out follows from its prompt and the share alone, by no seed, id, answer or place. So a prompt
is held out everywhere or nowhere: under other ids, with another answer, as one side of a pair, in every training of a chain
and of every study with that share; and what a smaller share holds out, a larger one does too. How many rows that is follows
from the prompts: it is the share on average only.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixmerge.errors import DataError

PREFIX = "held_out/"


def held_out_rows(rows: Sequence[Mapping[str, Any]], share: float, where: str) -> set[int]:
    """The places of the rows of rows.jsonl to hold out; `where` names the mixture in errors.

    Raises:
        DataError: a share above 0 holds out no row, or all of them.
    """
    if share == 0:
        return set()
    held = {place for place, row in enumerate(rows) if prompt_fraction(row["prompt"]) < share}
    if len(held) in (0, len(rows)):
        which, do = ("every", "lower training.held_out") if held else ("no", "raise training.held_out, or set it to 0")
        what = f"held_out {share:g} holds out {which} row of {len(rows)}: their prompts decide, whatever the seed"
        raise DataError(what, where=where, do=do)
    return held


def prompt_fraction(prompt: Sequence[Mapping[str, str]]) -> float:
    """Where in [0, 1) a prompt stands, evenly spread: a hash of its turns, in NFC, each run of white space one blank.

    >>> asked = prompt_fraction([{"role": "user", "content": "Why?"}])
    >>> asked == prompt_fraction([{"role": "user", "content": " Why?\\n"}]), 0 <= asked < 1
    (True, True)
    """
    turns = [(turn["role"], " ".join(unicodedata.normalize("NFC", turn["content"]).split())) for turn in prompt]
    digest = hashlib.sha256(json.dumps(turns).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def by_language(rows: Sequence[Mapping[str, Any]], places: Iterable[int]) -> dict[str, list[Mapping[str, Any]]]:
    """Held-out rows by language, each once however often it is repeated: told apart by what they say, for ids may be shared."""
    found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for place in sorted(places):
        row = rows[place]
        found[row["lang"]].setdefault(json.dumps([row["prompt"], row["completion"], row.get("rejected")]), row)
    return {lang: list(found[lang].values()) for lang in sorted(found)}


def languages_apart(rows: Sequence[Mapping[str, Any]], held: set[int], read: Iterable[str]) -> dict[str, list[str]]:
    """Languages that the prompts' hashes leave on one side, where there are any.

    `without`: with no held-out row that is `read`; `untrained`: with all rows held out.
    """
    every = {row["lang"] for row in rows}
    trained = {row["lang"] for place, row in enumerate(rows) if place not in held}
    apart = {"without": sorted(every - set(read)), "untrained": sorted(every - trained)}
    return {name: found for name, found in apart.items() if found}


def nested(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Language -> measure -> value, from a log entry's keys `held_out/<language>/<measure>`."""
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in entry.items():
        if key.startswith(PREFIX):
            lang, _, measure = key.removeprefix(PREFIX).partition("/")
            out[lang][measure] = value
    return dict(out)
