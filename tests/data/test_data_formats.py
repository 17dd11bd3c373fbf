import pytest

from mixmerge.data.formats import to_row
from mixmerge.errors import DataError

WHERE = "data.jsonl:7"


def row(record, columns=None):
    return to_row(record, where=WHERE, lang="en", columns=columns or {})


def refusal(record, columns=None):
    with pytest.raises(DataError) as caught:
        row(record, columns)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def user(text="q"):
    return {"role": "user", "content": text}


def assistant(text="a"):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": [user()], "completion": [assistant()]},
        {"messages": [user(), assistant()]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [user(), assistant()]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "repeated", "messages": [user(), assistant()]},
        {"messages": None, "prompt": "q", "completion": "a"},
    ],
)
def test_every_known_format_gives_the_same_row(record):
    made = row(record)
    assert (made.prompt, made.completion, made.rejected) == ([user()], "a", None)
    assert (made.id, made.lang) == ("7", "en")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user()], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": "q", "chosen": [user(), assistant("good")], "rejected": [user(), assistant("bad")]},
        {"chosen": [user(), assistant("good")], "rejected": [user(), assistant("bad")]},
    ],
)
def test_a_preference_row_learns_its_chosen_answer_and_keeps_the_rejected(record):
    made = row(record)
    assert (made.prompt, made.completion, made.rejected) == ([user()], "good", "bad")


def test_the_alpaca_input_follows_the_instruction():
    assert row({"instruction": "Translate.", "input": "Salut", "output": "Hi"}).prompt == [user("Translate.\n\nSalut")]


def test_a_system_turn_and_earlier_answers_belong_to_the_prompt():
    system = {"role": "system", "content": "be kind"}
    made = row({"messages": [system, user("1"), assistant("2"), user("3"), assistant("4")]})
    assert made.prompt == [system, user("1"), assistant("2"), user("3")]
    assert made.completion == "4"


def test_an_id_column_wins_over_the_row_number():
    assert row({"id": 12, "prompt": "q", "completion": "a"}).id == "12"
    assert row({"key": "k", "prompt": "q", "completion": "a"}, {"id": "key"}).id == "k"


def test_mapped_columns_are_read_as_ours_and_decide_the_format():
    record = {"question": "q", "answer": "a", "messages": [user("other"), assistant("other")]}
    made = row(record, {"prompt": "question", "completion": "answer"})
    assert (made.prompt, made.completion) == ([user()], "a")


def test_a_missing_column_is_named_with_those_found_and_the_advice_to_map():
    message = refusal({"prompt": "q", "answer": "a"})
    assert "missing column 'completion' or 'response'" in message
    assert "columns found: answer, prompt" in message
    assert "columns: {prompt: question, completion: answer}" in message
    assert "missing column 'prompt'" in refusal({"completion": "a"})
    assert "missing column 'rejected'" in refusal({"prompt": "q", "chosen": "a"})
    assert "no known format" in refusal({"text": "a"})


def test_a_mapping_to_a_column_that_is_not_there_is_refused():
    message = refusal({"prompt": "q", "reply": "a"}, {"completion": "answer"})
    assert "missing column 'answer' (mapped to completion); columns found: prompt, reply" in message


def test_a_mapping_of_a_name_we_do_not_know_is_refused_with_the_nearest():
    assert "did you mean 'completion'?" in refusal({"prompt": "q", "a": "b"}, {"completions": "a"})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "q", "completion": None}, "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        ({"prompt": "q", "completion": 3}, "'completion' is int, expected text"),
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "text"}, "not a list of messages"),
        ({"messages": [user(), assistant("")]}, "turn 2 of 'messages' is empty"),
        ({"messages": [user(), {"role": "assistant"}]}, "turn 2 of 'messages' has no role or no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, assistant()]}, "is list, expected text"),
        ({"prompt": "q", "completion": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "q", "completion": [user()]}, "the answer is user, expected one assistant turn"),
    ],
)
def test_text_that_is_empty_or_no_text_is_refused(record, expected):
    assert expected in refusal(record)


