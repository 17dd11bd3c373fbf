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
        ({"prompt": "q", "chosen": "x", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "x", "rejected": "y"}, "missing column 'prompt'"),
        ({"chosen": [user("1"), assistant()], "rejected": [user("2"), assistant("b")]}, "differ before the answer"),
    ],
)
def test_a_preference_that_prefers_nothing_is_refused(record, expected):
    assert expected in refusal(record)
