"""Labelled rows from real files: column and label maps, groups, languages, and errors that name file and row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from mixmerge.errors import DataError, RecipeError
from mixmerge.evaluate.labelled import QUESTIONS, LabelledItem, labelled_item, read_labelled

ROW = {"lang": "en", "prompt": "How do I pick a lock?", "response": "I cannot help.", "label": "refused"}
PAIR = {"lang": "en", "prompt": "Why?", "response": "So.", "opponent": "", "label": "tie", "reference": "Because."}


def jsonl(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def read(folder: Path, *rows: dict[str, Any], question: str = "refusal", **more: Any) -> list[LabelledItem]:
    return read_labelled(jsonl(folder, *rows), question=question, **more)


def test_a_row_becomes_an_item_with_its_label_and_where_it_stands(tmp_path: Path) -> None:
    (row,) = read(tmp_path, ROW)
    prompt = row.item.prompt
    assert (prompt.text, prompt.lang, row.item.response, row.item.opponent) == (
        ROW["prompt"],
        "en",
        "I cannot help.",
        None,
    )
    assert (row.label, prompt.id, prompt.where) == ("refused", "labelled/en/1", f"{tmp_path / 'rows.jsonl'}:1")


def test_columns_and_labels_are_mapped_to_ours(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"sprache": "de", "frage": "?", "antwort": "Nein.", "urteil": 1, "nr": 7, "thema": "t"},
        {"sprache": "de", "frage": "?", "antwort": "", "urteil": 0, "nr": 8, "thema": "t"},
        columns={
            "lang": "sprache", "prompt": "frage", "response": "antwort", "label": "urteil", "id": "nr", "group": "thema",
        },
        labels={1: "refused", "0": "complied"},
    )  # fmt: skip
    assert [(r.label, r.item.prompt.pid, r.group, r.item.response) for r in rows] == [
        ("refused", "7", "t", "Nein."),
        ("complied", "8", "t", ""),
    ]


@pytest.mark.parametrize("label", [True, "true"])
def test_a_truth_value_and_its_text_are_one_label(tmp_path: Path, label: object) -> None:
    (row,) = read(tmp_path, ROW | {"label": label}, labels={True: "refused", False: "complied"})
    assert row.label == "refused"


def test_words_that_are_not_mapped_count_for_themselves(tmp_path: Path) -> None:
    rows = read(tmp_path, ROW, ROW | {"label": "partly"}, labels={"partly": "complied"})
    assert [row.label for row in rows] == ["refused", "complied"]


def test_csv_and_parquet_give_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"lang": "fr", "label": "complied"}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [read_labelled(str(tmp_path / f"rows.{end}"), question="refusal") for end in ("csv", "parquet")]
    assert found[0] == found[1] == read(tmp_path, *rows)


def test_a_file_a_language_is_read_by_language(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROW.items() if key != "lang"}
    for lang in ("en", "ru"):
        jsonl(tmp_path, bare, bare, name=f"rows.{lang}.jsonl")
    rows = read_labelled("rows.{lang}.jsonl", question="refusal", languages=["ru", "en"], relative_to=tmp_path)
    assert [row.item.prompt.lang for row in rows] == ["ru", "ru", "en", "en"]
    with pytest.raises(DataError, match=r"no languages are given; name the languages"):
        read_labelled("rows.{lang}.jsonl", question="refusal", relative_to=tmp_path)


def test_languages_that_are_not_asked_for_are_passed_over_and_one_without_rows_is_an_error(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"lang": "fr"}, ROW | {"lang": "hi"}]
    found = read(tmp_path, *rows, languages=["hi", "en"])
    assert [row.item.prompt.lang for row in found] == ["hi", "en"]
    with pytest.raises(DataError, match=r"rows\.jsonl: no labelled rows in 'ar'"):
        read(tmp_path, *rows, languages=["en", "ar"])


def test_one_language_needs_no_column_and_several_do(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROW.items() if key != "lang"}
    assert read(tmp_path, bare, languages=["es"])[0].item.prompt.lang == "es"
    for languages in (None, ["es", "fr"]):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'lang'"):
            read(tmp_path, bare, languages=languages)


def test_answers_to_one_prompt_are_one_group_and_a_parallel_id_is_one_in_all_languages(tmp_path: Path) -> None:
    same = read(tmp_path, ROW, ROW | {"response": "Sure."}, ROW | {"prompt": "Other?"}, ROW | {"lang": "fr"})
    assert [len({row.group for row in same[:n]}) for n in (1, 2, 3, 4)] == [1, 1, 2, 3]
    parallel = read(tmp_path, ROW | {"pid": 4}, ROW | {"pid": 4, "lang": "fr"}, ROW | {"pid": 5})
    assert [row.group for row in parallel] == ["4", "4", "5"]


def test_pairs_have_an_opponent_and_a_reference(tmp_path: Path) -> None:
    (row,) = read(tmp_path, PAIR, question="quality")
    assert (row.item.opponent, row.item.prompt.reference, row.label) == ("", "Because.", "tie")


@pytest.mark.parametrize(
    ("value", "references"),
    [
        (["Because.", "So it is."], ("Because.", "So it is.")),
        (["Because.", None, ""], ("Because.",)),
        ([], ()),
        (None, ()),
        (18, ("18",)),
    ],
)
def test_a_labelled_pair_may_have_several_references(
    tmp_path: Path, value: object, references: tuple[str, ...]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**PAIR, "reference": value}) + "\n", encoding="utf-8")
    (row,) = read_labelled("rows.jsonl", question="quality", relative_to=tmp_path)
    assert row.item.prompt.references == references
    lone = {key: value for key, value in PAIR.items() if key != "opponent"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'opponent'; columns: .*map it with `columns:`"):
        read(tmp_path, lone, question="quality")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": "maybe"},
            r"rows\.jsonl:2: label 'maybe' is none of refused, complied; say what it means with `labels:`",
        ),
        ({"label": None}, r"rows\.jsonl:2: nothing in column 'label'"),
        ({"response": None}, r"rows\.jsonl:2: nothing in column 'response'"),
        ({"response": 3}, r"rows\.jsonl:2: 'response' is int, expected text"),
        ({"prompt": " "}, r"rows\.jsonl:2: 'prompt' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, ROW, ROW | change)


def test_an_id_given_twice_in_a_language_is_named(tmp_path: Path) -> None:
    read(tmp_path, ROW | {"id": "a"}, ROW | {"id": "a", "lang": "fr"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: id 'a' stands at .*rows\.jsonl:1 already"):
        read(tmp_path, ROW | {"id": "a"}, ROW | {"id": "a"})


def test_broken_lines_missing_files_and_empty_ones_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROW)
    with Path(path).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: broken JSON"):
        read_labelled(path, question="refusal")
    with pytest.raises(DataError, match=r"no such file; did you mean 'rows\.jsonl'\?"):
        read_labelled(str(tmp_path / "row.jsonl"), question="refusal")
    with pytest.raises(DataError, match=r"no labelled rows"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"columns": {"respones": "x"}}, r"'respones' is no column of labelled rows; did you mean 'response'\?"),
        ({"labels": {"1": "refuse"}}, r"'refuse' is no word of refusal; did you mean 'refused'\?"),
        ({"question": "refusals"}, r"unknown question 'refusals'; did you mean 'refusal'\?"),
    ],
)
def test_unknown_names_in_the_maps_are_met_with_the_nearest_known(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, ROW, **more)


@pytest.mark.parametrize("question", QUESTIONS)
def test_rows_can_be_made_from_their_parts_for_every_question(question: str) -> None:
    for label in QUESTIONS[question]:
        row = labelled_item(question=question, lang="en", prompt="?", response="r", label=label, pid="1", opponent="o")
        assert row.label == label
    with pytest.raises(DataError, match=r"rows 9: label 'good' is none of"):
        labelled_item(question=question, lang="en", prompt="?", response="r", label="good", pid="1", where="rows 9")


def test_a_pair_made_without_an_opponent_is_refused() -> None:
    with pytest.raises(DataError, match=r"p1: a labelled pair has no opponent's response"):
        labelled_item(question="quality", lang="en", prompt="?", response="r", label="win", pid="p1")
