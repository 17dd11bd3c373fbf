import numpy as np
import pytest
from tiny_training import CHATML, tiny_model, tiny_tokenizer

from mixmerge.data.formats import Row
from mixmerge.errors import ModelError
from mixmerge.train.pairs import Referenced
from mixmerge.train.tokens import BLANK, IGNORED, load_tokenizer, token_counter, tokenise, tokenise_pairs


def row(prompt, answer, **extra):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        **extra,
    }


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_only_the_answer_and_its_end_mark_are_learned(tokenizer):
    made = tokenise([row("what is the sky", "deep blue")], tokenizer, 100)
    ids, labels = made.ids[0], made.labels[0]
    learned = [int(i) for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "deep blue<|im_end|>\n"
    assert (
        tokenizer.decode(ids)
        == "<|im_start|>user\nwhat is the sky<|im_end|>\n<|im_start|>assistant\ndeep blue<|im_end|>\n"
    )
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))


def test_earlier_answers_of_a_conversation_are_read_but_not_learned(tokenizer):
    turns = [("user", "sky"), ("assistant", "blue"), ("user", "grass")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    made = tokenise([{"prompt": prompt, "completion": [{"role": "assistant", "content": "green"}]}], tokenizer, 100)
    learned = [int(label) for label in made.labels[0] if label != IGNORED]
    assert tokenizer.decode(learned) == "green<|im_end|>\n"


def test_a_long_row_is_cut_and_counted_and_one_without_room_for_an_answer_is_dropped_and_counted(tokenizer):
    rows = [row("sky", "blue"), row("sky", "blue " * 40), row("what is the sky " * 40, "blue")]
    made = tokenise(rows, tokenizer, 40)
    assert (len(made.ids), made.truncated, made.dropped) == (2, 1, 1)
    assert [len(ids) for ids in made.ids] == [len(tokenise(rows[:1], tokenizer, 999).ids[0]), 40]


def test_a_prompt_that_ends_exactly_at_the_limit_is_dropped_and_one_token_more_is_kept(tokenizer):
    prompt = len(tokenise([row("sky", "x")], tokenizer, 999).labels[0])
    start = next(i for i, label in enumerate(tokenise([row("sky", "x")], tokenizer, 999).labels[0]) if label != IGNORED)
    assert start < prompt
    assert tokenise([row("sky", "x")], tokenizer, start).dropped == 1
    kept = tokenise([row("sky", "x")], tokenizer, start + 1)
    assert (kept.dropped, kept.truncated) == (0, 1)


def test_a_template_that_renders_the_prompt_differently_before_an_answer_is_counted():
    thinking = CHATML.replace("assistant\n' }}{% endif %}", "assistant\nthink' }}{% endif %}")
    tokenizer = tiny_tokenizer(thinking)
    made = tokenise([row("sky", "blue"), row("sea", "blue")], tokenizer, 100)
    assert made.diverging == 2
    learned = [int(label) for label in made.labels[0] if label != IGNORED]
    assert tokenizer.decode(learned) == "blue<|im_end|>\n"
    assert tokenise([row("sky", "blue")], tiny_tokenizer(), 100).diverging == 0


def test_many_rows_in_batches_give_what_each_gives_alone(tokenizer):
    rows = [row(f"what is {i}", f"it is {i}") for i in range(600)]
    together = tokenise(rows, tokenizer, 64)
    for index in (0, 255, 256, 599):
        assert together.ids[index].tolist() == tokenise([rows[index]], tokenizer, 64).ids[0].tolist()


def test_a_template_that_refuses_a_role_is_named():
    refusing = "{{ raise_exception('no system here') }}"
    with pytest.raises(ModelError, match=r"refuses a conversation of user: no system here"):
        tokenise([row("sky", "blue")], tiny_tokenizer(refusing), 64)


def test_the_counter_counts_what_training_sees(tmp_path):
    folder = tiny_model(tmp_path / "m")
    count = token_counter(folder)
    made = tokenise([row("what is the sky", "deep blue")], load_tokenizer(folder), 999)
    assert count(Row("1", "en", [{"role": "user", "content": "what is the sky"}], "deep blue")) == len(made.ids[0])


def test_the_counter_of_pairs_counts_the_prompt_with_either_answer(tmp_path):
    folder = tiny_model(tmp_path / "m")
    one = Row("1", "en", [{"role": "user", "content": "what is the sky"}], "deep blue")
    pair = Row("2", "en", one.prompt, "deep blue", rejected="it is a warm red")
    other = Row("3", "en", one.prompt, "it is a warm red")
    plain, pairs = token_counter(folder), token_counter(folder, pairs=True)
    assert pairs(pair) == plain(one) + plain(other)
    assert plain(pair) == plain(one) == pairs(one)


def test_rows_that_were_dropped_leave_the_places_of_those_that_were_kept(tokenizer):
    made = tokenise([row("sky", "blue"), row("what is the sky " * 40, "blue"), row("sea", "blue")], tokenizer, 40)
    assert made.kept == [0, 2]
    assert made.lengths == [len(ids) for ids in made.ids]


def test_a_tokenizer_without_chat_template_is_refused_with_advice(tmp_path):
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no chat template; name one with 'chat_template'"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_the_place_after_the_last_row_is_a_blank_that_teaches_nothing(tokenizer):
    made = tokenise([row("sky", "blue"), row("sea", "blue")], tokenizer, 40)
    first, blank = made.dataset([0, 2])
    assert first["input_ids"] == made.ids[0].tolist()
    assert (blank["input_ids"], blank["labels"]) == ([0] * BLANK, [IGNORED] * BLANK)
    pair = row("sky", "blue") | {"rejected": row("sky", "red")["completion"]}
    pairs = tokenise_pairs([pair], tokenizer, 40)
    bare = {"prompt_ids": [0] * BLANK, "chosen_ids": [], "rejected_ids": []}
    assert pairs.dataset([0, 1])[1] == bare
    known: dict[str, np.ndarray] = {}
    read = Referenced(pairs.dataset([0, 1]), "pairs", [0, 1], known)
    known["pairs"] = np.array([[-1.5, -2.5]], np.float32)  # it may come after the rows that ask for it
    assert len(read) == 2
    assert (read[0]["ref_chosen_logps"], read[0]["ref_rejected_logps"]) == (-1.5, -2.5)
    assert read[1] == bare | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
