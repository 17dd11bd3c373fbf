import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import mixmerge
from mixmerge.data.formats import Row
from mixmerge.data.overlap import _ARABIC, Overlap, PromptIndex, counted, in_words, normalised, overlapping


def row(identity, *turns):
    roles = ("user", "assistant")
    prompt = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return Row(identity, "en", prompt, "answer")


def test_rows_that_differ_only_in_case_width_punctuation_and_space_are_found():
    rows = [row("1", "What is the CAPITAL of France?"), row("2", "Another one"), row("3", "Ｗhat  is\u200b it…")]
    assert overlapping(rows, ["what is it", "What's the time?", "what is the capital of france"]) == [
        Overlap("1", "en", "what is the capital of france"),
        Overlap("3", "en", "what is it"),
    ]


def test_an_earlier_user_turn_counts_and_an_assistant_turn_does_not():
    rows = [row("1", "asked before", "an answer", "and now?"), row("2", "first", "asked before", "last")]
    assert [found.row_id for found in overlapping(rows, ["Asked before!"])] == ["1"]


def test_vowel_signs_are_kept_so_that_bengali_words_stay_apart():
    assert overlapping([row("1", "কি")], ["কী"]) == []
    assert len(overlapping([row("1", "কি?")], ["কি"])) == 1


def test_texts_of_punctuation_only_are_not_all_the_same():
    assert overlapping([row("1", "?")], ["!"]) == []


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


@example("\u0653\u200d\u0655")
@given(st.text(st.sampled_from("aeأإآٱاىيةه\u064e\u0651\u0653\u0654\u0655\u0640\u0670\u0301\u200d ؟")))
def test_normalising_marks_in_any_order_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


@given(st.text())
def test_normalising_character_by_character_gives_the_same(text):
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    seen = [char for char in folded if unicodedata.category(char) != "Cf"]
    words = "".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in seen)
    assume(unicodedata.is_normalized("NFKC", words) and not re.search("[\u0600-\u06ff]", words))
    assert normalised(text).split() == (words.split() or "".join(seen).split())


# Arabic

VOCALISED = "مَا هِيَ أَكْبَرُ مَدِينَةٍ فِي اَلْمَمْلَكَةِ اَلْعَرَبِيَّةِ اَلسُّعُودِيَّةِ؟"
PLAIN = "ما هي أكبر مدينة في المملكة العربية السعودية؟"


@pytest.mark.parametrize(
    "written",
    [
        VOCALISED,
        unicodedata.normalize("NFD", VOCALISED),
        PLAIN.replace("أ", "ا"),
        PLAIN.replace("ة", "ه"),
        PLAIN.replace("ي", "ى"),
        PLAIN.replace("م", "مـــ"),
        PLAIN.replace("لم", "ﻟﻤ"),
    ],
    ids=["vocalised", "decomposed", "bare alef", "ha", "alef maqsura", "stretched", "presentation forms"],
)
def test_arabic_that_is_written_otherwise_is_the_same_question(written):
    assert overlapping([row("1", written)], [PLAIN]) == [Overlap("1", "en", PLAIN)]
    assert overlapping([row("1", PLAIN)], [written]) == [Overlap("1", "en", written)]


@pytest.mark.parametrize(
    ("one", "other"),
    [("كتاب", "كتب"), ("سؤال", "سوال"), ("رئيس", "ريس"), ("علم", "قلم"), ("شيء", "شي")],
)
def test_arabic_words_that_differ_by_a_letter_stay_apart(one, other):
    assert overlapping([row("1", one)], [other]) == []


def test_a_superscript_alef_and_a_wasla_are_folded_and_marks_alone_are_kept():
    assert normalised("هٰذَا ٱلْكِتَابُ") == normalised("هذا الكتاب") == "هذا الكتاب"
    assert normalised("ـــ") != normalised("\u064e") != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("की", "कि"),
        ("हिंदी", "हिदी"),
        ("क़लम", "कलम"),
        ("কি", "কী"),
        ("தமிழ", "தமிழ்"),
        ("น้ำ", "นำ"),
        ("שָׁלוֹם", "שלום"),
        ("é", "e"),
        ("й", "и"),
        ("が", "か"),
        ("ئ", "ي"),
    ],
)
def test_marks_of_other_scripts_tell_words_apart(one, other):
    assert normalised(one) != normalised(other)


def test_only_arabic_changes_by_the_folding_of_arabic():
    changed = [code for code in _ARABIC if not 0x0600 <= code <= 0x06FF]
    assert changed == []
    for lang in ("en", "es", "fr", "hi", "ru"):
        for text in starter(lang):
            plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
            marks = [char for char in plain if unicodedata.category(char)[0] in "LMN"]
            assert [char for char in normalised(text) if unicodedata.category(char)[0] in "LMN"] == marks


def test_a_vocalised_copy_of_real_arabic_questions_is_an_exact_match():
    questions = starter("ar")
    assert len(questions) > 30
    fatha = "\u064e"
    copies = ["".join(char + fatha if char.isalpha() else char for char in text) for text in questions]
    found = overlapping([row(str(i), text) for i, text in enumerate(copies)], questions, 0.8)
    assert [overlap.kind for overlap in found] == ["exact"] * len(questions)
    assert len({normalised(text) for text in questions}) == len(set(questions)), "no two questions have become one"


