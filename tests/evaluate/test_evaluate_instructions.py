"""IFEval's verifiable instructions in six languages: each followed and not followed, near misses, and bad rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.errors import DataError
from mixmerge.evaluate.instructions import (
    INSTRUCTIONS,
    UNNAMED,
    Instruction,
    followed,
    read_instructions,
    sentences_of,
    words_of,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
ENGLISH = "THE WHOLE ANSWER IS WRITTEN IN CAPITAL LETTERS SO THAT NOBODY CAN MISS IT."


def says(name: str, response: str, lang: str = "en", **arguments: Any) -> bool:
    (instruction,) = read_instructions([name], [arguments], "row")
    return followed(instruction, response, lang)


# name, arguments, language, a response that follows, one that does not
CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("keywords:existence", {"keywords": ["Zelda", "link"]}, "en", "LINK met zelda.", "Link met Ganon."),
    ("keywords:existence", {"keywords": ["مكة"]}, "ar", "زرت مَكَّة أمس.", "زرت المدينة أمس."),
    (
        "keywords:frequency",
        {"keyword": "чай", "frequency": 2, "relation": "at least"},
        "ru",
        "Чай, ещё чай.",
        "Чай и кофе.",
    ),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, "en", "Tea.", "Tea, tea."),
    ("keywords:forbidden_words", {"forbidden_words": ["cook", "sleep"]}, "en", "A cookbook, asleep.", "I Cook."),
    ("keywords:forbidden_words", {"forbidden_words": ["काम"]}, "hi", "कामना अच्छी है।", "यह काम है।"),
    ("keywords:forbidden_words", {"forbidden_words": [" бежать"]}, "ru", "Он убежать не мог.", "Надо бежать!"),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        "en",
        "An Egg",
        "Every Egg",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "ل", "let_frequency": 3, "let_relation": "at least"},
        "ar",
        "الليل جميل",
        "نهر",
    ),
    (
        "language:response_language",
        {"language": "fr"},
        "en",
        "Il fait beau aujourd'hui et je sors.",
        "The weather is fine.",
    ),
    ("language:response_language", {"language": "hi"}, "en", "आज मौसम बहुत अच्छा है।", "The weather is fine today."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "hi",
        "यह सच है। वह भी।",
        "एक है। दो है। तीन है।",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "ar",
        "هل هذا صحيح؟ نعم.",
        "نعم هذا صحيح.",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        "hi",
        "हिन्दी में चार शब्द",
        "हिन्दी में तीन",
    ),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "en", "Don't do it.", "I do do it."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "en", "One.\n***\nTwo.\n***", "One.\n\nTwo."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "en", "One *** Two", "One\n***\n\n***\nTwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Week-end"},
        "fr",
        "Bonjour.\n\nWeek-end au lit.",
        "Bonjour.\n\nLe week-end au lit.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "مجلس الضيافة"},
        "ar",
        "مجلس الضيافة كبير.\n\nنعم.",
        "مجلس كبير.\n\nنعم.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "en", "[name] of [town]", "[name] of []"),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "en",
        "Text.\n\n**P.P.S.** More.",
        "Text. P.S. x",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "ru", "Текст. P. S. Ещё.", "Текст: P.Salm"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "en", "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "en", "* one\n---\n**two**", "**one**"),
    ("detectable_format:constrained_response", {}, "en", "I think: My answer is no.", "My answer is nothing."),
    ("detectable_format:constrained_response", {}, "fr", "« Ma réponse est peut-être »", "Peut-être."),
    ("detectable_format:constrained_response", {}, "es", "Mi respuesta es sí.", "Sí."),
    ("detectable_format:constrained_response", {}, "ru", "Мой ответ — нет.", "Мой ответ — не знаю."),
    ("detectable_format:constrained_response", {}, "ar", "'إجابتي هي نعم'", "نعم"),
    ("detectable_format:constrained_response", {}, "hi", "मेरा उत्तर नहीं है।", "नहीं।"),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "en",
        "*one* and **two**",
        "*one* and * two *",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "РАЗДЕЛ", "num_sections": 2},
        "ru",
        "РАЗДЕЛ 1\nа\nРАЗДЕЛ 2",
        "РАЗДЕЛ 1 а",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 1},
        "ar",
        "SECTION ١\nنص",
        "SECTIONS",
    ),
    ("detectable_format:json_format", {}, "en", '```json\n{"a": [1]}\n```', '{"a": 1} is it'),
    ("detectable_format:json_format", {}, "en", '[{"a": "b"}]', '"a text in quotation marks"'),
    ("detectable_format:title", {}, "en", "<<A poem>>\nText", "<< >>\nText"),
    ("combination:two_responses", {}, "en", "One.\n******\nTwo.", "One.\n******\nOne."),
    ("combination:two_responses", {}, "en", "One ****** Two ******", "One ****** Two ****** Three"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a  poem."},
        "en",
        "write a poem. Roses...",
        "Sure! Write a poem.",
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Надеюсь, вы согласны."},
        "ru",
        'Да. "Надеюсь, вы согласны."',
        "Надеюсь, вы согласны. Пока",
    ),
    ("startend:quotation", {}, "ru", "«Весь ответ»", "«Весь» ответ"),
    ("startend:quotation", {}, "en", '"All of it"', '"All of it".'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "en",
        "NASA and I",
        "NASA and Me",
    ),
    ("change_case:english_capital", {}, "en", ENGLISH, ENGLISH.replace("CAPITAL", "capital")),
    (
        "change_case:english_lowercase",
        {},
        "en",
        ENGLISH.lower(),
        "toute la réponse est écrite en lettres minuscules ici",
    ),
    ("punctuation:no_comma", {}, "ar", "نعم ولا", "نعم، ولا"),
    ("punctuation:no_comma", {}, "en", "Yes; and no", "Yes, and no"),
]


@pytest.mark.parametrize(("name", "arguments", "lang", "good", "bad"), CASES)
def test_a_response_with_the_form_follows_and_a_near_miss_does_not(
    name: str, arguments: dict[str, Any], lang: str, good: str, bad: str
) -> None:
    assert says(name, good, lang, **arguments)
    assert not says(name, bad, lang, **arguments)


def test_the_cases_cover_every_instruction_that_is_known() -> None:
    assert {case[0] for case in CASES} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


def test_words_of_joined_and_marked_scripts_are_whole() -> None:
    assert words_of("Don’t! C'est le week-end: 3,5") == ["Don’t", "C'est", "le", "week-end", "3", "5"]
    assert words_of("क्या यह हिन्दी है?") == ["क्या", "यह", "हिन्दी", "है"]
    assert words_of("كِتَابٌ جديد، نعم") == ["كِتَابٌ", "جديد", "نعم"]
    assert words_of("... —") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Dr. Roy met Mrs. Lee at 3.15 p.m. sharp. They left.", 2),
        ("1. First thing\n2. Second thing.", 1),
        ("Он родился в 1990 г. в Москве. Т.е. давно!", 2),
        ("यह घर है। वह पेड़ है॥ क्या सच?", 3),
        ("هل أنت هنا؟ نعم! حسنا.", 3),
        ("Really?! (Yes.) No…", 3),
        ("No mark at the end", 1),
        ("", 0),
        ("... !!!", 0),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, count: int) -> None:
    assert len(sentences_of(text)) == count


def test_an_answer_without_prose_is_in_no_wrong_language() -> None:
    assert says("language:response_language", "42", language="fr")
    assert not says("language:response_language", "```\nThis whole answer is English prose\n```", language="fr")


def test_null_arguments_are_none_and_whole_floats_are_counts() -> None:
    ids = ["punctuation:no_comma", "length_constraints:number_words"]
    padded = [{"num_words": None}, {"num_words": 3.0, "relation": "at least", "keyword": None}]
    found = read_instructions(ids, padded, "row")
    assert found == (
        Instruction("punctuation:no_comma"),
        Instruction("length_constraints:number_words", (("num_words", 3), ("relation", "at least"))),
    )
    assert read_instructions(["punctuation:no_comma"], None, "row") == found[:1]
    assert json.dumps([each.named() for each in found]) == '[{}, {"num_words": 3, "relation": "at least"}]'


def test_arguments_beyond_the_last_id_are_kept_without_a_name() -> None:
    found = read_instructions(["punctuation:no_comma"], [{}, {"language": "es"}, {}], "row")
    assert [each.id for each in found] == ["punctuation:no_comma", UNNAMED]
    assert found[1].named() == {"arguments": '{"language": "es"}'}


@pytest.mark.parametrize(
    ("ids", "arguments", "complaint"),
    [
        ("punctuation:no_comma", None, "no list of ids"),
        ([], None, "no list of ids"),
        (["punctuation:no_coma"], None, "unknown instruction .*did you mean 'punctuation:no_comma'"),
        (["unnamed"], [{}], "unknown instruction 'unnamed'"),
        (["detectable_format:title", "punctuation:no_comma"], [{}], "2 instructions, and arguments"),
        (["detectable_format:title"], ["x"], "arguments of instruction 1 are no mapping"),
        (["keywords:existence"], [{}], "argument 'keywords' is missing; give a list of words"),
        (["keywords:existence"], [{"keywords": ["a", " "]}], "argument 'keywords' is"),
        (["keywords:existence"], [{"keywords": ["a"], "keyword": "b"}], "takes no argument 'keyword'; did you mean"),
        (["length_constraints:number_paragraphs"], [{"num_paragraphs": 2.5}], "is 2.5; give a whole number"),
        (["length_constraints:number_paragraphs"], [{"num_paragraphs": True}], "is True"),
        (["length_constraints:number_paragraphs"], [{"num_paragraphs": float("nan")}], "is nan"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 2, "relation": "at most"}],
            "is 'at most'; give a relation: at least or less than",
        ),
        (["startend:end_checker"], [{"end_phrase": ""}], "'end_phrase' is ''"),
    ],
)
def test_what_could_not_be_checked_is_refused_when_it_is_read(ids: Any, arguments: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"file\.jsonl:3: .*{complaint}"):
        read_instructions(ids, arguments, "file.jsonl:3")


@settings(max_examples=40)
@given(st.text(max_size=200), st.sampled_from(["en", "hi", "ar", "ru", "ja"]))
def test_every_check_answers_for_any_text(text: str, lang: str) -> None:
    for name, arguments, *_ in CASES:
        assert says(name, text, lang, **arguments) in (True, False)


def stated(prompt: str, lang: str) -> list[Instruction]:
    """The instructions that a prompt states in plain words, as far as a few patterns find them."""
    patterns = {
        "detectable_format:number_bullet_lists": (
            "num_bullets",
            r"exactly (\d+) bullet|exactamente (\d+) ítems|exactement (\d+) puces",
        ),
        "detectable_content:number_placeholders": (
            "num_placeholders",
            r"at least (\d+) placeholders|al menos (\d+) marcadores",
        ),
        "detectable_format:number_highlighted_sections": ("num_highlights", r"highlight at least (\d+) sections"),
    }
    low, found = prompt.lower(), []
    for name, (argument, pattern) in patterns.items():
        if match := re.search(pattern, low):
            found.append(Instruction(name, ((argument, int(next(filter(None, match.groups())))),)))
    if re.search(r"(no|any|not use|without) commas?\b|sin usar comas|no uses comas|sans virgules?", low):
        found.append(Instruction("punctuation:no_comma"))
    if "<<" in prompt and re.search(r"title|título|titre", low):
        found.append(Instruction("detectable_format:title"))
    if "******" in prompt and re.search(r"two different responses|dos respuestas diferentes|deux réponses", low):
        found.append(Instruction("combination:two_responses"))
    return found


def test_answers_that_another_strict_checker_passed_pass_here_too() -> None:
    files = [SHARED / "general" / name for name in ("sft_train.jsonl", "dpo_train.jsonl")]
    if not all(file.is_file() for file in files):
        pytest.skip("the shared M-IFEval answers are not beside this checkout")
    passed = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    checks = [
        (followed(instruction, row.get("response") or row["chosen"], row["lang"]), row.get("rejected"), instruction)
        for row in passed
        if "M-IFEval" in row["source"]
        for instruction in stated(row["prompt"], row["lang"])
    ]
    assert len(checks) > 200
    assert sum(good for good, _, _ in checks) >= 0.97 * len(checks)
    # a rejected answer fails one of several instructions, which need not be the one that was found in the prompt
    rejected = [followed(instruction, text, "en") for _, text, instruction in checks if text]
    assert sum(rejected) <= 0.6 * len(rejected)
