"""Multiple choice: questions written out with letters, and the letter that a response names.

A letter is read by a strict grammar: whole lines, nothing guessed. Whatever names no letter, or two, names none.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from mixmerge.errors import DataError

LETTERS = string.ascii_uppercase
# What is asked of the answer, in the language of the question.
INSTRUCTION: Mapping[str, str] = {
    "en": "Answer with the letter of the correct choice only.",
    "hi": "केवल सही विकल्प का अक्षर लिखकर उत्तर दें।",
    "fr": "Réponds uniquement par la lettre de la bonne réponse.",
    "es": "Responde solo con la letra de la opción correcta.",
    "ar": "أجب بحرف الخيار الصحيح فقط.",
    "ru": "Ответь только буквой правильного варианта.",
}

# Letters that people write for A, B, C, D. A Cyrillic В is the third letter and looks like the second: it names none.
_OTHER_LETTERS: Mapping[str, str] = {
    **dict(zip("АС", "AC", strict=True)),
    **dict(zip("أبجد", "ABCD", strict=True)),
    "ا": "A",
    **dict(zip("कखगघ", "ABCD", strict=True)),
    **dict(zip(("ए", "बी", "सी", "डी"), "ABCD", strict=True)),
}
_ANSWER = (
    r"(?:(?:so|thus|hence|therefore|i think|i believe),? (?:that )?)?(?:the |my |final |correct |right |best )*(?:answer|option|choice)(?: is)?",
    r"(?:la |ma )?(?:bonne |réponse finale|)(?:réponse|option)(?: correcte| finale)?(?: est)?(?: la lettre)?",
    r"(?:la |mi )?(?:respuesta|opción)(?: correcta| final)?(?: es)?(?: la letra)?",
    r"(?:мой |правильный |верный )*(?:ответ|вариант)(?: ответа)?",
    r"(?:الإجابة|الاجابة|إجابتي|الجواب|الخيار)(?: الصحيحة| الصحيح| النهائية)?(?: هي| هو)?(?: الخيار)?",
    r"(?:सही |मेरा |अंतिम )*(?:उत्तर|जवाब|विकल्प)(?: है)?",
)
_LEAD = re.compile(rf"^(?:{'|'.join(_ANSWER)})\s*[:：\-–—]?\s*", re.IGNORECASE)
_LETTER = re.compile(rf"^[(\[]?\s*([A-Z]|{'|'.join(sorted(_OTHER_LETTERS, key=len, reverse=True))})\s*[)\].:]*(?=\s|$)")


def render(question: str, choices: Sequence[str], ask: str) -> str:
    """The prompt: the question, a line a choice with its letter, and what is asked.

    >>> print(render("Which is a fruit?", ["Stone", "Plum"], "Answer with the letter."))
    Which is a fruit?
    <BLANKLINE>
    A. Stone
    B. Plum
    <BLANKLINE>
    Answer with the letter.
    """
    lines = [f"{letter}. {' '.join(choice.split())}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question.strip(), "", *lines, "", ask])


def read_choices(value: Any, column: str, where: str) -> tuple[str, ...]:
    """The choices of a row, as text.

    Raises:
        DataError: not a list of 2 to 26 texts or numbers, or an empty one. (The same one twice is known of MMLU; whether
            the right one can still be told is asked by `letter_of`.)
    """
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise DataError(f"{column!r} is no list of 2 to {len(LETTERS)} choices", where=where)
    if any(isinstance(each, bool) or not isinstance(each, str | int | float) for each in value):
        raise DataError(f"{column!r} has a choice that is neither text nor a number", where=where)
    choices = tuple(str(each).strip() for each in value)
    if not all(choices):
        raise DataError(f"{column!r} has an empty choice", where=where)
    return choices


def letter_of(answer: Any, choices: Sequence[str], where: str) -> str:
    """The letter of the right choice, given as a letter, as an index from 0 (a number), or as the choice's text.

    >>> [letter_of(answer, ["red", "blue"], "row") for answer in (1, "B", "b", "blue")]
    ['B', 'B', 'B', 'B']

    Raises:
        DataError: none of these, a text that can be read in two ways that differ, or a right choice that stands twice.
    """
    found = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} if 0 <= answer < len(choices) else set()
    elif isinstance(answer, str):
        text = answer.strip()
        if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
            found.add(LETTERS.index(text.upper()))
        if text.isascii() and text.isdigit() and int(text) < len(choices):
            found.add(int(text))
        found |= {number for number, choice in enumerate(choices) if choice == text}
    if not found:
        raise DataError(f"answer {answer!r} is none of the {len(choices)} choices", where=where)
    same = [" ".join(choice.split()) for choice in choices]
    twice = sorted(number for number in found if same.count(same[number]) > 1)
    if twice:
        letters = " and ".join(LETTERS[i] for i, choice in enumerate(same) if choice == same[twice[0]])
        raise DataError(
            f"the right choice {same[twice[0]]!r} stands twice, as {letters}",
            where=where,
            do="change one of them, or take the row out",
        )
    if len(found) > 1:
        named = " and ".join(f"{LETTERS[i]} ({choices[i]!r})" for i in sorted(found))
        raise DataError(f"answer {answer!r} can be read as {named}", where=where, do="give its letter")
    return LETTERS[found.pop()]


def read_letter(response: str, choices: Sequence[str]) -> str | None:
    """The letter that a response names, or None.

    A line names a letter where it is nothing but the letter (`B`, `B.`, `(B)`, also in bold), after `Answer:` in one of
    six languages or not, followed by nothing or by that choice's own text. A response that is one choice's text names it
    too, and a small letter counts after a colon and where the response is nothing else. Lines with `Answer:` count before
    the others; where they name several letters, none is named. Also read: Arabic and Hindi letters in their order, and
    Cyrillic А and С.

    >>> [read_letter(text, ["Oslo", "Rome"]) for text in ("**B**", "The answer is (B).", "B. Rome", "A or B", "Rome")]
    ['B', 'B', 'B', None, 'B']
    """
    text = re.sub(r"\\boxed\{([^{}\n]*)\}", r"\1", _unmarked(response))
    lines = [line for each in text.splitlines() if (line := each.strip(" \t'"))]
    led: set[str] = set()
    bare: set[str] = set()
    for line in lines:
        rest = _LEAD.sub("", line, count=1)
        if re.match(r"[a-z]\W*$", rest) and re.search(r"[:：]\s*$", line[: len(line) - len(rest)]):
            rest = rest.upper()
        letter = _line_letter(rest, choices)
        if letter:
            (bare if rest == line else led).add(letter)
    named = led or bare
    if len(named) == 1:
        return named.pop()
    if named:
        return None
    whole = " ".join(lines)
    if small := re.fullmatch(r"[(\[]?([a-z])[)\].:]*", whole):
        letter = str(small[1]).upper()
        return letter if letter in LETTERS[: len(choices)] else None
    same = [i for i, choice in enumerate(choices) if _plain(choice) == _plain(whole)]
    return LETTERS[same[0]] if len(same) == 1 else None


def _line_letter(line: str, choices: Sequence[str]) -> str | None:
    match = _LETTER.match(line)
    if match is None:
        return None
    letter = _OTHER_LETTERS.get(match[1], match[1])
    if letter not in LETTERS[: len(choices)]:
        return None
    rest = _plain(line[match.end() :])
    return letter if rest in ("", "है", _plain(choices[LETTERS.index(letter)])) else None


def _unmarked(text: str) -> str:
    """Without marks of format, quotation and direction."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return re.sub(r"[*_`$\"“”«»]+", "", text)


def _plain(text: str) -> str:
    """Compared without these, case, white space, and points at the ends."""
    return " ".join(_unmarked(text).casefold().split()).strip(".:;,!?।؟'()[]- ")
