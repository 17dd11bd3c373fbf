"""Verifiable instructions (IFEval: Zhou et al. 2023, arXiv 2311.07911, table 1): does an answer have the form asked for?

Written from the paper's definitions, for texts in any script: a word is a run of letters, marks and digits, sentences end
at the marks of their script, commas are Arabic ones too, and the phrases of a closed answer are those of the prompt's
language. All checks are strict ones: the response as it is. What cannot be checked is refused when prompts are read.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge.errors import DataError, did_you_mean
from mixmerge.langid import VARIETIES, letters, likelihoods, primary, prose

UNNAMED = "unnamed"  # arguments that a row gives and no instruction takes; never checked, and counted

LEAST_LETTERS = 8  # of prose, to tell its language by

Argument = str | int | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its id in IFEval, and its arguments by name."""

    id: str
    arguments: tuple[tuple[str, Argument], ...] = ()

    def named(self) -> dict[str, Any]:
        """The arguments, JSON-serialisable."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.arguments}


def read_instructions(ids: Any, arguments: Any, where: str) -> tuple[Instruction, ...]:
    """The instructions of a row: a list of ids and, at the same places, their arguments (null where there are none).

    Arguments that stand after the last id belong to no instruction: they are kept under the id `unnamed`.

    Raises:
        DataError: no list of ids, an id that is not known, an argument that is missing, unknown or of another kind.
    """
    if not isinstance(ids, list) or not ids or not all(isinstance(each, str) for each in ids):
        raise DataError("the instructions are no list of ids", where=where)
    given = [{}] * len(ids) if arguments is None else arguments
    if not isinstance(given, list) or len(given) < len(ids):
        raise DataError(f"{len(ids)} instructions, and arguments that are no list of as many", where=where)
    found = []
    for number, each in enumerate(given):
        if not isinstance(each, Mapping | None):
            raise DataError(f"the arguments of instruction {number + 1} are no mapping", where=where)
        named = {key: value for key, value in (each or {}).items() if value is not None}
        if number < len(ids):
            found.append(_instruction(ids[number], named, where))
        elif named:
            found.append(Instruction(UNNAMED, (("arguments", json.dumps(named, ensure_ascii=False, sort_keys=True)),)))
    return tuple(found)


def _instruction(name: str, named: Mapping[str, Any], where: str) -> Instruction:
    if name not in INSTRUCTIONS:
        raise DataError(f"unknown instruction {name!r}", where=where, do=did_you_mean(name, INSTRUCTIONS))
    _, wanted = INSTRUCTIONS[name]
    for key in named:
        if key not in wanted:
            raise DataError(f"{name} takes no argument {key!r}", where=where, do=did_you_mean(key, wanted or ["none"]))
    values: list[tuple[str, Argument]] = []
    for key, kind in wanted.items():
        value = named.get(key)
        if kind == "count":
            # data sets that went through a table have 3.0 for 3
            right = (
                isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
            )
            read: Argument = int(value) if right and value is not None else 0
        elif kind == "relation":
            right, read = value in RELATIONS, str(value)
        elif kind == "words":
            right = isinstance(value, list) and bool(value) and all(isinstance(w, str) and w.strip() for w in value)
            read = tuple(str(w).strip() for w in value or ()) if right else ()
        else:
            right, read = isinstance(value, str) and bool(value.strip()), str(value)
        if not right:
            said = "is missing" if value is None else f"is {value!r}"
            raise DataError(f"{name}: argument {key!r} {said}", where=where, do=f"give a {_KINDS[kind]}")
        values.append((key, read))
    return Instruction(name, tuple(values))


def followed(instruction: Instruction, response: str, language: str) -> bool:
    """Whether a response to a prompt in `language` has the form that an instruction asks for."""
    check, _ = INSTRUCTIONS[instruction.id]
    return check(response, language, dict(instruction.arguments))


def words_of(text: str) -> list[str]:
    """Words: runs of letters, vowel signs and digits; an apostrophe or hyphen inside joins its two sides.

    >>> words_of("Don't: le week-end, हिन्दी में!")
    ["Don't", 'le', 'week-end', 'हिन्दी', 'में']
    """
    return re.findall(_WORD, text)


def sentences_of(text: str) -> list[str]:
    """Sentences: ended by `.`, `!`, `?` or their kin of other scripts before white space or at the end.

    Numbers of lists, initials and common abbreviations do not end one, and a line break does not either (IFEval's
    splitter has none): a heading belongs to the sentence after it. A stretch without a letter or digit is none.

    >>> sentences_of("1. Dr. Roy came at 3.15. यह सच है। هل هذا صحيح؟ نعم.")
    ['1. Dr. Roy came at 3.15.', 'यह सच है।', 'هل هذا صحيح؟', 'نعم.']
    """
    found, start = [], 0
    for end in re.finditer(r"[.!?…।॥؟۔。！？]+[\"'”»’)\]*_]*(?=\s|$)", text):
        before = text[start : end.start()]
        line = before.rsplit("\n", 1)[-1]
        last = line.split()[-1].strip("(\"'«“*_") if line.split() else ""
        if end[0].startswith(".") and _ABBREVIATION.fullmatch(last):
            continue
        if re.fullmatch(r"[\s*#>-]*\d{1,3}", line):  # the number of a list's entry
            continue
        found.append(text[start : end.end()])
        start = end.end()
    found.append(text[start:])
    return [sentence.strip() for sentence in found if words_of(sentence)]


_LETTER = r"[^\W_]"
_MARK = "\u0300-\u036f\u064b-\u065f\u0670\u0900-\u0903\u093a-\u094d\u0951-\u0957\u0962\u0963\u200c\u200d"
_WORD = rf"(?:{_LETTER}[{_MARK}]*)+(?:['’‑-](?:{_LETTER}[{_MARK}]*)+)*"
_ABBREVIATION = re.compile(
    r"[^\W\d_]|[^\W\d_](?:\.[^\W\d_])+|mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|e\.g|i\.e|no|vol|fig|inc|"
    r"mme|mlle|sra|srta|ud|uds|т|г|гг|др|пр|стр|ул|тыс|млн|डॉ|श्री",
    re.IGNORECASE,
)

RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "at least": lambda found, asked: found >= asked,
    "less than": lambda found, asked: found < asked,
}
_KINDS = {
    "count": "whole number",
    "relation": "relation: " + " or ".join(RELATIONS),
    "words": "list of words",
    "text": "text",
}


def _related(arguments: Mapping[str, Any], found: int, relation: str, asked: str) -> bool:
    return RELATIONS[arguments[relation]](found, int(arguments[asked]))


def _plain(text: str) -> str:
    """Compared without case, compatibility forms, Arabic vowel signs and kinds of white space."""
    text = re.sub("[\u064b-\u0652\u0670\u0640]", "", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.replace("’", "'").split())


def _whole(word: str) -> str:
    return rf"(?<![\w{_MARK}]){re.escape(word)}(?![\w{_MARK}])"


def _in_language(text: str, language: str) -> bool:
    """As the prose reads; a text without prose speaks no language, so none is wrong (IFEval counts it likewise)."""
    words = prose(text).lower()
    if letters(words) < LEAST_LETTERS:
        words = " ".join(words_of(text)).lower()  # a whole answer inside a fence, or a list of words
    if not letters(words):
        return True
    wanted = primary(language)
    found = likelihoods(words)
    return not found or max(found, key=lambda code: found[code]) in {wanted, *VARIETIES.get(wanted, ())}


# Keywords and language


def _existence(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return all(_plain(word) in _plain(text) for word in given["keywords"])


def _frequency(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _related(given, _plain(text).count(_plain(given["keyword"])), "relation", "frequency")


def _forbidden(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return not any(re.search(_whole(_plain(word)), _plain(text)) for word in given["forbidden_words"])


def _letter_frequency(text: str, language: str, given: Mapping[str, Any]) -> bool:
    found = unicodedata.normalize("NFC", text).casefold().count(given["letter"].strip().casefold())
    return _related(given, found, "let_relation", "let_frequency")


def _response_language(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _in_language(text, given["language"])


# Length


def _sentences(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _related(given, len(sentences_of(text)), "relation", "num_sentences")


def _words(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _related(given, len(words_of(text)), "relation", "num_words")


def _paragraphs(text: str, language: str, given: Mapping[str, Any]) -> bool:
    """Divided by `***`; a divider may open or close the text, but no paragraph between two may be empty."""
    parts = [part.strip() for part in re.split(r"(?<!\*)\*\*\*(?!\*)", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(given["num_paragraphs"])


def _nth_first_word(text: str, language: str, given: Mapping[str, Any]) -> bool:
    """Divided by blank lines."""
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != given["num_paragraphs"] or not 1 <= given["nth_paragraph"] <= len(parts):
        return False
    asked = words_of(_plain(given["first_word"]))
    return words_of(_plain(parts[given["nth_paragraph"] - 1]))[: len(asked)] == asked


# Content and format


def _placeholders(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= int(given["num_placeholders"])


def _postscript(text: str, language: str, given: Mapping[str, Any]) -> bool:
    """The marker begins a line or follows a sentence; its last stop may be missing, and its stops may have spaces behind."""
    marks = [re.escape(part) for part in re.split(r"[.\s]+", given["postscript_marker"].strip()) if part]
    marker = r"\.?\s?".join(marks)
    return bool(re.search(rf"(?im)(?:^|[.!?…।؟][\"”»)*]*\s)[\s*_#>\"«“]*{marker}(?![\w{_MARK}])", text))


def _bullets(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"(?m)^[ \t]*[*-][ \t]+\S", text)) == int(given["num_bullets"])


def _constrained(text: str, language: str, given: Mapping[str, Any]) -> bool:
    said = " ".join(words_of(_plain(text)))
    phrases = (*CLOSED_ANSWERS["en"], *CLOSED_ANSWERS.get(primary(language), ()))
    return any(re.search(_whole(phrase), said) for phrase in phrases)


# "My answer is yes / no / maybe", without marks: as the localised prompts of Marco-Bench-MIF have them, Hindi by us.
CLOSED_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "en": ("my answer is yes", "my answer is no", "my answer is maybe"),
    "fr": ("ma réponse est oui", "ma réponse est non", "ma réponse est peut-être"),
    "es": ("mi respuesta es sí", "mi respuesta es no", "mi respuesta es tal vez"),
    "ru": ("мой ответ да", "мой ответ нет", "мой ответ может быть"),
    "ar": ("إجابتي هي نعم", "إجابتي هي لا", "إجابتي هي ربما"),
    "hi": ("मेरा उत्तर हाँ है", "मेरा उत्तर नहीं है", "मेरा उत्तर शायद है"),
}


def _highlights(text: str, language: str, given: Mapping[str, Any]) -> bool:
    found = re.findall(r"(?<!\*)(\*{1,3})(?![\s*])([^\n*]+?)(?<!\s)\1(?!\*)", text)
    return len(found) >= int(given["num_highlights"])


def _sections(text: str, language: str, given: Mapping[str, Any]) -> bool:
    splitter = re.escape(given["section_spliter"].strip())
    return len(re.findall(rf"(?<![\w{_MARK}]){splitter}[ \t]*\d+", text)) >= int(given["num_sections"])


def _json(text: str, language: str, given: Mapping[str, Any]) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def _title(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return any(words_of(title) for title in re.findall(r"<<([^\n<>]+)>>", text))


def _two_responses(text: str, language: str, given: Mapping[str, Any]) -> bool:
    parts = [part.strip() for part in re.split(r"\*{6,}", text)]
    return all(parts[1:-1]) and len(kept := [part for part in parts if part]) == 2 and kept[0] != kept[1]


def _repeat(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _plain(text).startswith(_plain(given["prompt_to_repeat"]))


# Ends, case, punctuation

_QUOTES = ('""', "“”", "«»", "„“", "„”", "””")


def _end(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _plain(text).strip("\"“”«»'* ").endswith(_plain(given["end_phrase"]).strip("\"“”«»'* "))


def _quotation(text: str, language: str, given: Mapping[str, Any]) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] + text[-1] in _QUOTES


def _capital_words(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return _related(given, sum(word.isupper() for word in words_of(text)), "capital_relation", "capital_frequency")


def _capitals(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return text.isupper() and _in_language(text, "en")


def _lowercase(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return text.islower() and _in_language(text, "en")


def _no_comma(text: str, language: str, given: Mapping[str, Any]) -> bool:
    return not re.search("[,\u060c\u3001\uff0c\ufe10\ufe50]", text)


Check = Callable[[str, str, Mapping[str, Any]], bool]

# id -> its check, and its arguments with their kinds
INSTRUCTIONS: Mapping[str, tuple[Check, Mapping[str, str]]] = {
    "keywords:existence": (_existence, {"keywords": "words"}),
    "keywords:frequency": (_frequency, {"keyword": "text", "frequency": "count", "relation": "relation"}),
    "keywords:forbidden_words": (_forbidden, {"forbidden_words": "words"}),
    "keywords:letter_frequency": (
        _letter_frequency,
        {"letter": "text", "let_frequency": "count", "let_relation": "relation"},
    ),
    "language:response_language": (_response_language, {"language": "text"}),
    "length_constraints:number_sentences": (_sentences, {"num_sentences": "count", "relation": "relation"}),
    "length_constraints:number_paragraphs": (_paragraphs, {"num_paragraphs": "count"}),
    "length_constraints:number_words": (_words, {"num_words": "count", "relation": "relation"}),
    "length_constraints:nth_paragraph_first_word": (
        _nth_first_word,
        {"num_paragraphs": "count", "nth_paragraph": "count", "first_word": "text"},
    ),
    "detectable_content:number_placeholders": (_placeholders, {"num_placeholders": "count"}),
    "detectable_content:postscript": (_postscript, {"postscript_marker": "text"}),
    "detectable_format:number_bullet_lists": (_bullets, {"num_bullets": "count"}),
    "detectable_format:constrained_response": (_constrained, {}),
    "detectable_format:number_highlighted_sections": (_highlights, {"num_highlights": "count"}),
    "detectable_format:multiple_sections": (_sections, {"section_spliter": "text", "num_sections": "count"}),
    "detectable_format:json_format": (_json, {}),
    "detectable_format:title": (_title, {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (_repeat, {"prompt_to_repeat": "text"}),
    "startend:end_checker": (_end, {"end_phrase": "text"}),
    "startend:quotation": (_quotation, {}),
    "change_case:capital_word_frequency": (
        _capital_words,
        {"capital_frequency": "count", "capital_relation": "relation"},
    ),
    "change_case:english_capital": (_capitals, {}),
    "change_case:english_lowercase": (_lowercase, {}),
    "punctuation:no_comma": (_no_comma, {}),
}
