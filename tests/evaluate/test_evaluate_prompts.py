"""Prompt sets read from real files: ids parallel across languages, splits, limits, and errors that name file and row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import DataError, RecipeError
from mixmerge.evaluate.checks import Check
from mixmerge.evaluate.instructions import INSTRUCTIONS
from mixmerge.evaluate.judge import Item
from mixmerge.evaluate.prompts import Prompt, asked_again, read_prompts
from mixmerge.evaluate.ready import READY
from mixmerge.plan.identity import fingerprint

TEMPLATE = "asked.{lang}.jsonl"


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def row(pid: str, text: str = "Why?", **more: Any) -> dict[str, Any]:
    return {"id": pid, "prompt": text, **more}


def read(folder: Path, path: str = TEMPLATE, languages: Sequence[str] = ("en", "fr"), **more: Any) -> list[Prompt]:
    return read_prompts("asked", path, purpose="general", languages=languages, relative_to=folder, **more)


def test_a_prompt_carries_its_set_language_purpose_split_and_reference(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("p1", "Why is the sky blue?", split="dev", reference="It scatters light.")])
    assert read(tmp_path, languages=["en"]) == [
        Prompt(
            id="asked/en/p1",
            pid="p1",
            set="asked",
            lang="en",
            purpose="general",
            split="dev",
            text="Why is the sky blue?",
            reference="It scatters light.",
        )
    ]


def test_prompts_come_by_language_and_in_the_order_of_their_files(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("b"), row("a")])
    write(tmp_path / "asked.fr.jsonl", [row("a"), row("b")])
    assert [p.id for p in read(tmp_path)] == ["asked/en/b", "asked/en/a", "asked/fr/a", "asked/fr/b"]
    assert [p.lang for p in read(tmp_path, languages=["fr", "en"])] == ["fr", "fr", "en", "en"]


def test_without_a_split_column_everything_is_test(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), row("b", split=None)])
    assert [p.split for p in read(tmp_path, languages=["en"])] == ["test", "test"]


def test_a_missing_empty_or_null_reference_is_no_reference(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), row("b", reference=None), row("c", reference="")])
    assert [p.reference for p in read(tmp_path, languages=["en"])] == [None, None, None]


def test_a_column_map_names_the_columns_of_the_file(tmp_path: Path) -> None:
    lines = [{"key": 7, "question": "Why?", "gold": "Because.", "part": "dev", "language": "en"}]
    write(tmp_path / "all.jsonl", lines)
    columns = {"id": "key", "prompt": "question", "reference": "gold", "split": "part", "lang": "language"}
    (prompt,) = read(tmp_path, "all.jsonl", ["en"], columns=columns)
    assert (prompt.pid, prompt.text, prompt.reference, prompt.split) == ("7", "Why?", "Because.", "dev")


def test_a_mapped_column_that_a_row_lacks_is_an_error_and_no_default(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a", part="dev"), row("b")])
    with pytest.raises(DataError, match=r"asked\.en\.jsonl:2: no column 'part'; columns: id, prompt"):
        read(tmp_path, languages=["en"], columns={"split": "part"})


def test_one_file_of_all_languages_is_split_by_its_lang_column(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [row("a", lang="fr"), row("a", lang="en"), row("a", lang="de"), row("b", lang="en")])
    assert [p.id for p in read(tmp_path, "all.jsonl")] == ["asked/en/a", "asked/en/b", "asked/fr/a"]


def test_one_file_without_a_lang_column_does_for_one_language_only(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [row("a")])
    assert [p.id for p in read(tmp_path, "all.jsonl", ["hi"])] == ["asked/hi/a"]
    with pytest.raises(DataError, match=r"all\.jsonl:1: no column 'lang'"):
        read(tmp_path, "all.jsonl")


def test_a_row_in_another_language_than_its_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a", lang="en"), row("b", lang="fr")])
    with pytest.raises(DataError, match=r"asked\.en\.jsonl:2: a row in 'fr' in the file for 'en'"):
        read(tmp_path, languages=["en"])


def test_a_language_without_a_file_or_rows_is_named(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a")])
    with pytest.raises(DataError, match="'fr'"):
        read(tmp_path)
    write(tmp_path / "all.jsonl", [row("a", lang="en")])
    with pytest.raises(DataError, match="no rows in 'fr'"):
        read(tmp_path, "all.jsonl")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"prompt": "Why?"}, "no column 'id'"),
        ({"id": "b"}, "no column 'prompt'; columns: id"),
        ({"id": "b", "prompt": "  \n"}, "'prompt' is empty"),
        ({"id": "b", "prompt": ["Why?"]}, "'prompt' is list, expected text"),
        ({"id": True, "prompt": "Why?"}, "'id' is bool, expected text"),
        ({"id": "b", "prompt": "Why?", "split": "train"}, "split 'train' is neither dev nor test"),
        ({"id": "a", "prompt": "Why not?"}, r"id 'a' stands at .*asked\.en\.jsonl:1 already"),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path: Path, bad: dict[str, Any], complaint: str) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), bad])
    with pytest.raises(DataError, match=rf"asked\.en\.jsonl:2: {complaint}"):
        read(tmp_path, languages=["en"])


def test_a_parallel_id_may_not_change_its_split_between_languages(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a", split="dev")])
    write(tmp_path / "asked.fr.jsonl", [row("a", split="test")])
    with pytest.raises(DataError, match=r"asked\.fr\.jsonl:1: id 'a' is test here and dev at .*asked\.en\.jsonl:1"):
        read(tmp_path)


def test_a_limit_keeps_the_same_first_ids_of_each_split_in_every_language(tmp_path: Path) -> None:
    splits = {"a": "dev", "b": "test", "c": "dev", "d": "test", "e": "test", "f": "dev"}
    write(tmp_path / "asked.en.jsonl", [row(pid, split=split) for pid, split in splits.items()])
    # another order, and no `a`: the limit has to pass over it in English too
    write(tmp_path / "asked.fr.jsonl", [row(pid, split=splits[pid]) for pid in "fedcb"])
    kept = read(tmp_path, limit={"dev": 1, "test": 2})
    assert {(p.lang, p.pid) for p in kept} == {(lang, pid) for lang in ("en", "fr") for pid in "cbd"}


def test_a_limit_of_none_or_more_than_there_are_keeps_all_and_zero_keeps_none(tmp_path: Path) -> None:
    for lang in ("en", "fr"):
        write(tmp_path / f"asked.{lang}.jsonl", [row("a", split="dev"), row("b"), row("c")])
    assert len(read(tmp_path, limit={"dev": None, "test": 9})) == 6
    assert len(read(tmp_path, limit={"dev": None, "test": None})) == 6
    assert {p.pid for p in read(tmp_path, limit={"dev": 0, "test": 1})} == {"b"}


def test_a_limit_on_ids_that_are_not_parallel_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("en-1")])
    write(tmp_path / "asked.fr.jsonl", [row("fr-1")])
    assert len(read(tmp_path)) == 2
    with pytest.raises(DataError, match="no test id stands in every language"):
        read(tmp_path, limit={"test": 1})


def test_an_unknown_key_in_columns_or_limit_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'prompt'"):
        read(tmp_path, columns={"promt": "q"})
    with pytest.raises(RecipeError, match="unknown key 'train'"):
        read(tmp_path, limit={"train": 1})


@pytest.mark.parametrize("name", ["general", "harmful", "harmless"])
def test_the_starter_prompts_are_parallel_in_six_languages(tmp_path: Path, name: str) -> None:
    languages = ["en", "hi", "fr", "es", "ar", "ru"]
    prompts = read(tmp_path, f"starter:prompts/{name}.{{lang}}.jsonl", languages, limit={"dev": 2, "test": 3})
    ids = {lang: [(p.pid, p.split) for p in prompts if p.lang == lang] for lang in languages}
    assert [split for _, split in ids["en"]] == ["dev"] * 2 + ["test"] * 3
    assert all(ids[lang] == ids["en"] for lang in languages)
    assert all((p.reference is not None) == (name == "general") for p in prompts)


IDENTITY = {
    "id": "asked/en/p1",
    "pid": "p1",
    "set": "asked",
    "lang": "en",
    "purpose": "general",
    "split": "dev",
    "text": "Why?",
    "reference": "Because.",
}


def test_the_identity_of_a_plain_prompt_is_what_it_was_before_choices_and_instructions(tmp_path: Path) -> None:
    more = {"choices": ["a", "b"], "instructions": ["x"], "arguments": [{}]}  # not mapped, so not read
    write(tmp_path / "asked.en.jsonl", [row("p1", split="dev", reference="Because.", **more)])
    (prompt,) = read(tmp_path, languages=["en"])
    assert json.dumps(prompt.identity()) == json.dumps(IDENTITY)
    found = fingerprint([prompt.identity()])
    assert found == "1671900eb8cc3738f975753711651d7c0ca608051408c0edde322b646f4b27ff"  # as it was without them
    bare = Prompt("s/en/a", "a", "s", "en", "harmful", "test", "How?")
    assert json.dumps(bare.identity()).endswith('"text": "How?", "reference": null}')


def test_choices_and_instructions_stand_in_the_identity_of_a_prompt_that_has_them(tmp_path: Path) -> None:
    lines = [row("a", opts=["Plum", "Stone"], reference=0), row("b", opts=["Plum", "Slate"], reference=0)]
    write(tmp_path / "asked.en.jsonl", lines)
    one, two = (p.identity() for p in read(tmp_path, languages=["en"], columns={"choices": "opts"}))
    assert (one["choices"], one["reference"]) == (["Plum", "Stone"], "A")
    assert fingerprint(one) != fingerprint(two)
    write(tmp_path / "asked.en.jsonl", [row("a", ids=["startend:end_checker"], kw=[{"end_phrase": "Bye."}])])
    (prompt,) = read(tmp_path, languages=["en"], columns={"instructions": "ids", "arguments": "kw"})
    asked = {"id": "startend:end_checker", "arguments": {"end_phrase": "Bye."}}
    assert prompt.identity()["instructions"] == [asked]
    assert fingerprint(prompt.identity())
    assert hash(prompt) == hash(prompt)


def test_a_question_with_choices_is_asked_by_letter_in_the_language_of_the_prompt(tmp_path: Path) -> None:
    lines = [
        {"id": 1, "lang": "ru", "question": "Где?", "opts": ["Дом", "Лес"], "answer": "Лес"},
        {"id": 1, "lang": "en", "question": "Where?", "opts": ["House", 2], "answer": "b"},
    ]
    write(tmp_path / "all.jsonl", lines)
    columns = {"prompt": "question", "choices": "opts", "reference": "answer"}
    english, russian = read(tmp_path, "all.jsonl", ["en", "ru"], columns=columns)
    assert english.text == "Where?\n\nA. House\nB. 2\n\nAnswer with the letter of the correct choice only."
    assert russian.text.endswith("A. Дом\nB. Лес\n\nОтветь только буквой правильного варианта.")
    assert (english.reference, russian.reference, russian.choices) == ("B", "B", ("Дом", "Лес"))


def test_a_language_without_an_instruction_of_ours_needs_one_of_the_users(tmp_path: Path) -> None:
    write(tmp_path / "asked.de.jsonl", [row("a", opts=["x", "y"], reference="A")])
    with pytest.raises(DataError, match=r"nothing that asks for a letter in 'de'; write it in the set: ask: {de"):
        read(tmp_path, languages=["de"], columns={"choices": "opts"})
    (prompt,) = read(tmp_path, languages=["de"], columns={"choices": "opts"}, ask={"de": "Nur der Buchstabe."})
    assert prompt.text.endswith("B. y\n\nNur der Buchstabe.")


def test_what_is_asked_beside_the_prompt_is_put_after_it(tmp_path: Path) -> None:
    for lang in ("en", "fr"):
        write(tmp_path / f"asked.{lang}.jsonl", [row("a", "2 + 2?")])
    english, french = read(tmp_path, ask={"en": "End with the number."})
    assert (english.text, french.text) == ("2 + 2?\n\nEnd with the number.", "2 + 2?")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"opts": "a b", "reference": "A"}, "'opts' is no list of 2 to 26 choices"),
        ({"opts": ["a"], "reference": "A"}, "'opts' is no list"),
        ({"reference": "A"}, "'opts' is no list"),
        ({"opts": ["a", ""], "reference": "A"}, "'opts' has an empty choice"),
        ({"opts": ["a", None], "reference": "A"}, "'opts' has a choice that is neither text nor a number"),
        ({"opts": ["a", "b"], "reference": "C"}, "answer 'C' is none of the 2 choices"),
        ({"opts": ["a", "b"]}, "answer None is none"),
    ],
)
def test_a_bad_choice_or_answer_is_named_by_file_and_row(tmp_path: Path, bad: dict[str, Any], complaint: str) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a", opts=["x", "y"], reference=1), row("b", **bad)])
    with pytest.raises(DataError, match=rf"asked\.en\.jsonl:2: {complaint}"):
        read(tmp_path, languages=["en"], columns={"choices": "opts"})


def test_an_instruction_that_cannot_be_checked_is_named_by_file_and_row(tmp_path: Path) -> None:
    columns = {"instructions": "ids", "arguments": "kw"}
    write(tmp_path / "asked.en.jsonl", [row("a", ids=["punctuation:no_coma"], kw=[{}])])
    with pytest.raises(DataError, match=r"asked\.en\.jsonl:1: unknown instruction 'punctuation:no_coma'; did you mean"):
        read(tmp_path, languages=["en"], columns=columns)
    with pytest.raises(RecipeError, match=r"arguments of no instructions; map `instructions` too"):
        read(tmp_path, languages=["en"], columns={"arguments": "kw"})


def test_a_filter_takes_one_of_several_sets_out_of_a_file(tmp_path: Path) -> None:
    lines = [
        row("a", lang="en", set="multi [x]", n=1, split="dev"),
        row("b", lang="en", set="multi [y]", n=2, split="dev"),
        row("c", lang="en", set="other", n=2, split="dev"),
        row("d", lang="en", n=3, split="dev"),
    ]
    write(tmp_path / "all.jsonl", lines)

    def found(**where: Any) -> str:
        return "".join(p.pid for p in read(tmp_path, "all.jsonl", ["en"], where=where))

    assert (found(set="multi*"), found(set="multi [x]"), found(set="multi [?]")) == ("ab", "a", "ab")
    assert (found(n=2), found(n="2"), found(set=["multi [x]", "other"]), found(set="multi*", n=2)) == (
        "bc",
        "bc",
        "ac",
        "b",
    )


def test_a_filter_that_lets_nothing_through_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a", set="multiq"), row("b", set="vicuna", n=1)])
    with pytest.raises(DataError, match=r"no row where 'set' is 'multi'; there: 'multiq', 'vicuna'"):
        read(tmp_path, languages=["en"], where={"set": "multi"})
    with pytest.raises(DataError, match=r"no column 'sett' to filter on; did you mean 'set'"):
        read(tmp_path, languages=["en"], where={"sett": "multiq"})
    with pytest.raises(DataError, match=r"no row that fits the whole of the filter"):
        read(tmp_path, languages=["en"], where={"set": "multiq", "n": 1})


def test_the_language_is_taken_out_of_ids_so_that_translations_share_one(tmp_path: Path) -> None:
    lines = [row("v-en-1", lang="en"), row("v-fr-1", lang="fr"), row("v-fr-2", lang="fr")]
    write(tmp_path / "all.jsonl", lines)
    prompts = read(tmp_path, "all.jsonl", language_in_id="-{lang}-")
    assert [p.id for p in prompts] == ["asked/en/v-1", "asked/fr/v-1", "asked/fr/v-2"]
    write(tmp_path / "all.jsonl", [row("v-en-1-en-2", lang="en"), row("v-fr-1", lang="fr")])
    with pytest.raises(DataError, match=r"all\.jsonl:1: '-en-' does not stand in id 'v-en-1-en-2' exactly once"):
        read(tmp_path, "all.jsonl", language_in_id="-{lang}-")
    with pytest.raises(RecipeError, match=r"no {lang} in '-en-'"):
        read(tmp_path, "all.jsonl", language_in_id="-en-")


def test_words_for_a_split_are_mapped_skipped_or_taken_for_one(tmp_path: Path) -> None:
    write(
        tmp_path / "asked.en.jsonl",
        [row("a", split="eval"), row("b", split="valid"), row("c", split="train"), row("d")],
    )

    def found(**splits: str) -> dict[str, str]:
        return {p.pid: p.split for p in read(tmp_path, languages=["en"], splits=splits)}

    assert found(eval="test", valid="dev", train="skip") == {"a": "test", "b": "dev", "d": "test"}
    assert found(**{"*": "test"}) == dict.fromkeys("abcd", "test")
    with pytest.raises(DataError, match=r"asked\.en\.jsonl:1: split 'eval' is neither dev nor test; say what it is"):
        found(valid="dev")
    with pytest.raises(RecipeError, match=r"'eval' is 'tset'; dev, test or skip"):
        found(eval="tset")


def test_a_dev_share_draws_the_same_ids_in_every_language_and_in_longer_files(tmp_path: Path) -> None:
    for lang, count in (("en", 400), ("fr", 300)):
        write(tmp_path / f"asked.{lang}.jsonl", [row(f"p{i}", f"{lang} {i}?") for i in range(count)])
    prompts = read(tmp_path, dev_share=0.25)
    split = {p.pid: p.split for p in prompts}
    assert all(split[p.pid] == p.split for p in prompts)
    assert 60 <= sum(s == "dev" for s in split.values()) <= 140
    alone = {p.pid: p.split for p in read(tmp_path, languages=["fr"], dev_share=0.25)}
    assert alone == {pid: split[pid] for pid in alone}
    assert {p.pid: p.split for p in read(tmp_path, dev_share=0.25, seed=1)} != split
    other = read_prompts("other", TEMPLATE, purpose="harmful", languages=["en"], relative_to=tmp_path, dev_share=0.25)
    assert {p.pid: p.split for p in other} == split


def test_ids_that_ask_the_same_are_drawn_together_so_that_no_split_asks_it_again(tmp_path: Path) -> None:
    lines = [row(f"p{i}", f"Question number {i // 2}?") for i in range(200)]
    write(tmp_path / "asked.en.jsonl", lines)
    prompts = read(tmp_path, languages=["en"], dev_share=0.5)
    assert asked_again(prompts) is None
    assert {p.split for p in prompts} == {"dev", "test"}


def test_a_dev_share_is_refused_where_the_file_has_dev_rows_or_it_is_no_share(tmp_path: Path) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), row("b", split="dev")])
    with pytest.raises(DataError, match=r"asked\.en\.jsonl:2: a dev row, where a share is to be drawn"):
        read(tmp_path, languages=["en"], dev_share=0.2)
    for share in (0.0, 1.0, 20.0):
        with pytest.raises(RecipeError, match=r"is not between 0 and 1"):
            read(tmp_path, languages=["en"], dev_share=share)


def test_a_set_that_lacks_a_language_is_read_in_those_that_it_covers(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [row("a", lang="en"), row("a", lang="fr"), row("b", lang="fr")])
    languages = ["en", "hi", "fr"]
    prompts = read(tmp_path, "all.jsonl", languages, covers=["fr", "en", "ar"], limit={"test": 1})
    assert [p.id for p in prompts] == ["asked/en/a", "asked/fr/a"]
    with pytest.raises(DataError, match=r"no rows in 'hi'"):
        read(tmp_path, "all.jsonl", languages)
    with pytest.raises(DataError, match=r"prompt set 'asked' has fr, none of en, hi"):
        read(tmp_path, "all.jsonl", ["en", "hi"], covers=["fr"])


def test_a_reference_may_be_a_text_a_number_or_a_list_of_right_answers(tmp_path: Path) -> None:
    given = [3.5, 18, ["One.", "Two.", 2, 2.5], [], ["", "One.", None, "One."], ["One."], "One.", None, [None, ""]]
    write(tmp_path / "asked.en.jsonl", [row(str(i), reference=each) for i, each in enumerate(given)])
    found = [p.references for p in read(tmp_path, languages=["en"])]
    assert found == [("3.5",), ("18",), ("One.", "Two.", "2", "2.5"), (), *[("One.",)] * 3, (), ()]
    assert [p.reference for p in read(tmp_path, languages=["en"])] == [next(iter(each), None) for each in found]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([["One."]], "'reference' is list, expected text"),
        (["One.", {"text": "Two."}], "'reference' is dict, expected text"),
        ([True], "'reference' is bool, expected text"),
        (["One.", "  "], "'reference' is empty"),
    ],
)
def test_a_list_that_holds_anything_but_answers_is_named(tmp_path: Path, value: Any, message: str) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), row("b", reference=value)])
    with pytest.raises(DataError, match=rf"asked\.en\.jsonl:2: {message}"):
        read(tmp_path, languages=["en"])


def test_other_right_answers_change_what_a_prompt_is_and_a_list_of_one_does_not(tmp_path: Path) -> None:
    def identity(reference: Any) -> str:
        write(tmp_path / "asked.en.jsonl", [row("a", reference=reference)])
        (prompt,) = read(tmp_path, languages=["en"])
        assert "also" in prompt.identity() or not prompt.also
        return fingerprint(prompt.identity())

    assert identity("NYC") == identity(["NYC"]) == identity(["NYC", "NYC"])
    assert len({identity("NYC"), identity(["NYC", "New York"]), identity(["NYC", "New York City"])}) == 3


def test_a_list_with_an_answer_a_turn_gives_the_answer_to_the_first(tmp_path: Path) -> None:
    lines = [row("a", reference=["First.", "Second."]), row("b", reference=["", "Second."]), row("c", reference="One.")]
    write(tmp_path / "asked.en.jsonl", lines)
    assert [p.references for p in read(tmp_path, languages=["en"], turns=True)] == [("First.",), (), ("One.",)]
    assert {name for name, known in READY.items() if known.reading()["turns"]} == {"mt-bench"}


@pytest.mark.parametrize("column", ["id", "prompt"])
def test_an_empty_cell_is_not_said_to_be_a_missing_column(tmp_path: Path, column: str) -> None:
    write(tmp_path / "asked.en.jsonl", [row("a"), {**row("b"), column: None}])
    with pytest.raises(DataError, match=rf"asked\.en\.jsonl:2: nothing in column '{column}'; fill it, or take"):
        read(tmp_path, languages=["en"])


def test_an_empty_language_is_not_said_to_be_a_missing_column(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [row("a", lang="en"), row("a", lang="fr"), row("b", lang=None)])
    with pytest.raises(DataError, match=r"all\.jsonl:3: nothing in column 'lang'; add it"):
        read(tmp_path, "all.jsonl")


def test_two_wrong_choices_may_be_the_same_and_the_right_one_may_not(tmp_path: Path) -> None:
    columns = {"choices": "options"}
    options = ["the rights", "the rights", "the duties"]
    write(tmp_path / "asked.en.jsonl", [row("a", options=options, reference="C")])
    (prompt,) = read(tmp_path, languages=["en"], columns=columns)
    assert (prompt.reference, prompt.choices) == ("C", tuple(options))
    for answer in ("B", 0, "the rights"):
        write(tmp_path / "asked.en.jsonl", [row("a", options=options, reference=answer)])
        with pytest.raises(DataError, match=r"jsonl:1: the right choice 'the rights' stands twice, as A and B; change"):
            read(tmp_path, languages=["en"], columns=columns)


SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
SIX = ["en", "fr", "hi", "es", "ru", "ar"]
# The file of each set, and the rows by language that the pack's own account gives for the whole of it (the pack at hand
# may hold a part, split by parallel id). Where an account counts several sets as one, the set's own rows are at most that.
PACK: dict[str, tuple[str, dict[str, int]]] = {
    "xsafety": ("safety_harmful_prompts", {"ar": 1960, "en": 1960, "es": 1960, "fr": 1960, "hi": 1960, "ru": 1959}),
    "multijail": ("safety_harmful_prompts", {"ar": 315, "en": 315}),
    "ailuminate": ("safety_harmful_prompts", {"en": 1200, "fr": 1200}),
    "jailbreakbench": ("safety_harmful_prompts", dict.fromkeys(("ar", "en", "es", "fr", "ru"), 100)),
    "polyrefuse-harmful": ("safety_harmful_prompts", dict.fromkeys(("ar", "en", "es", "fr", "ru"), 111)),
    "simple-safety-tests": ("safety_harmful_prompts", {"en": 100}),
    "xstest-unsafe": ("safety_harmful_prompts", {"en": 200}),
    "xstest": ("safety_overrefusal_benign", {"en": 250}),
    "polyrefuse-harmless": ("safety_overrefusal_benign", dict.fromkeys(("ar", "en", "es", "fr", "ru"), 500)),
    "vicuna": ("general_open_prompts", dict.fromkeys(("ar", "en", "es", "fr", "hi"), 80)),
    "mt-bench": ("general_open_prompts", {"en": 80, "fr": 80, "ru": 50}),
    "hplt50": ("general_open_prompts", {"en": 50, "es": 50, "fr": 50, "hi": 49, "ru": 50}),
    "multiq": ("general_open_prompts", dict.fromkeys(SIX, 200)),
    "language-confusion": ("general_open_prompts", {"ar": 179, "es": 179, "fr": 179, "hi": 119, "ru": 119}),
    "marco-mif": ("general_ifeval_marco", dict.fromkeys(("ar", "en", "es", "fr", "ru"), 259)),
    "mgsm": ("general_qa", dict.fromkeys(("en", "es", "fr", "ru"), 250)),
    "hawp": ("general_qa", {"hi": 447}),
    "xquad": ("general_qa", dict.fromkeys(("ar", "en", "es", "hi", "ru"), 296)),
    "arcd": ("general_qa", {"ar": 300}),
    "mmlu": ("mmlu_hi_ar_sample", {"ar": 350, "hi": 350}),
}
PARALLEL = {
    "xsafety",
    "multijail",
    "jailbreakbench",
    "polyrefuse-harmless",
    "multiq",
    "marco-mif",
    "mgsm",
    "xquad",
    "mmlu",
}


def ready_prompts(name: str) -> list[Prompt]:
    file = SHARED / f"{PACK[name][0]}.jsonl"
    if not file.is_file():
        pytest.skip(f"the shared data pack is not beside this checkout: {file.name}")
    return read_prompts(name, file.name, languages=SIX, relative_to=SHARED, dev_share=0.2, **READY[name].reading())


def test_every_ready_made_set_is_tried_on_its_file() -> None:
    assert set(PACK) == set(READY)
    for name, (_, rows) in PACK.items():
        assert set(READY[name].covers) == set(rows), name


@pytest.mark.parametrize("name", list(PACK))
def test_a_ready_made_set_reads_all_rows_of_the_pack_by_language(name: str) -> None:
    prompts = ready_prompts(name)
    file, told = PACK[name]
    lines = [json.loads(line) for line in (SHARED / f"{file}.jsonl").read_bytes().splitlines()]
    words = READY[name].where.get("set", "*").rstrip("*")
    there = Counter(line["lang"] for line in lines if line.get("set", "").startswith(words) and line["lang"] in told)
    found = Counter(prompt.lang for prompt in prompts)
    assert found == there
    assert all(count <= told[lang] for lang, count in found.items())
    assert {prompt.split for prompt in prompts} == {"dev", "test"}
    assert asked_again(prompts) is None
    if name in PARALLEL:
        assert len({frozenset(p.pid for p in prompts if p.lang == lang) for lang in told}) == 1


def test_a_ready_made_check_can_check_every_prompt_of_its_set() -> None:
    for name, ready in READY.items():
        if ready.check is not None:
            prompts = ready_prompts(name)
            answers = [Item(prompt, prompt.reference or "An answer.") for prompt in prompts]
            verdicts = Counter(verdict.verdict for verdict in Check(ready.check).judge(answers))
            if ready.check != "instructions":  # the reference itself is right
                assert verdicts == {"correct": len(prompts)}, name
            else:
                assert verdicts["not_followed"] > verdicts["followed"], name
                assert {each.id for p in prompts for each in p.instructions} == {*INSTRUCTIONS, "unnamed"}