def starter(lang):
    """The packaged prompts of a language."""
    folder = Path(mixmerge.__file__).parent / "starter" / "prompts"
    files = sorted(folder.glob(f"*.{lang}.jsonl"))
    return [json.loads(line)["prompt"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


# Near duplicates

ASKED = {
    "en": ("Could you tell me which colour the sky has in the morning?", "Could you tell me which colour the sky has in a morning"),
    "hi": ("क्या आप बता सकते हैं कि सुबह के समय आसमान का रंग कैसा होता है?", "क्या आप बता सकते हैं कि सुबह के समय आसमान का रंग कैसा होता था"),
    "ar": ("هل يمكنك أن تخبرني ما هو لون السماء في الصباح الباكر؟", "هل يمكنك أن تخبرني ما هو لون السماء في الصباح الباكر جدا"),
    "ru": ("Не могли бы вы сказать, какого цвета бывает небо по утрам?", "Не могли бы вы сказать какого цвета бывало небо по утрам"),
}  # fmt: skip


@pytest.mark.parametrize("lang", ASKED)
def test_a_question_with_a_word_changed_is_near_in_any_script(lang):
    prompt, asked = ASKED[lang]
    rows = [row("1", asked), row("2", "Something else altogether"), row("3", prompt.upper())]
    near, exact = overlapping(rows, [prompt], 0.75)
    assert (near.row_id, near.kind, near.prompt) == ("1", "near", prompt)
    assert 0.75 <= near.likeness < 1
    assert exact == Overlap("3", "en", prompt)
    assert overlapping(rows, [prompt]) == [exact], "without a threshold exact ones alone"


def test_of_several_near_prompts_the_nearest_is_named():
    question = "which of these colours does the evening sky have, if one asks {} people in the street"
    prompts = [question.format("several thousand"), question.format("few"), question.format("a few")]
    (found,) = overlapping([row("1", question.format("a few of"))], prompts, 0.5)
    assert found.prompt == prompts[2]


def test_a_near_duplicate_in_an_earlier_turn_counts():
    prompt, asked = ASKED["en"]
    (found,) = overlapping([row("1", asked, "blue", "and in the evening?")], [prompt], 0.75)
    assert found.kind == "near"


def test_the_order_of_rows_and_prompts_changes_only_the_order_of_what_is_found():
    rows = [row(f"{lang}/{i}", text) for lang, pair in ASKED.items() for i, text in enumerate(pair)]
    prompts = [prompt for prompt, _ in ASKED.values()]
    found = overlapping(rows, prompts, 0.75)
    assert len(found) == len(rows)
    assert overlapping(rows[::-1], prompts[::-1], 0.75) == found[::-1]


# Parallel ids


def test_a_row_with_the_id_of_a_prompt_overlaps_only_where_they_come_from_one_source():
    rows = [row("en/7", "a question"), row("fr/7", "une question"), row("fr/8", "une autre")]
    index = PromptIndex(["кое-что совсем другое"], 0.8)
    assert index.find(rows) == []
    found = index.find(rows, {"7": "кое-что"})
    assert [(o.row_id, o.kind, o.prompt) for o in found] == [
        ("en/7", "parallel", "кое-что"),
        ("fr/7", "parallel", "кое-что"),
    ]


def test_a_row_is_counted_once_under_the_first_kind_that_fits():
    prompt, asked = ASKED["en"]
    rows = [row("en/1", prompt), row("en/2", asked), row("en/3", "else"), row("en/4", "more")]
    found = PromptIndex([prompt], 0.75).find(rows, dict.fromkeys("123", "x"))
    assert [overlap.kind for overlap in found] == ["exact", "near", "parallel"]
    assert counted(found) == {"exact": {"en": 1}, "near": {"en": 1}, "parallel": {"en": 1}}


def test_counts_are_by_kind_and_language_and_read_as_a_sentence():
    kinds = [("near", "hi"), ("exact", "fr"), ("exact", "en"), ("near", "hi"), ("exact", "fr")]
    found = [Overlap(str(i), lang, "p", kind) for i, (kind, lang) in enumerate(kinds)]
    assert counted(found) == {"exact": {"en": 1, "fr": 2}, "near": {"hi": 2}}
    assert list(counted(found)) == ["exact", "near"]
    assert in_words(counted(found)) == "3 exact (en 1, fr 2), 2 near (hi 2)"
    assert counted([]) == {}


# Real data


def test_questions_of_the_data_pack_that_name_another_language_are_near_their_prompts():
    pack = Path(__file__).parents[3] / "shared" / "data"
    if not (pack / "general/sft_train.jsonl").is_file():
        pytest.skip("the data pack in ../shared/data is not there")
    with (pack / "general/sft_train.jsonl").open(encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    rows = [Row(f"{r['lang']}/{r['id']}", r["lang"], [{"role": "user", "content": r["prompt"]}], "x") for r in read]
    with (pack / "eval/general_open_prompts.jsonl").open(encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    found = overlapping(rows, prompts, 0.8)
    kinds = counted(found)
    assert sum(kinds["near"].values()) > 5 * sum(kinds.get("exact", {}).values()), "the pack was cleaned of exact ones"
    assert {"ar", "hi", "ru"} <= kinds["near"].keys()
    for overlap in found[:50]:
        assert overlap.likeness >= 0.8
