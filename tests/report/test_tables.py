"""The tables say what the scores say, for the page, the terminal and the CSV."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from rich.table import Table

from mixmerge.report import tables

if TYPE_CHECKING:
    from conftest import Study


def names(study: Study) -> list[str]:
    return [entry["name"] for entry in study.spec["candidates"]]


def column(scores: Any, key: str, split: str = "test") -> dict[str, tables.Cell]:
    place = [c.key for c in tables.result_columns(scores, split)].index(key)
    return {row.name: row.cells[place] for row in tables.result_rows(scores, split)}


def test_the_result_table_has_a_column_for_each_number_that_there_is(study: Study) -> None:
    assert [c.key for c in tables.result_columns(study.scores)] == [
        "win", "harm", "relative_harm", "over_refusal", "wrong_language", "invalid", "balance", "tokens",
    ]  # fmt: skip
    assert "relative_harm" not in [c.key for c in tables.result_columns(study.scores, "dev")]


def test_candidates_stand_by_kind_in_the_recipes_order(study: Study) -> None:
    rows = tables.result_rows(study.scores)
    assert [row.name for row in rows] == names(study)
    turned = study.scores | {"candidates": list(reversed(study.scores["candidates"]))}
    kinds = [row.kind for row in tables.result_rows(turned)]
    assert kinds == ["base"] + ["expert"] * 2 + ["baseline"] * 2 + ["merge"] * 4
    assert tables.result_rows(turned)[1].name == "safety"


def test_a_kind_that_is_not_known_stands_last_under_its_own_name(study: Study) -> None:
    entries = [e | {"kind": "adopted"} if e["name"] == "general" else e for e in study.scores["candidates"]]
    assert tables.by_kind(entries)[-1]["name"] == "general"
    assert tables.kind_name("adopted") == "Adopted"


def test_the_tokens_of_a_baseline_say_the_rule_of_its_budget(study: Study) -> None:
    rule = {"budget_rule": "sum of all experts"}
    entries = [e | rule if e["name"] == "mix-15" else e for e in study.scores["candidates"]]
    cells = column(study.scores | {"candidates": entries}, "tokens")
    assert cells["mix-15"] == tables.Cell("1,250,000", note="sum of all experts")
    assert cells["mix-50"] == tables.Cell("1,250,000")


def test_each_number_has_its_interval_and_the_worst_language(study: Study) -> None:
    harm = study.scores["splits"]["test"]["harm"]["ties"]
    cell = column(study.scores, "harm")["ties"]
    assert cell.value == f"{100 * harm['macro']['value']:.1f}"
    assert cell.interval == f"[{100 * harm['macro']['low']:.1f}, {100 * harm['macro']['high']:.1f}]"
    highest = max(found["value"] for found in harm["languages"].values())
    codes = [code for code, found in harm["languages"].items() if found["value"] == highest]
    where = ", ".join(codes) if len(codes) < 3 else f"in {len(codes)}"
    assert cell.note == f"worst {where}: {100 * highest:.1f}"


def test_what_holds_by_definition_says_so_and_has_no_interval(study: Study) -> None:
    for key, value in (("win", "50.0"), ("relative_harm", "0.0")):
        assert column(study.scores, key)["base"] == tables.Cell(value, note="by definition")


def test_relative_harm_is_shown_in_percent_with_its_sign(study: Study) -> None:
    change = study.scores["relative_harm"]["safety"]
    cell = column(study.scores, "relative_harm")["safety"]
    assert cell.value == f"{change['value']:+.1f}"
    assert cell.value.startswith("-")


def test_the_dev_table_shows_what_the_choice_was_made_on(study: Study) -> None:
    cell = column(study.scores, "balance", "dev")["slerp"]
    assert cell == tables.Cell(f"{100 * study.scores['balance']['slerp']['chosen_by']:.1f}")
    assert all(not row.marks for row in tables.result_rows(study.scores, "dev"))


def test_best_set_front_and_answer_are_marked_in_words(study: Study) -> None:
    scores = study.scores
    for row in tables.result_rows(scores):
        assert ("best set" in row.marks) == (row.name in scores["best_set"])
        assert ("front" in row.marks) == (row.name in scores["pareto"]["front"])
        compared = row.name in (scores["answer"]["picked"]["merge"], scores["answer"]["picked"]["baseline"])
        assert ("compared" in row.marks) == compared


def score(values: dict[str, float]) -> dict[str, Any]:
    return {"languages": {code: {"value": value, "low": 0.0, "high": 1.0, "n": 9} for code, value in values.items()}}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("win", {"en": 0.5, "hi": 0.2}, ["hi"]),
        ("harm", {"en": 0.5, "hi": 0.2}, ["en"]),
        ("harm", {"en": 0.5, "hi": 0.5, "fr": 0.1}, ["en", "hi"]),
        ("harm", {"en": 0.0, "hi": 0.0}, []),
        ("harm", {"en": 0.3}, []),
    ],
)
def test_the_worst_language_is_named_with_its_ties_and_never_where_all_are_alike(
    metric: str, values: dict[str, float], expected: list[str]
) -> None:
    assert tables.worst_languages(score(values), metric) == expected


def test_many_tied_languages_are_counted_instead_of_listed() -> None:
    values = {"en": 0.1, "hi": 0.5, "fr": 0.5, "es": 0.5, "ar": 0.5}
    assert tables.worst_note(score(values), "harm") == "worst in 4: 50.0"


def test_language_tables_mark_the_worst_and_tint_towards_good_and_bad(study: Study) -> None:
    found = {table.metric: table for table in tables.language_tables(study.scores, "test")}
    assert list(found) == ["win", "harm", "over_refusal", "wrong_language", "invalid", "win_strict"]
    for metric, table in found.items():
        assert [code for code, _ in table.languages] == study.spec["languages"]
        for row in table.rows:
            score = study.scores["splits"]["test"][metric][row.name]
            if score is None:
                assert (row.name, metric) == ("base", "win_strict")
                continue
            worst = [code for (code, _), cell in zip(table.languages, row.cells, strict=False) if cell.worst]
            assert worst == ([] if (row.name, metric) == ("base", "win") else tables.worst_languages(score, metric))
            for (code, _), cell in zip(table.languages, row.cells, strict=False):
                value = score["languages"][code]["value"]
                assert cell.value == f"{100 * value:.1f}"
                good = value > 0.5 if metric == "win" else metric == "win_strict"
                assert cell.tint[:1] in ("", "g" if good else "b")
    strongest = max(cell.tint for row in found["harm"].rows for cell in row.cells)
    assert strongest == "b8"


def test_the_differences_are_those_of_the_answer(study: Study) -> None:
    rows = tables.difference_rows(study.scores)
    assert [key for key, *_ in rows] == ["balance", "win", "harm", "over_refusal"]
    assert rows[0][2] == study.scores["answer"]["difference"]
    assert tables.difference_rows(study.scores | {"answer": {"verdict": "none"}}) == []


def test_the_terminal_table_fits_its_heads_and_prints_as_it_is(study: Study) -> None:
    heads, rows = tables.result_headers(study.scores), tables.result_table(study.scores)
    assert {len(row) for row in rows} == {len(heads)}
    assert [row[0] for row in rows] == names(study)
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for row in rows:  # brackets are markup to rich; an interval must survive that
        for cell in row:
            assert all(line in printed for line in cell.splitlines())


def test_benchmarks_stand_in_a_table_of_their_own_and_not_among_the_results(judged: Study) -> None:
    scores = judged.scores
    assert not [c.key for c in tables.result_columns(scores) if c.key.startswith("bench/")]
    columns = tables.benchmark_columns(scores)
    assert [(c.head, c.under, c.better) for c in columns] == [
        ("sums", "right, %", "higher"),
        ("letters", "right, %", "higher"),
        ("xnli, acc", "%", "higher"),
        ("flores, chrf", "", "higher"),
        ("wiki, word perplexity", "", "lower"),
    ]
    rows = {row.name: row.cells for row in tables.benchmark_rows(scores)}
    assert list(rows) == names(judged)
    right = scores["splits"]["test"]["bench/sums"]["ties"]["macro"]
    assert rows["ties"][0].value == f"{100 * right['value']:.1f}"
    assert rows["ties"][0].interval == tables.interval_text(right)
    assert rows["ties"][0].note.startswith("worst ")
    assert rows["base"][2] == tables.Cell(
        "40.0", tables.interval_text(scores["harness"]["bench/xnli/acc"]["candidates"]["base"])
    )
    assert rows["base"][3] == tables.Cell("31.25")  # no error, so no interval
    assert rows["base"][4] == tables.Cell("12.5", "[11.52, 13.48]")
    assert tables.benchmark_columns(scores, "dev") == []


def test_a_candidate_that_the_harness_did_not_run_has_a_dash(judged: Study) -> None:
    entry = judged.scores["harness"]["bench/xnli/acc"]
    left = {name: found for name, found in entry["candidates"].items() if name != "ties"}
    scores = judged.scores | {"harness": {"bench/xnli/acc": entry | {"candidates": left}}}
    rows = {row.name: row.cells[-1] for row in tables.benchmark_rows(scores)}
    assert rows["ties"] == tables.Cell("–")
    assert rows["slerp"] != tables.Cell("–")


@pytest.mark.parametrize(("many", "sizes"), [(1, [3]), (4, [6]), (5, [6, 1]), (12, [6, 6, 2])])
def test_a_terminal_gets_as_many_tables_of_benchmarks_as_fit_side_by_side(
    judged: Study, many: int, sizes: list[int]
) -> None:
    entry = judged.scores["harness"]["bench/xnli/acc"]
    harness = {f"bench/task-{i}/acc": entry | {"name": f"task-{i}, acc"} for i in range(many)}
    found = tables.benchmark_tables(judged.scores | {"harness": harness})
    assert [len(heads) - 1 for heads, _ in found] == sizes
    seen = [head for heads, _ in found for head in heads[1:]]
    assert seen == ["sums, %", "letters, %", *(f"task-{i}, acc, %" for i in range(many))]
    for heads, rows in found:
        assert [row[0] for row in rows] == names(judged)
        assert {len(row) for row in rows} == {len(heads)}


def test_the_result_table_of_a_terminal_is_as_wide_with_benchmarks_as_without(study: Study, judged: Study) -> None:
    assert tables.result_headers(judged.scores) == tables.result_headers(study.scores)


@pytest.mark.parametrize("left", [["general"], ["harmful"], ["harmless"]])
def test_a_study_with_one_prompt_set_has_tables_of_what_is_there(
    study: Study, simulated: Callable[..., Study], left: list[str]
) -> None:
    scores = simulated(sets={name: name for name in left}, languages=["en", "ar"], limit={"dev": 0, "test": 4}).scores
    keys = [c.key for c in tables.result_columns(scores)]
    assert ("win" in keys, "harm" in keys, "over_refusal" in keys) == tuple(
        name in left for name in ("general", "harmful", "harmless")
    )
    assert len(tables.result_table(scores)) == len(names(study))
    assert tables.splits(scores) == ["test"]
    assert tables.benchmark_columns(scores) == []
    assert tables.benchmark_tables(scores) == []


def test_a_terminal_gets_its_tables_without_loading_charts() -> None:
    code = "import sys, mixmerge.report.tables; print([m for m in ('altair', 'vl_convert', 'jinja2', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
