from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.formats import Row
from mixmerge.data.overlap import Overlap, normalised, overlapping


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
