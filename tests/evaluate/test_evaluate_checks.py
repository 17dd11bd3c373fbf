"""Checks without a model: normalisation, numbers, spans, letters, chrF++, instructions, and comparisons made of them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.errors import DataError, UserError
from mixmerge.evaluate.checks import KINDS, Check, PairedCheck, answer_words, normalise, numbers_in
from mixmerge.evaluate.choices import INSTRUCTION, letter_of, read_letter, render
from mixmerge.evaluate.instructions import read_instructions
from mixmerge.evaluate.judge import Item, Judge, Verdict
from mixmerge.evaluate.prompts import Prompt

CHOICES = ("Oslo", "Rome", "Lima", "Cairo")


def prompt(reference: str | None = "18", lang: str = "en", **more: Any) -> Prompt:
    return Prompt(f"s/{lang}/p", "p", "s", lang, "general", "test", "?", reference, **more)


def judged(kind: str, response: str, reference: str | None = "18", lang: str = "en", **more: Any) -> Verdict:
    (verdict,) = Check(kind).judge([Item(prompt(reference, lang, **more), response)])
    return verdict


def word(kind: str, response: str, reference: str = "18", lang: str = "en") -> str:
    return judged(kind, response, reference, lang).verdict


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("  paris ", "Paris"),
        ("«Париж».", "париж"),
        ("Ёлка", "елка"),
        ("الجَوَابُ ١٢", "الجواب 12"),
        ("उत्तर: १२", "उत्तर 12"),
        ("ＡＢＣ！", "abc"),
        ("l’eau", "leau"),
        ("3.5", "3.5"),
        ("-5", "−5"),
        ("ا\u200fب", "اب"),
    ],
)
def test_answers_are_compared_without_case_marks_and_kinds_of_digits(response: str, reference: str) -> None:
    assert word("exact", response, reference) == "correct"


@pytest.mark.parametrize(
    ("response", "reference"),
    [("5", "-5"), ("35", "3.5"), ("The answer is 18", "18"), ("कि", "क"), ("Paris, France", "Paris"), ("C", "C++")],
)
def test_an_exact_match_is_of_the_whole_and_keeps_signs_and_points(response: str, reference: str) -> None:
    assert word("exact", response, reference) == "wrong"


@given(st.text(max_size=60))
def test_a_normalised_text_has_single_spaces_and_none_at_its_ends(text: str) -> None:
    once = normalise(text)
    assert "  " not in once
    assert once == once.strip()
    assert normalise(f" {text}\n") == once


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("5 + 13 = 18", "18"),
        ("The answer is $18.", "18"),
        ("**18.00** dollars", "18"),
        ("It makes 1,234 in all", "1234"),
        ("Cela fait 1 234,50 euros", "1234.5"),
        ("Es sind 1.234 Stück", "1234"),
        ("La razón es 0,25", "0.25"),
        ("कुल १,२३,४५६ रुपये", "123456"),
        ("المجموع ١٬٢٣٤٫٥", "1234.5"),
        ("It fell to −7", "-7"),
        ("It costs 3, so 18", "18"),
        ("in 2024, he had 1,000,000", "1000000"),
        ("18", "18.0"),
    ],
)
def test_the_last_number_counts_however_it_is_written(response: str, reference: str) -> None:
    assert word("number", response, reference) == "correct"


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("18 apples, then 3 more", "wrong"),
        ("one hundred", "unparsed"),
        ("1.8", "wrong"),
        ("118", "wrong"),
        ("", "invalid"),
    ],
)
def test_another_last_number_is_wrong_and_none_is_unparsed(response: str, found: str) -> None:
    assert word("number", response) == found


def test_a_number_has_all_readings_that_languages_give_it() -> None:
    assert numbers_in("1.234") == [frozenset({Decimal(1234), Decimal("1.234")})]
    assert numbers_in("0.125") == [frozenset({Decimal("0.125")})]
    assert numbers_in("1,234.5 and 1.234,5") == [frozenset({Decimal("1234.5")})] * 2
    assert numbers_in("none") == []


@given(st.integers(-(10**9), 10**9))
def test_a_number_written_with_english_separators_is_read_back(number: int) -> None:
    assert word("number", f"So the result is {number:,}.", str(number)) == "correct"


def test_a_span_is_right_where_its_words_stand_in_the_answer_and_its_value_is_f1() -> None:
    verdict = judged("span", "It was the patents of his.", "His patents")
    assert (verdict.verdict, verdict.details["exact"]) == ("wrong", False)
    assert verdict.value == pytest.approx(2 * 2 / (5 + 2), abs=1e-6)
    verdict = judged("span", "They were his patents!", "The his patents")
    assert verdict.verdict == "correct"
    assert judged("span", "HIS PATENTS", "his patents").details["exact"] is True
    assert judged("span", "his patents", "his patents").value == 1.0


@pytest.mark.parametrize(
    ("lang", "response", "reference"),
    [
        ("es", "Fueron sus patentes.", "las sus patentes"),
        ("fr", "C'était l'Académie française", "Académie française"),
        ("ar", "هو الكتاب الجديد", "كتاب جديد"),
        ("hi", "यह दिल्ली में है।", "दिल्ली"),
        ("ru", "Это ёжик в тумане", "ежик"),
    ],
)
def test_spans_are_found_in_every_language(lang: str, response: str, reference: str) -> None:
    assert word("span", response, reference, lang) == "correct"


def test_a_span_is_not_found_inside_a_longer_word() -> None:
    assert word("span", "The artist", "art") == "wrong"
    assert answer_words("الله", "ar") == ["له"]  # said openly: a leading ال is taken for the article
    assert answer_words("ال", "ar") == ["ال"]


@pytest.mark.parametrize(
    "response",
    [
        "B",
        " b. ",
        "(B)",
        "**B**",
        "B)",
        "B. Rome",
        "Answer: B",
        "answer: b",
        "So the answer is B.",
        "I think the answer is (B)",
        "'B'",
        "“B”",
        r"$\boxed{B}$",
        "The correct answer is (B).",
        "Let me think.\nRome is in Italy.\n\n**Answer: B**",
        "La bonne réponse est B.",
        "Réponse : B",
        "La respuesta correcta es B",
        "Ответ: B",
        "Правильный ответ: B.",
        "الإجابة: B",
        "الإجابة الصحيحة هي ب",
        "उत्तर: (ख)",
        "सही उत्तर B है",
        "बी",
        "ب",
        "\u200fB\u200f",
        "Ｂ",
        "Rome.",
        "A. Oslo\nB. Rome\nC. Lima\nAnswer: B",
    ],
)
def test_a_letter_is_read_in_its_usual_forms(response: str) -> None:
    assert read_letter(response, CHOICES) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "A or B",
        "Not B",
        "B is wrong",
        "A\nB",
        "Answer: A\nAnswer: B",
        "Answer: A or B",
        "Answer: E",
        "E",
        "B. Lima",
        "Both Rome and Lima",
        "Be careful",
        "В",
        "I choose b",
        "The answer is a",
        "Answer: a lot",
        "The answer is B because Rome",
        "The answer depends. A lot.",
        "a\nb",
        "<answer>B</answer>",
        '{"answer": "B"}',
        "Oslo Rome",
        "Answer:",
        "",
    ],
)
def test_what_names_no_letter_or_two_names_none(response: str) -> None:
    assert read_letter(response, CHOICES) is None


def test_a_letter_with_its_choice_may_keep_the_marks_of_the_choice() -> None:
    choices = ("$x_1$", "«да»", "नहीं\u200d है", "[0, 1]")
    responses = ("A. $x_1$", "B) «да»", "C. नहीं\u200d है।", "D: [0, 1]", "«да»")
    assert [read_letter(response, choices) for response in responses] == ["A", "B", "C", "D", "B"]


def test_a_choice_is_correct_wrong_unparsed_or_invalid() -> None:
    found = [judged("choice", text, "B", choices=CHOICES) for text in ("B", "А", "perhaps", "  ")]
    assert [verdict.verdict for verdict in found] == ["correct", "wrong", "unparsed", "invalid"]
    assert [verdict.value for verdict in found] == [1.0, 0.0, 0.0, 0.0]
    assert found[1].details == {"letter": "A"}


@pytest.mark.parametrize("answer", [1, "B", "b", "1", "Rome", " Rome "])
def test_an_answer_may_be_an_index_a_letter_or_a_text(answer: int | str) -> None:
    assert letter_of(answer, CHOICES, "row") == "B"


@pytest.mark.parametrize("answer", [4, -1, "E", "Bonn", "4", None, True, 1.0, ""])
def test_an_answer_that_is_no_choice_is_refused(answer: Any) -> None:
    with pytest.raises(DataError, match=r"row: answer .* is none of the 4 choices"):
        letter_of(answer, CHOICES, "row")


def test_an_answer_with_two_readings_is_refused_with_both() -> None:
    with pytest.raises(DataError, match=r"'1' can be read as A \('1'\) and B \('2'\); give its letter"):
        letter_of("1", ["1", "2", "3"], "row")
    assert letter_of(1, ["1", "2", "3"], "row") == "B"
    assert letter_of("A", ["A", "B"], "row") == "A"


def test_a_question_is_rendered_with_letters_and_asked_in_six_languages() -> None:
    text = render("Where?", ["Os\nlo", "Rome"], INSTRUCTION["ru"])
    assert text == f"Where?\n\nA. Os lo\nB. Rome\n\n{INSTRUCTION['ru']}"
    assert set(INSTRUCTION) == {"en", "hi", "fr", "es", "ar", "ru"}


def test_chrf_is_a_score_without_a_threshold_and_a_verdict_with_one() -> None:
    from sacrebleu import sentence_chrf

    expected = sentence_chrf("Ice is light.", ["Ice is less dense."], word_order=2).score / 100
    item = Item(prompt("Ice is less dense."), "Ice is light.")
    (scored,) = Check("chrf").judge([item])
    assert (scored.verdict, scored.value) == ("scored", pytest.approx(expected, abs=1e-6))
    assert Check("chrf", threshold=expected - 0.01).judge([item])[0].verdict == "correct"
    assert Check("chrf", threshold=expected + 0.01).judge([item])[0].verdict == "wrong"
    assert Check("chrf", threshold=0.5).verdicts == ("correct", "wrong", "invalid")


def test_instructions_are_followed_or_not_with_each_of_them_told() -> None:
    ids, arguments = ["punctuation:no_comma", "detectable_format:title"], [{}, {}, {"language": "es"}]
    asked = prompt(None, instructions=read_instructions(ids, arguments, "row"))
    good, bad, none = Check("instructions").judge(
        [Item(asked, "<<A>> all good"), Item(asked, "<<A>> one, two"), Item(asked, "")]
    )
    assert (good.verdict, good.value) == ("followed", 1.0)
    assert (bad.verdict, bad.value) == ("not_followed", 0.5)
    assert bad.details["instructions"] == {"1. punctuation:no_comma": False, "2. detectable_format:title": True}
    assert bad.details["arguments_without_instruction"] == 1
    assert (none.verdict, none.value) == ("invalid", 0.0)


def test_a_check_gives_one_verdict_an_item_that_json_can_hold() -> None:
    judge: Judge = Check("number", name="maths")
    verdicts = judge.judge([Item(prompt(), text) for text in ("18", "", "19", "none", "18 " * 30)])
    assert [verdict.verdict for verdict in verdicts] == ["correct", "invalid", "wrong", "unparsed", "invalid"]
    assert {verdict.verdict for verdict in verdicts} <= set(judge.verdicts)
    assert all(json.loads(json.dumps(verdict.row()))["judge"] == "maths" for verdict in verdicts)
    assert json.loads(json.dumps(judge.describe()))["check"] == "number"


@given(st.text(max_size=80))
def test_every_kind_gives_one_of_its_verdicts_for_any_text(text: str) -> None:
    whole = prompt("B", choices=CHOICES, instructions=read_instructions(["punctuation:no_comma"], None, "row"))
    for kind in KINDS:
        asked = prompt("18") if kind == "number" else whole
        check = Check(kind)
        (verdict,) = check.judge([Item(asked, text)])
        assert verdict.verdict in check.verdicts
        assert 0 <= (verdict.value or 0) <= 1


@pytest.mark.parametrize(
    ("kind", "reference", "complaint"),
    [
        ("exact", None, "no reference answer to check against; map the column `reference`"),
        ("number", "none", "no number in the reference 'none'"),
        ("choice", "B", "no choices"),
        ("instructions", "B", "no instructions to check"),
        ("span", "the", "no word in the reference 'the'"),
    ],
)
def test_a_prompt_without_what_its_check_needs_is_an_error(kind: str, reference: str | None, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"s/en/p: {complaint}"):
        judged(kind, "18", reference)


NEW_YORK = ("New York City", "NYC", "New York")


def several(kind: str, response: str, references: tuple[str, ...], lang: str = "en", **more: Any) -> Verdict:
    asked = prompt(references[0], lang, also=references[1:], **more)
    (verdict,) = Check(kind).judge([Item(asked, response)])
    return verdict


@pytest.mark.parametrize(
    ("kind", "response", "references", "right"),
    [
        ("exact", "NYC", NEW_YORK, True),
        ("exact", "new york.", NEW_YORK, True),
        ("exact", "New", NEW_YORK, False),
        ("span", "It is NYC, I think.", NEW_YORK, True),
        ("span", "York is new", NEW_YORK, False),
        ("number", "So it is 12.", ("eleven or so", "12", "about 12.5"), True),
        ("number", "So it is 12.5.", ("12", "about 12.5"), True),
        ("number", "12, no: 13", ("12", "about 12.5"), False),
    ],
)
def test_an_answer_is_right_where_it_fits_any_of_several_references(
    kind: str, response: str, references: tuple[str, ...], right: bool
) -> None:
    found = several(kind, response, references)
    assert found.verdict == ("correct" if right else "wrong")
    turned = several(kind, response, references[::-1])
    assert (turned.verdict, turned.value, turned.details) == (found.verdict, found.value, found.details)


@given(st.lists(st.sampled_from([*NEW_YORK, "12", "the", "a big apple"]), min_size=1, max_size=4), st.text(max_size=30))
def test_of_several_references_the_best_counts_in_every_kind_that_has_them(references: list[str], said: str) -> None:
    given_ = tuple(references)
    for response in (said, f"{said} NYC", f"{references[-1]} 12"):
        for kind in ("exact", "span", "chrf", "number"):
            try:
                found = several(kind, response, given_)
            except DataError:  # no word, or no number, in any of them
                assert kind in ("span", "number")
                continue
            each = []
            for text in given_:
                try:
                    each.append(judged(kind, response, text))
                except DataError:
                    assert kind in ("span", "number")
            assert found.value == max(one.value or 0 for one in each)
            order = ("correct", "scored", "wrong", "unparsed", "invalid")
            assert found.verdict == min((one.verdict for one in each), key=order.index)


def test_the_f1_of_a_span_is_the_greatest_and_exact_that_of_any_reference() -> None:
    found = several("span", "NYC", NEW_YORK)
    assert (found.value, found.details["exact"]) == (1.0, True)
    partly = several("span", "old New York", NEW_YORK)
    assert partly.value == pytest.approx(0.8)  # against New York; 2/3 against New York City
    assert (partly.verdict, partly.details["exact"]) == ("correct", False)


def test_a_reference_without_a_word_or_number_fits_nothing_beside_others_that_have_one() -> None:
    assert several("span", "anything at all", ("the", "Paris")).verdict == "wrong"
    assert several("number", "no 7", ("many", "8")).verdict == "wrong"
    for kind, references in (("span", ("the", "a")), ("number", ("many", "few"))):
        with pytest.raises(DataError, match=r"in the reference '(the|many)'"):
            several(kind, "7", references)


def test_chrf_with_several_references_is_that_of_the_nearest() -> None:
    near, far = "Ice is less dense.", "Because of the bonds between its molecules."
    item = Item(prompt(far, also=(near,)), "Ice is light.", "Ice.")
    (found,) = Check("chrf").judge([item])
    assert found.value == judged("chrf", "Ice is light.", near).value
    (pair,) = PairedCheck(Check("chrf")).judge([item])
    assert pair.verdict == "win"


def test_a_right_choice_that_stands_twice_is_refused_and_a_wrong_one_is_not() -> None:
    choices = ("Rome", "Ro me", "Ro  me", "Lima")
    assert letter_of("A", choices, "row") == "A"
    assert letter_of("Lima", choices, "row") == "D"
    with pytest.raises(DataError, match=r"row: the right choice 'Ro me' stands twice, as B and C"):
        letter_of(2, choices, "row")


def test_an_unknown_kind_and_a_threshold_where_there_is_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"no check of kind 'exakt'; did you mean 'exact'"):
        Check("exakt")
    for kind, threshold in (("exact", 0.5), ("chrf", 0.0), ("chrf", 40.0)):
        with pytest.raises(UserError, match=r"only chrf has one"):
            Check(kind, threshold=threshold)


def test_a_pair_is_won_where_one_is_right_and_the_other_is_not() -> None:
    judge: Judge = PairedCheck(Check("number"))
    pairs = [("18", "17"), ("17", "18"), ("18", "18"), ("17", ""), ("", "18"), ("none", "17")]
    verdicts = judge.judge([Item(prompt(), mine, theirs) for mine, theirs in pairs])
    assert [verdict.verdict for verdict in verdicts] == ["win", "loss", "tie", "tie", "loss", "tie"]
    assert [verdict.value for verdict in verdicts] == [1.0, -1.0, 0.0, 0.0, -1.0, 0.0]
    assert verdicts[3].details == {"found": "wrong", "opponent_found": "invalid"}
    assert judge.describe()["check"] == "number"


def test_a_graded_pair_is_won_by_more_than_the_margin() -> None:
    asked = prompt("Ice is less dense than water.")
    near, far = "Ice is less dense than the water.", "Bread rises."
    assert PairedCheck(Check("chrf")).judge([Item(asked, near, far)])[0].verdict == "win"
    assert PairedCheck(Check("chrf")).judge([Item(asked, far, near)])[0].verdict == "loss"
    assert PairedCheck(Check("chrf"), margin=0.99).judge([Item(asked, near, far)])[0].verdict == "tie"
    with pytest.raises(ValueError, match=r"margin 2 is not in"):
        PairedCheck(Check("chrf"), margin=2)
    with pytest.raises(ValueError, match=r"needs an opponent"):
        PairedCheck(Check("chrf")).judge([Item(asked, near)])
