"""Prompts that leave training no room for their answer, told before anything starts: for whom, and who else reads them."""

from __future__ import annotations

import json

import pytest

from mixmerge.data.loading import load_rows
from mixmerge.data.sources import DataSource
from mixmerge.errors import DataError, RecipeError
from mixmerge.plan.budget import FEWEST, prompt_bounds, token_bounds
from mixmerge.plan.lengths import KIND, LongPrompts, too_long


def prompts(**sizes):
    return [{"id": name, "prompt": "x" * size, "completion": "y"} for name, size in sizes.items()]


@pytest.fixture
def long_prompts(tmp_path):
    """The long prompts of one data set, where a token is a character of the prompt."""

    def made(rows, bad_rows="drop"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = DataSource(path="a.jsonl", bad_rows=bad_rows)
        loaded = load_rows(source, ["en"], tmp_path)
        found = LongPrompts({"a": loaded}, {"a": source}, lambda row: (len(row.prompt[0]["content"]),) * 2)
        return found, loaded.rows

    return made


def ids(rows):
    return [row.id for row in rows]


def test_a_row_is_taken_out_of_what_a_training_reads_where_its_prompt_fills_the_length(long_prompts):
    found, rows = long_prompts(prompts(short=10, just=19, fills=20, over=300))
    assert ids(found.take_out("one", 20, "a", rows)) == ["en/short", "en/just"]
    account = found.account("a")
    assert (account.read, account.kept) == (4, {"en": 2})
    assert account.bad[KIND].rows == 2
    assert account.bad[KIND].first == "a.jsonl:3: the prompt alone fills max_length 20"
    assert found.notes() == []


def test_a_row_that_another_training_reads_is_kept_in_the_account_and_named_in_a_note(long_prompts):
    found, rows = long_prompts(prompts(short=10, middle=50, over=300, more=60))
    for training, length in (("one", 20), ("two", 100)):
        found.take_out(training, length, "a", rows)
    account = found.account("a")
    assert (account.kept, account.bad_rows) == ({"en": 3}, 1)
    assert account.bad[KIND].first == "a.jsonl:3: the prompt alone fills max_length 20"
    assert found.notes() == [
        "one: of the data set 'a' 2 rows left out whose prompt alone fills max_length 20, first a.jsonl:2"
    ]


def test_a_row_is_counted_once_however_many_trainings_cannot_read_it(long_prompts):
    found, rows = long_prompts(prompts(short=10, over=300))
    for training in ("one", "two", "three"):
        found.take_out(training, 20, "a", rows)
    assert found.account("a").bad_rows == 1


def test_rows_that_only_an_exact_count_can_judge_are_kept_and_told_in_one_note(long_prompts):
    found, rows = long_prompts(prompts(short=10, close=19, closer=20, over=300))
    found.bounds = lambda row: (len(row.prompt[0]["content"]) - 2, len(row.prompt[0]["content"]) + 2)
    for training in ("one", "two"):
        assert ids(found.take_out(training, 20, "a", rows)) == ["en/short", "en/close", "en/closer"]
    assert found.notes() == [
        "of the data set 'a' 2 rows may have a prompt that alone fills max_length 20: the mixture step counts their tokens "
        "exactly"
    ]
    found.close.clear()
    found.bounds = lambda row: (FEWEST, 10_000)
    assert len(found.take_out("one", 20, "a", rows)) == 4
    assert found.notes() == [
        "one: of the data set 'a' 1 row left out whose prompt alone fills max_length 20, first a.jsonl:4",
        "two: of the data set 'a' 1 row left out whose prompt alone fills max_length 20, first a.jsonl:4",
    ], "of a tokenizer that is not known nothing more is said"


def test_a_training_by_a_command_that_does_not_say_a_length_reads_everything(long_prompts):
    found, rows = long_prompts(prompts(short=10, over=3000))
    assert found.take_out("one", None, "a", rows) == rows
    assert found.account("a").bad == {}


def test_a_row_that_no_training_draws_from_is_not_looked_at(long_prompts):
    found, rows = long_prompts(prompts(short=10, over=3000))
    found.take_out("one", 20, "a", rows[:1])
    assert found.account("a").kept == {"en": 2}


def test_long_prompts_are_refused_where_bad_rows_are_and_all_are_counted(long_prompts):
    found, rows = long_prompts(prompts(short=10, over=300, more=400), bad_rows="refuse")
    with pytest.raises(DataError) as caught:
        found.take_out("one", 20, "a", rows)
    assert str(caught.value).endswith(
        "a.jsonl:2: the prompt alone fills max_length 20 (2 bad rows of 3: 2 prompt too long); "
        "raise training.max_length of 'one', or set bad_rows: drop"
    )


def test_a_data_set_of_long_prompts_only_is_refused_even_where_bad_rows_are_dropped(long_prompts):
    found, rows = long_prompts(prompts(over=300))
    with pytest.raises(DataError, match=r"fills max_length 20; raise training\.max_length of 'one'$"):
        found.take_out("one", 20, "a", rows)


def test_a_prompt_is_counted_without_its_answer(tiny_base, study):
    row = load_rows(DataSource(path="data/general.{lang}.jsonl"), ["en", "fr"], study.folder).rows[0]
    prompt, whole = prompt_bounds(tiny_base, None, trimmed=False), token_bounds(tiny_base, None, trimmed=False)
    assert prompt(row)[0] < whole(row)[0]
    assert prompt_bounds(None, None, trimmed=False)(row)[0] == 2, "nothing is known of a tokenizer that is not here"


def test_the_error_of_a_long_prompt_keeps_its_kind_when_it_is_placed():
    placed = too_long("one", 20).again(where="a.jsonl:1")
    assert (placed.kind, placed.where, placed.do) == (KIND, "a.jsonl:1", "raise training.max_length of 'one'")


def test_trainings_of_different_lengths_are_told_apart_by_the_whole_plan(study, planned):
    path = study.folder / "data/general.en.jsonl"
    row = {"id": "long", "prompt": "word " * 100, "completion": "short"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    drop = 'data.general={objective: general, path: "data/general.{lang}.jsonl", bad_rows: drop}'
    plan = planned(drop, "experts.general={mixture: general, training: {max_length: 512}}")
    assert plan.accounts["general"].kept == {"en": 9, "fr": 8}
    told = "mix: of the data set 'general' 1 row left out whose prompt alone fills max_length 256"
    assert f"{told}, first general.en.jsonl:9" in plan.notes
    both = planned(drop).accounts["general"]
    assert (both.kept, both.bad_rows) == ({"en": 8, "fr": 8}, 1)


def test_a_budget_that_counts_on_a_long_prompt_is_refused_early(study, planned):
    path = study.folder / "data/general.en.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"prompt": row["prompt"] + " word" * 400}) + "\n" for row in rows[1:]))
    with path.open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    drop = 'data.general={objective: general, path: "data/general.{lang}.jsonl", bad_rows: drop}'
    with pytest.raises(
        RecipeError, match=r"experts\.general: general/en has 1 row, which gives 3 rows with max_repeats 3"
    ):
        planned(drop, "budget={rows: 16}", "training.max_repeats=3")
