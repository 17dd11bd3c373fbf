"""The tables of the report as plain rows: for the page and the terminal alike.

A number never stands alone: its interval is beside it, and the worst language under it. What is not there (a metric
without prompts, a dev split) is left out as a column, never shown as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.report.words import (
    BENCHMARK,
    KIND_ORDER,
    KINDS,
    METRICS,
    axis_words,
    count,
    ends,
    language,
    metric_words,
    number,
    percent,
)

Scores = Mapping[str, Any]
RESULT_METRICS = ("win", "harm", "over_refusal", "wrong_language", "invalid")
TINTS = 8
ABREAST = 6  # benchmarks beside each other in a terminal


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as text, its interval, a note under it, its tint (a CSS class or none), and whether it is the worst."""

    value: str
    interval: str = ""
    note: str = ""
    tint: str = ""
    worst: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate's row: what it is, what is said of it in words, and its cells in the order of the columns."""

    name: str
    kind: str
    made_from: Sequence[str]
    marks: Sequence[str]
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's key, its head, the smaller line under it, and which way is better, if one is."""

    key: str
    head: str
    under: str
    better: str = ""


def splits(scores: Scores) -> list[str]:
    """The splits that there are scores on, the one to report first."""
    return [split for split in ("test", "dev") if scores["splits"].get(split)]


def result_columns(scores: Scores, split: str = "test") -> list[Column]:
    """The columns of the result table that this study has numbers for."""
    found = scores["splits"].get(split, {})
    columns = []
    for metric in RESULT_METRICS:
        if metric in found:
            under = "win rate, %" if metric == "win" else "%"
            averaged = scores["averaged"][split][metric]
            if averaged["left_out"]:
                under += f", {', '.join(averaged['languages'])} only"
            words = metric_words(metric, scores)
            columns.append(Column(metric, words.head, under, words.better))
        if metric == "harm" and split == "test" and scores["relative_harm"]:
            columns.append(Column("relative_harm", "Harm vs base", "change, %", "lower"))
    if scores["balance"]:
        columns.append(Column("balance", "Balance", "mean of axes, %", "higher"))
    return [*columns, Column("tokens", "Tokens", "trained on, in all")]


def result_rows(scores: Scores, split: str = "test") -> list[Row]:
    """The result table: every candidate, grouped by kind, in the recipe's order within a kind."""
    columns = result_columns(scores, split)
    return [
        Row(
            name=entry["name"],
            kind=entry["kind"],
            made_from=entry["made_from"],
            marks=marks(scores, entry["name"]) if split == "test" else [],
            cells=[_cell(scores, split, column.key, entry) for column in columns],
        )
        for entry in by_kind(scores["candidates"])
    ]


def benchmark_columns(scores: Scores, split: str = "test") -> list[Column]:
    """The benchmarks of a split: prompt sets with a check of their own, then every score of lm-evaluation-harness.

    The harness knows no dev split, so its scores stand with the test prompts.
    """
    found = [key for key in scores["splits"].get(split, {}) if key.startswith(BENCHMARK)]
    columns = [Column(key, metric_words(key, scores).head, "right, %", "higher") for key in found]
    for key, entry in scores["harness"].items() if split == "test" else ():
        columns.append(Column(key, entry["name"], "%" if entry["share"] else "", entry["better"] or ""))
    return columns


def benchmark_rows(scores: Scores, split: str = "test") -> list[Row]:
    """Every candidate on the benchmarks, in the order of `result_rows`."""
    columns = benchmark_columns(scores, split)
    return [
        Row(entry["name"], entry["kind"], [], [], [_cell(scores, split, column.key, entry) for column in columns])
        for entry in by_kind(scores["candidates"])
    ]


