"""Finding training rows whose question is also an evaluation prompt.

One idea: two texts are the same when nothing is left of their difference after NFKC, casefolding, dropping invisible
characters and folding punctuation and white space. Exact after that: paraphrases and near duplicates are not found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from mixmerge.data.formats import Row


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row one of whose user turns equals an evaluation prompt (given as it stands in the prompt set)."""

    row_id: str
    lang: str
    prompt: str


def overlapping(rows: Iterable[Row], prompts_texts: Iterable[str]) -> list[Overlap]:
    """The rows that ask what a prompt asks, in the order of `rows`, each once."""
    prompts: dict[str, str] = {}
    for text in prompts_texts:
        prompts.setdefault(normalised(text), text)
    found = []
    for row in rows:
        asked = (normalised(turn["content"]) for turn in row.prompt if turn["role"] == "user")
        match = next((prompts[text] for text in asked if text in prompts), None)
        if match is not None:
            found.append(Overlap(row.id, row.lang, match))
    return found


def normalised(text: str) -> str:
    """The text as it is compared.

    >>> normalised("What\\u2019s  NEW, e-mail?") == normalised("what's new e\\u2010mail")
    True

    A text of punctuation only keeps it, so that "?" and "!" stay apart.
    """
    # Casefolding can undo normalisation (and the reverse), so NFKC stands on both sides of it.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    folded = "".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in text)
    return re.sub(r"\s+", " ", folded).strip() or text.strip()
