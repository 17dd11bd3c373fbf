"""Judges that need no model: is the answer right by its reference, and does it have the form that was asked for?

A check looks at one response; no opponent is needed. Normalisation is the same on both sides and in every script, and is
said in each kind's lines below. `PairedCheck` makes a comparison with base of any of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from mixmerge.errors import DataError, UserError, did_you_mean
from mixmerge.evaluate.choices import read_letter
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.instructions import UNNAMED, followed
from mixmerge.evaluate.judge import Item, Verdict
from mixmerge.evaluate.prompts import Prompt
from mixmerge.langid import primary


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check finds in one response; `value` in 0..1."""

    verdict: str
    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of check: its rule, the verdicts it can give beside `invalid`, and its words in a report."""

    check: Callable[[Prompt, str], Finding]
    verdicts: tuple[str, ...]
    note: str


class Check:
    """Correct or wrong by a reference (or followed, by instructions), in every kind without a model.

    `kind` is one of `KINDS`. Of several references the one that fits best counts. An empty or degenerate response is `invalid`, value 0; one whose answer cannot be found by a
    strict grammar (a letter, a number) is `unparsed`, value 0: neither is dropped, and neither is right. With
    `threshold`, kind `chrf` says correct or wrong by it; without, `scored` and a value.

    Raises:
        UserError: an unknown kind, or a threshold for a kind that has none.
    """

    def __init__(self, kind: str, *, name: str = "correct", threshold: float | None = None) -> None:
        if kind not in KINDS:
            raise UserError(f"no check of kind {kind!r}", do=did_you_mean(kind, KINDS))
        if threshold is not None and (kind != "chrf" or not 0 < threshold <= 1):
            raise UserError(f"a threshold of {threshold} for the check {kind!r}", do="only chrf has one, in (0, 1]")
        self.kind, self.name, self.threshold = kind, name, threshold
        words = ("correct", "wrong") if threshold is not None else KINDS[kind].verdicts
        self.verdicts: tuple[str, ...] = (*words, "invalid")

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "reference",
            "check": self.kind,
            **({} if self.threshold is None else {"threshold": self.threshold}),
            "note": KINDS[self.kind].note,
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            DataError: a prompt without what its check needs: a reference (a number, a letter), choices, instructions.
        """
        verdicts = []
        for item in items:
            found = self.find(item.prompt, item.response)
            verdicts.append(Verdict(item.prompt, self.name, found.verdict, found.value, found.details))
        return verdicts

    def find(self, prompt: Prompt, response: str) -> Finding:
        """What the check finds in a response to a prompt."""
        check_prompt(self.kind, prompt)
        if is_degenerate(response):
            return Finding("invalid", 0.0)
        found = KINDS[self.kind].check(prompt, response)
        if self.threshold is None:
            return found
        return Finding("correct" if found.value >= self.threshold else "wrong", found.value, found.details)