def by_kind(candidates: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Candidates grouped by kind; a kind that we do not know comes last."""
    known = {kind: i for i, kind in enumerate(KIND_ORDER)}
    return sorted(candidates, key=lambda entry: known.get(entry["kind"], len(known)))


def kind_name(kind: str) -> str:
    """What a group of candidates is called."""
    return KINDS[kind][0] if kind in KINDS else kind.capitalize()


def marks(scores: Scores, name: str) -> list[str]:
    """What is said of a candidate in words: compared in the answer, in the best set, on the Pareto front."""
    found = []
    picked = scores["answer"]["picked"]
    if scores["answer"]["verdict"] != "none" and name in (picked["merge"], picked["baseline"]):
        found.append("compared")
    if name in scores["best_set"]:
        found.append("best set")
    if name in scores["pareto"]["front"]:
        found.append("front")
    return found


def _cell(scores: Scores, split: str, key: str, entry: Mapping[str, Any]) -> Cell:
    name = entry["name"]
    if key == "tokens":
        return Cell(count(entry["tokens"]), note=entry.get("budget_rule", ""))
    if key == "balance":
        found = scores["balance"][name]
        if split == "dev":
            return Cell(percent(found["chosen_by"])) if scores["answer"]["chosen_on"] == "dev" else Cell("–")
        return Cell(percent(found["value"]), interval_text(found))
    if key == "relative_harm":
        change = scores["relative_harm"].get(name)
        if change is None:
            return Cell("0.0", note="by definition")
        return Cell(number(change["value"], signed=True), ends(change))
    if key in scores["harness"]:
        return _harness_cell(scores["harness"][key], name)
    score = scores["splits"][split][key][name]
    if score is None:
        return Cell("–")
    if key == "win" and entry["kind"] == "base":
        return Cell(percent(score["macro"]["value"]), note="by definition")
    return Cell(percent(score["macro"]["value"]), interval_text(score["macro"]), worst_note(score, key))


def _harness_cell(entry: Mapping[str, Any], name: str) -> Cell:
    """A score as the harness counts it, in percent where it is a share; without an interval where it gave no error."""
    one = entry["candidates"].get(name)
    if one is None:
        return Cell("–")
    if entry["share"]:
        return Cell(percent(one["value"]), "" if one["low"] is None else interval_text(one))
    return Cell(f"{one['value']:.4g}", "" if one["low"] is None else f"[{one['low']:.4g}, {one['high']:.4g}]")


def interval_text(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    """An interval of fractions, in percent."""
    return f"[{percent(estimate['low'], signed=signed)}, {percent(estimate['high'], signed=signed)}]"


def worst_languages(score: Mapping[str, Any], metric: str) -> list[str]:
    """The languages in which a candidate does worst on a metric, ties and all; none where there is no difference."""
    values = {code: found["value"] for code, found in score["languages"].items()}
    better = "higher" if metric.startswith(BENCHMARK) else METRICS[metric].better
    worst = (min if better == "higher" else max)(values.values())
    codes = [code for code, value in values.items() if value == worst]
    return codes if len(codes) < len(values) else []


def worst_note(score: Mapping[str, Any], metric: str) -> str:
    """The worst language and its number, to stand under a mean."""
    codes = worst_languages(score, metric)
    if not codes:
        return ""
    value = percent(score["languages"][codes[0]]["value"])
    where = ", ".join(codes) if len(codes) < 3 else f"in {len(codes)}"
    return f"worst {where}: {value}"


@dataclass(frozen=True, slots=True)
class LanguageTable:
    """One metric by language: candidates down, languages across, the mean last."""

    metric: str
    name: str
    meaning: str
    better: str
    legend: str
    languages: Sequence[tuple[str, str]]
    rows: Sequence[Row]


def language_tables(scores: Scores, split: str) -> list[LanguageTable]:
    """Every metric of a split by language, tinted by value."""
    found = scores["splits"].get(split, {})
    known = [*METRICS, *(key for key in found if key.startswith(BENCHMARK))]
    return [_language_table(scores, split, metric) for metric in known if metric in found]


def _language_table(scores: Scores, split: str, metric: str) -> LanguageTable:
    found, spec = scores["splits"][split][metric], metric_words(metric, scores)
    thin = scores["averaged"][split][metric]["thin"]
    values = [e["value"] for score in found.values() if score for e in score["languages"].values()]
    even = 0.5 if metric == "win" else 0.0
    reach = max([0.1, *(abs(value - even) for value in values)])
    rows = []
    for entry in by_kind(scores["candidates"]):
        score, name = found[entry["name"]], entry["name"]
        defined = entry["kind"] == "base" and metric == "win"
        cells = []
        worst = worst_languages(score, metric) if score else []
        for code in scores["languages"]:
            estimate = score["languages"].get(code) if score else None
            if estimate is None:
                had, asked = thin.get(code, {}).get(name, (0, 0))
                cells.append(Cell("–", f"{had} of {asked} judged" if asked else ""))
                continue
            tint = _tint(estimate["value"] - even, reach, spec.better)
            shown = "" if defined else interval_text(estimate)
            cells.append(Cell(percent(estimate["value"]), shown, tint=tint, worst=code in worst))
        mean = Cell("–")
        if score:
            mean = Cell(percent(score["macro"]["value"]), "by definition" if defined else interval_text(score["macro"]))
        rows.append(Row(name, entry["kind"], entry["made_from"], [], [*cells, mean]))
    if metric == "win":
        legend = f"Blue: above the base's 50, orange: below it; full colour at {percent(reach)} points from it."
    else:
        legend = f"The tint grows from 0 to {percent(reach)} %."
    languages = [(code, language(code)) for code in scores["languages"]]
    return LanguageTable(metric, spec.name, spec.meaning, spec.better, legend, languages, rows)


def _tint(distance: float, reach: float, better: str) -> str:
    """A CSS class: g1..g8 towards good, b1..b8 towards bad; none near zero."""
    step = round(TINTS * abs(distance) / reach)
    good = (distance > 0) == (better == "higher")
    return f"{'g' if good else 'b'}{step}" if step else ""


def difference_rows(scores: Scores) -> list[tuple[str, str, Mapping[str, float]]]:
    """Merge minus mix, the balance first and then each axis: (key, head, {value, low, high} as fractions)."""
    answer = scores["answer"]
    if "difference" not in answer:
        return []
    rows = [("balance", "Balance", answer["difference"])]
    return rows + [(axis, axis_words(scores)[axis], found) for axis, found in answer["by_axis"].items()]


def reading(found: Mapping[str, Any]) -> str:
    """Who is better by a difference, or why that cannot be said.

    >>> reading({"better": "undecided", "low": -0.1, "high": -0.02, "p": 0.125, "prompts": 4})
    'not told apart: 4 prompts differ, by chance alone p 0.125'
    >>> reading({"better": "merge", "low": 0.1, "high": 0.2, "p": 0.001, "prompts": 40})
    'merge better'
    """
    if found["better"] != "undecided":
        return f"{found['better']} better"
    if found["low"] <= 0 <= found["high"]:
        return "not told apart"
    prompts = "1 prompt differs" if found["prompts"] == 1 else f"{found['prompts']} prompts differ"
    return f"not told apart: {prompts}, by chance alone p {found['p']:.3f}"


def result_headers(scores: Scores, split: str = "test") -> list[str]:
    """The heads of `result_table`."""
    return ["Candidate", "Kind", *(column.head for column in result_columns(scores, split)), "Marks"]


def result_table(scores: Scores, split: str = "test") -> list[list[str]]:
    """The result table for a terminal: one row a candidate, cells of up to three lines (number, interval, worst)."""
    return [[row.name, row.kind, *map(_lines, row.cells), "\n".join(row.marks)] for row in result_rows(scores, split)]


def benchmark_tables(scores: Scores, split: str = "test") -> list[tuple[list[str], list[list[str]]]]:
    """The benchmarks for a terminal, heads and rows, in as many tables as it takes at `ABREAST` columns each."""
    columns, rows = benchmark_columns(scores, split), benchmark_rows(scores, split)
    out = []
    for start in range(0, len(columns), ABREAST):
        heads = [f"{c.head}, %" if "%" in c.under else c.head for c in columns[start : start + ABREAST]]
        cells = [[row.name, *map(_lines, row.cells[start : start + ABREAST])] for row in rows]
        out.append((["Candidate", *heads], cells))
    return out


def _lines(cell: Cell) -> str:
    return "\n".join(part for part in (cell.value, cell.interval, cell.note) if part)
