"""Prompt sets read from real files: ids parallel across languages, splits, limits, and errors that name file and row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import DataError, RecipeError
from mixmerge.evaluate.prompts import Prompt, read_prompts

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