class PairedCheck:
    """Win, loss or tie, seen from the candidate: right where the opponent (base) is wrong, or the reverse.

    Right is `correct` or `followed`. Where the check has neither (chrF++ without a threshold), the larger value wins, and a
    difference of at most `margin` is a tie. `value` is the difference of the two values.
    """

    verdicts = ("win", "loss", "tie")

    def __init__(self, check: Check, *, name: str = "reference", margin: float = 0.02) -> None:
        if not 0 <= margin < 1:
            raise ValueError(f"margin {margin} is not in [0, 1)")
        self.check, self.name, self.margin = check, name, margin

    def describe(self) -> dict[str, Any]:
        graded = {"margin": self.margin} if "scored" in self.check.verdicts else {}
        return self.check.describe() | {"name": self.name, "compares": "with the opponent's answer"} | graded

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            DataError: as `Check.judge`.
            ValueError: an item without an opponent.
        """
        return [self._judge(item) for item in items]

    def _judge(self, item: Item) -> Verdict:
        if item.opponent is None:
            raise ValueError(f"{item.prompt.id}: a pairwise judge needs an opponent's response")
        mine, theirs = (self.check.find(item.prompt, text) for text in (item.response, item.opponent))
        value = round(mine.value - theirs.value, 6)
        if "scored" in self.check.verdicts:
            ahead = 0 if abs(value) <= self.margin else 1 if value > 0 else -1
        else:
            ahead = (mine.verdict in RIGHT) - (theirs.verdict in RIGHT)
        verdict = "win" if ahead > 0 else "loss" if ahead < 0 else "tie"
        details = {"found": mine.verdict, "opponent_found": theirs.verdict}
        return Verdict(item.prompt, self.name, verdict, value, details)


RIGHT = ("correct", "followed")


def normalise(text: str) -> str:
    """A text as answers are compared: NFKC, small letters, decimal digits of all scripts as 0..9, no punctuation, no Arabic
    vowel signs and kashida, ё as е, one space between words.

    A mark between two digits (3.5, 10:30) and a minus sign before a number stay; so do the signs + < = > and currencies.

    >>> normalise("  The «Answer»: १२.५ "), normalise("مَكَّة"), normalise("-5")
    ('the answer 12.5', 'مكة', '-5')
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("ё", "е").replace("−", "-")
    text = re.sub("[\u064b-\u0652\u0670\u0640]", "", text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    out = []
    for i, c in enumerate(text):
        category = unicodedata.category(c)
        if category == "Cf" and c not in "\u200c\u200d":
            continue
        if category[0] == "P":
            before, after = text[i - 1 : i], text[i + 1 : i + 2]
            inside = before.isdigit() and after.isdigit()
            minus = c == "-" and after.isdigit() and not (before.isalnum() or before == ")")
            out.append(c if inside or minus else "" if c in "'’" else " ")
        else:
            out.append(c)
    return " ".join("".join(out).split())


# As MLQA (Lewis et al. 2020, arXiv 1910.07475) for English, Spanish and Arabic; French in the same way.
ARTICLES: Mapping[str, frozenset[str]] = {
    "en": frozenset({"a", "an", "the"}),
    "es": frozenset({"un", "una", "unos", "unas", "el", "la", "los", "las"}),
    "fr": frozenset({"un", "une", "des", "le", "la", "les", "l"}),
}


def answer_words(text: str, language: str) -> list[str]:
    """Words of a normalised text without the language's articles (of Arabic words: without a leading ال)."""
    code = primary(language)
    if code == "fr":
        text = re.sub(r"\b([ldLD])['’]", r"\1 ", text)
    found = [word for word in normalise(text).split() if word not in ARTICLES.get(code, ())]
    if code == "ar":
        found = [word[2:] if word.startswith("ال") and len(word) > 3 else word for word in found]
    return found


def numbers_in(text: str) -> list[frozenset[Decimal]]:
    """The numbers of a text, each as the set of its readings: `1.234` is 1234 or 1.234, as languages differ.

    Digits of any script; separators of thousands are a comma, a stop, an apostrophe, a space before three digits, and the
    Arabic ones; Indian grouping (1,23,456) too.

    >>> [sorted(map(int, readings)) for readings in numbers_in("Of 1,000 apples 12 are left: ١٬٢٣٤ of 5 100.")]
    [[1, 1000], [12], [1234], [100, 5100]]
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("’", "'")
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = text.replace("٬", "'").replace("٫", ".")
    found = []
    for match in re.finditer(r"(?<![\w.,])-?\d+(?:[.,']\d+|[ ]\d{3}(?!\d))*|\d+(?:[.,']\d+)*", text):
        readings = {reading for written in _readings(match[0]) if (reading := _decimal(written)) is not None}
        if readings:
            found.append(frozenset(readings))
    return found


def _readings(written: str) -> list[str]:
    sign, body = ("-", written[1:]) if written.startswith("-") else ("", written)
    out = []
    if " " in body:
        grouped = re.fullmatch(r"\d{1,3}(?: \d{3})+(?:[.,]\d+)?", body)
        out += [sign + body.replace(" ", "").replace(",", ".")] if grouped else []
        return out + _readings(body.rsplit(" ", 1)[1])
    if "'" in body:
        return [sign + body.replace("'", "").replace(",", ".")]
    marks = [c for c in body if c in ".,"]
    if not marks:
        return [sign + body]
    last = marks[-1]
    groups = re.split(r"[.,]", body)
    if len(set(marks)) == 2:
        whole, _, rest = body.rpartition(last)
        return [sign + re.sub(r"[.,]", "", whole) + "." + rest] if marks.count(last) == 1 else []
    thousands = len(groups[0]) <= 3 and len(groups[-1]) == 3 and all(len(g) in (2, 3) for g in groups[1:])
    if thousands and groups[0] != "0":
        out.append(sign + "".join(groups))
    if len(groups) == 2:
        out.append(sign + ".".join(groups))
    return out


def _decimal(written: str) -> Decimal | None:
    try:
        return Decimal(written)
    except InvalidOperation:
        return None


def check_prompt(kind: str, prompt: Prompt) -> None:
    """Raise a DataError where a prompt lacks what its check needs: a reference (a number, a word), choices, instructions."""
    if kind == "instructions":
        if not prompt.instructions:
            raise DataError(
                "no instructions to check", where=prompt.id, do="map the columns `instructions` and `arguments`"
            )
    elif prompt.reference is None:
        raise DataError("no reference answer to check against", where=prompt.id, do="map the column `reference`")
    if kind == "choice" and not prompt.choices:
        raise DataError("no choices to check a letter of", where=prompt.id, do="map the column `choices`")
    if kind == "number" and not any(numbers_in(text) for text in prompt.references):
        raise DataError(f"no number in the reference {prompt.reference!r}", where=prompt.id, do="use another check")
    if kind == "span" and not any(answer_words(text, prompt.lang) for text in prompt.references):
        raise DataError(f"no word in the reference {prompt.reference!r}", where=prompt.id, do="use another check")


def _told(right: bool, value: float | None = None, **details: Any) -> Finding:
    return Finding("correct" if right else "wrong", float(right) if value is None else round(value, 6), details)


def _exact(prompt: Prompt, response: str) -> Finding:
    return _told(normalise(response) in {normalise(text) for text in prompt.references})


def _number(prompt: Prompt, response: str) -> Finding:
    found = numbers_in(response)
    if not found:
        return Finding("unparsed", 0.0)
    right = {reading for text in prompt.references for number in numbers_in(text)[-1:] for reading in number}
    return _told(bool(found[-1] & right), found=str(max(found[-1])))


def _span(prompt: Prompt, response: str) -> Finding:
    mine = answer_words(response, prompt.lang)
    contained, best, exact = False, 0.0, False
    for theirs in filter(None, (answer_words(text, prompt.lang) for text in prompt.references)):
        same = sum((Counter(mine) & Counter(theirs)).values())
        best = max(best, 2 * same / (len(mine) + len(theirs)))
        contained |= any(mine[i : i + len(theirs)] == theirs for i in range(len(mine) - len(theirs) + 1))
        exact |= mine == theirs
    return _told(contained, best, exact=exact)


def _choice(prompt: Prompt, response: str) -> Finding:
    letter = read_letter(response, prompt.choices)
    if letter is None:
        return Finding("unparsed", 0.0, {"letter": None})
    return _told(letter == prompt.reference, letter=letter)


def _chrf(prompt: Prompt, response: str) -> Finding:
    from sacrebleu.metrics import CHRF

    score = CHRF(word_order=2).sentence_score(response, prompt.references).score / 100
    return Finding("scored", round(score, 6))


def _instructions(prompt: Prompt, response: str) -> Finding:
    asked = [each for each in prompt.instructions if each.id != UNNAMED]
    done = {f"{i}. {each.id}": followed(each, response, prompt.lang) for i, each in enumerate(asked, 1)}
    details: dict[str, Any] = {"instructions": done}
    if unnamed := len(prompt.instructions) - len(asked):
        details["arguments_without_instruction"] = unnamed
    verdict = "followed" if all(done.values()) else "not_followed"
    return Finding(verdict, round(sum(done.values()) / len(done), 6), details)


KINDS: Mapping[str, Kind] = {
    "exact": Kind(_exact, ("correct", "wrong"), "the whole answer is the reference, without case and punctuation"),
    "number": Kind(_number, ("correct", "wrong", "unparsed"), "the answer's last number is the reference's last"),
    "span": Kind(
        _span,
        ("correct", "wrong"),
        "the reference's words stand in the answer in their order; value is the SQuAD F1 of words, articles left out",
    ),
    "choice": Kind(_choice, ("correct", "wrong", "unparsed"), "the answer names the letter of the right choice"),
    "chrf": Kind(_chrf, ("scored",), "chrF++ (characters 1..6, words 1..2) with one reference, as a fraction"),
    "instructions": Kind(
        _instructions,
        ("followed", "not_followed"),
        "IFEval's strict checks, written for six languages; value is the share of instructions followed",
    ),
}