def test_an_empty_mapped_column_is_named_as_the_file_names_it():
    assert "'answer' (completion) is empty" in refusal({"prompt": "q", "answer": ""}, {"completion": "answer"})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [user(), user(), assistant()]}, "roles out of order: user, user, assistant"),
        ({"messages": [assistant(), user(), assistant()]}, "roles out of order: assistant, user, assistant"),
        ({"messages": [assistant()]}, "roles out of order: assistant"),
        ({"messages": [{"role": "system", "content": "s"}, assistant()]}, "roles out of order: system, assistant"),
        ({"messages": [user(), assistant(), user()]}, "the last turn is user's"),
        ({"messages": [user(), {"role": "tool", "content": "x"}]}, "has the role 'tool'"),
        ({"prompt": [user(), assistant()], "completion": "a"}, "roles out of order"),
    ],
)
def test_turns_out_of_order_are_refused(record, expected):
    assert expected in refusal(record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same "}, "equal"),
        ({"prompt": "q", "chosen": "\u200bsame\u00a0", "rejected": "\u2800same"}, "equal"),
        ({"prompt": "q", "chosen": "caf\u00e9", "rejected": "cafe\u0301"}, "equal"),
        ({"prompt": "q", "chosen": "x", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "x", "rejected": "y"}, "missing column 'prompt'"),
        ({"chosen": [user("1"), assistant()], "rejected": [user("2"), assistant("b")]}, "differ before the answer"),
    ],
)
def test_a_preference_that_prefers_nothing_is_refused(record, expected):
    assert expected in refusal(record)


def test_a_preference_between_spellings_that_differ_inside_is_kept():
    made = row({"prompt": "q", "chosen": "می\u200cشود", "rejected": "میشود"})
    assert (made.completion, made.rejected) == ("می\u200cشود", "میشود")


# Anthropic's HH: a dialogue of Human and Assistant turns as one text on each side


def hh(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in zip(["Human", "Assistant"] * 9, turns, strict=False))


def test_an_hh_row_becomes_prompt_messages_and_two_answers():
    made = row({"chosen": hh("q", "good"), "rejected": hh("q", "bad")})
    assert (made.prompt, made.completion, made.rejected) == ([user()], "good", "bad")


def test_earlier_turns_of_an_hh_dialogue_are_its_prompt():
    made = row({"chosen": hh("1", "2", "3", "good"), "rejected": hh("1", "2", "3", "bad")})
    assert made.prompt == [user("1"), assistant("2"), user("3")]
    assert (made.completion, made.rejected) == ("good", "bad")


def test_paragraphs_and_words_like_human_stay_in_their_hh_turn():
    said = "Two things.\n\nFirst: I am no Human: I am a model.\nHuman: no turn either."
    made = row({"chosen": hh("What is a Human: tell me", said), "rejected": hh("What is a Human: tell me", "bad")})
    assert made.prompt == [user("What is a Human: tell me")]
    assert made.completion == said


def test_the_empty_lines_in_front_of_an_hh_dialogue_may_be_missing_and_columns_may_be_mapped():
    record = {"better": hh("q", "good").lstrip(), "worse": hh("q", "bad"), "id": "7b"}
    made = row(record, {"chosen": "better", "rejected": "worse"})
    assert (made.id, made.prompt, made.completion, made.rejected) == ("7b", [user()], "good", "bad")


def test_texts_beside_a_prompt_are_answers_even_where_they_begin_like_a_dialogue():
    made = row({"prompt": "Write a play.", "chosen": hh("q", "good"), "rejected": "bad"})
    assert (made.prompt, made.completion) == ([user("Write a play.")], hh("q", "good"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (hh("q", ""), hh("q", "bad"), "turn 2 of 'chosen' is empty"),
        (hh("q", "good"), hh("q", " "), "turn 2 of 'rejected' is empty"),
        (hh("q", "good"), hh("other", "bad"), "differ before the answer"),
        (hh("q", "same"), hh("q", "same"), "equal"),
        (hh("q"), hh("q"), "the last turn is user's"),
        (hh("q", "good"), "bad", "'rejected' does not begin with 'Human:'"),
        ("good", hh("q", "bad"), "'chosen' does not begin with 'Human:'"),
        ("\n\nAssistant: good", "\n\nAssistant: bad", "missing column 'prompt'"),
        (hh("q") + hh("r", "good"), hh("q") + hh("r", "bad"), "roles out of order: user, user, assistant"),
        (hh("q", "good"), 3, "'rejected' is int, expected text"),
        (hh("q", "good\ud800"), hh("q", "bad"), "half a surrogate pair"),
    ],
)
def test_an_hh_row_that_cannot_be_used_is_refused_with_its_reason(chosen, rejected, expected):
    assert expected in refusal({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("answer", ["\u200b\u200d\ufeff", "\x00", "\u00a0\u2028 ", "\u2800\u3164", "\ufe0f"])
def test_an_answer_that_nobody_can_see_is_empty(answer):
    with pytest.raises(DataError, match="'completion' is empty"):
        to_row({"prompt": "q", "completion": answer}, where="f:1", lang="en", columns={})


def test_a_turn_that_calls_tools_is_no_row_of_text():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]
    with pytest.raises(DataError, match="turn 2 of 'messages' calls tools"):
        to_row({"messages": turns}, where="f:1", lang="en", columns={})
    turns[1]["tool_calls"] = None
    assert to_row({"messages": turns}, where="f:1", lang="en", columns={}).completion == "a"
