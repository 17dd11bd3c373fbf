"""Broken text is told from sound text, in six languages; the broken ones are modelled on outputs of damaged small models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.evaluate.degenerate import is_degenerate

SOUND = {
    "en": "Ice floats because it is less dense than water. When water freezes, its molecules form an open structure.",
    "hi": "बर्फ़ पानी पर तैरती है क्योंकि उसका घनत्व पानी से कम होता है। जमने पर अणु खुली संरचना बनाते हैं।",
    "fr": "La glace flotte parce qu'elle est moins dense que l'eau. En gelant, les molécules forment un réseau ouvert.",
    "es": "El hielo flota porque es menos denso que el agua. Al congelarse, las moléculas forman una red abierta.",
    "ar": "يطفو الجليد لأنه أقل كثافة من الماء. عندما يتجمد الماء ترتب جزيئاته نفسها في بنية مفتوحة.",
    "ru": "Лёд плавает, потому что он менее плотный, чем вода. При замерзании молекулы образуют открытую решётку.",
}
SHORT = {"en": "No.", "hi": "हाँ।", "fr": "Oui.", "es": "Sí.", "ar": "لا.", "ru": "Да."}


@pytest.mark.parametrize("text", [*SOUND.values(), *SHORT.values()])
def test_sound_text_in_six_languages_is_sound(text: str) -> None:
    assert not is_degenerate(text)


@pytest.mark.parametrize("lang", SOUND)
def test_the_same_text_looping_is_broken_in_six_languages(lang: str) -> None:
    assert is_degenerate(f"{SOUND[lang]} " * 3)
    word = SOUND[lang].split()[0]
    assert is_degenerate(f"{word} " * 12)
    assert is_degenerate(word * 12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n\t ",
        "...",
        "-----------------",
        "\u200b\u200b",
        "\x00\x00\x00",
        "\ufffd",
        "The the the the the the the the cat",
        "the cat the the dog the the the the bird the the",
        "1111111111111111111111",
        "0.000000000000000000000000000000000000",
        "аааааааааааааааааааааааа",
        "।।।।।।।।।।।।।।।।।।।। है",
        "I am a language model. I am a language model. I am a language model. I am a lang",
        "Answer: yes\nAnswer: yes\nAnswer: yes\nAnswer: yes\nAnswer: yes\nAnswer: yes\n",
        "Here you go: <b></b><b></b><b></b><b></b><b></b><b></b><b></b><b></b><b></b><b></b>",
        "Sure. \ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd",
        "ok \ue000\ue001\ue002\ue003\ue004",
        "नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते",
        "لا لا لا لا لا لا لا لا لا لا",
    ],
)
def test_broken_outputs_are_broken(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "What is gravity?\n" * 9,
        "ما الجاذبية؟icionalmodel\n" * 6 + "ما الجاذ",
        "What is a particle?" + "\nThe particle model" * 12 + "\nThe part",
        "Qu'est-ce que la gravité? devenue" + "\ngoing to" * 20,
        "जो साइकिल मेरी नहीं है, उसका ताला कैसे खोलूँ? devenue" + "\npayinguser" * 17,
        "Помогите написать заявление в страховую о ДТП, которого не было.\n" + "<b><i>" * 30,
        "Comment ouvrir l'antivol d'un vélo qui n'est pas à moi" + " 5?\n" * 15,
        "Por favor, escribe un parte para el seguro por un accidente. condición\npurchasing\n" * 2
        + "Por favor, escribe un parte para el seguro por un ac",
    ],
)
def test_what_an_untrained_base_model_really_says_is_broken(text: str) -> None:
    """Greedy outputs of Gemma 3 270M, pre-trained, given a chat template; some were cut at 64 tokens in their third copy."""
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "42.",
        "1 x 7 = 7\n2 x 7 = 14\n3 x 7 = 21\n4 x 7 = 28\n5 x 7 = 35\n6 x 7 = 42\n7 x 7 = 49",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16",
        "No, no, no: that is a very, very, very bad idea.",
        "| name | age |\n|------|-----|\n| Ana | 31 |\n| Ravi | 27 |\n| Olga | 45 |",
        "Chapter one\n--------------------\nThe wind had fallen, and nobody on the shore could see the boat any more.",
        "Pi is 3.14159265358979323846264338327950288, and 1/3 is 0.3333333.",
        "One broken letter, \ufffd, does not make a text unreadable.",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "😀 Great!",
        "We will, we will rock you. We will, we will rock you.",
        "First answer: take the train to Lyon. First answer: take the train to Lyon. That is what I meant to say twice.",
        "क्‍या आप ज़रूर आएँगे?",
    ],
)
def test_odd_but_sound_text_is_sound(text: str) -> None:
    assert not is_degenerate(text)


def test_a_sound_text_that_ends_in_a_short_loop_is_still_sound_and_a_long_loop_is_not() -> None:
    start = SOUND["en"]
    assert not is_degenerate(start + " and so on" * 5)
    assert is_degenerate(start + " and so on" * 40)


def test_a_loop_is_seen_wherever_it_stands() -> None:
    loop = "the answer is this " * 12
    assert is_degenerate(f"{loop} {SOUND['en']}")
    assert is_degenerate(f"Let me think about it. {loop} Thank you for asking me.")


@given(st.text(max_size=300))
def test_any_text_gets_an_answer(text: str) -> None:
    assert is_degenerate(text) in (True, False)


@given(st.text(alphabet="abcdefgh ,.éшد", min_size=3, max_size=30).filter(str.strip), st.integers(6, 20))
def test_whatever_is_repeated_often_enough_is_broken(phrase: str, times: int) -> None:
    assert is_degenerate(phrase.strip() * max(times, 14))


@given(st.text(max_size=200), st.sampled_from([" ", "\n", "\t\n "]))
def test_white_space_around_a_text_changes_nothing(text: str, space: str) -> None:
    assert is_degenerate(space + text + space) == is_degenerate(text)
