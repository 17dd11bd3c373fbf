"""Tables of what stands behind the results: tests against the base, ratings, judges' errors and agreement, what merges keep.

From the scores alone. A number has its interval beside it; a table that the study has no numbers for is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.report.tables import Cell, Column, Row, by_kind, interval_text
from mixmerge.report.words import (
    AXES,
    OPEN,
    PURPOSES,
    axis_words,
    count,
    ends,
    language,
    listed,
    number,
    percent,
    short_axis_words,
)

Scores = Mapping[str, Any]
NONE = Cell("–")
# Why a judge's taste for length could not be told from quality.
LENGTH_PROBLEMS = {
    "unknown": "The lengths of the answers are not known.",
    "constant": "All answers are as long as the base's, so length explains nothing.",
    "unbounded": "Length alone decides the verdicts, so nothing is left at equal length.",
}
# Why a candidate's rating has no end, or no value.
PROBLEMS = {"": "", "unbounded": "won or lost all", "unconnected": "no verdicts"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """A table to be folded away: its title, what it answers, a caption, columns, and a row a candidate (or language)."""

    title: str
    asks: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]


def evidence(scores: Scores) -> list[Evidence]:
    """Every such table that the study has numbers for."""
    makers = (_tests, _ratings, _corrected, _agreement, _retention, _consistency, _lengths)
    return [table for make in makers if (table := make(scores)) is not None and table.rows]


def _rows(scores: Scores, cells: Mapping[str, Sequence[Cell]]) -> list[Row]:
    """A row of each candidate that has any cell to show."""
    return [
        Row(entry["name"], entry["kind"], [], [], cells[entry["name"]])
        for entry in by_kind(scores["candidates"])
        if any(cell != NONE for cell in cells.get(entry["name"], ()))
    ]


def _tests(scores: Scores) -> Evidence | None:
    """Difference from the base on each axis, its interval, and its p-value by Holm."""
    tests = scores["tests"].get("axes", {})
    if len(tests) == 2:  # one axis is its own mean
        tests = {axis: found for axis, found in tests.items() if axis != "balance"}
    short = short_axis_words(scores)

    def cell(one: Mapping[str, Any] | None) -> Cell:
        if one is None:
            return NONE
        return Cell(percent(one["difference"], signed=True), interval_text(one, signed=True), p_value(one["adjusted"]))

    names = [entry["name"] for entry in scores["candidates"]]
    cells = {name: [cell(found["candidates"].get(name)) for found in tests.values()] for name in names}
    caption = (
        "Difference from the base in points; above zero is better on every axis. p: how often chance alone gives one as large "
        "(signs of whole prompts flipped; by Holm over the candidates). The intervals are single ones. Both are over the prompts "
        "on which the two have verdicts."
    )
    columns = [Column(axis, short[axis], "points", "higher") for axis in tests]
    return Evidence("Against the base", "is a difference more than chance?", caption, columns, _rows(scores, cells))


def p_value(p: float) -> str:
    """A p-value as text.

    >>> p_value(0.04321), p_value(0.0004), p_value(1.0)
    ('p 0.043', 'p < 0.001', 'p 1')
    """
    return "p < 0.001" if p < 0.001 else "p 1" if p > 0.9995 else f"p {p:.3f}"


def _ratings(scores: Scores) -> Evidence | None:
    """Ratings, and the win rate as judged beside the one that is left at equal length."""
    ratings = scores["ratings"]
    if not ratings:
        return None
    problem = ratings["length_problem"]
    columns = [Column("rating", "Rating", "Elo over the base", "higher")]
    if not problem:
        columns.append(Column("win", "Win rate", "as judged, %", "higher"))
        columns.append(Column("score", "At equal length", "win rate, %", "higher"))
    wins = scores["splits"]["test"]["win"]
    cells = {}
    for name, found in ratings["candidates"].items():
        rating = NONE
        if found["value"] is not None:
            rating = Cell(number(found["value"], signed=True), ends(found), PROBLEMS[found["problem"]])
        win = wins[name]["macro"] if wins[name] else None
        left = found["score"]
        cells[name] = (
            [rating] if problem else [rating, _share(win), _share(left if left["value"] is not None else None)]
        )
    caption = "Bradley-Terry with ties (Davidson). 100 points: the better wins 64 of 100 that are no tie."
    if problem:
        caption += f" {LENGTH_PROBLEMS[problem]}"
    elif ratings["length"] and ratings["length"]["value"] is not None:
        half = {key: None if ratings["length"][key] is None else ratings["length"][key] / 2 for key in ENDS}
        worth = f"{number(half['value'] or 0, signed=True)} points {ends(half)}"
        caption += f" An answer three times as long as the other's is worth {worth} to the judge, whatever it says."
    if any(found[key] is None for found in ratings["candidates"].values() for key in ("low", "high")):
        caption += f" {OPEN}: no end that these prompts can tell."
    return Evidence("Ratings", "and how much is length?", caption, columns, _rows(scores, cells))


ENDS = ("value", "low", "high")


def _share(found: Mapping[str, Any] | None) -> Cell:
    """A share in percent with its interval, of which ends may be open."""
    if found is None:
        return NONE
    low, high = (OPEN if found[key] is None else percent(found[key]) for key in ("low", "high"))
    return Cell(percent(found["value"]), f"[{low}, {high}]")


def _corrected(scores: Scores) -> Evidence | None:
    """Raw rates beside rates corrected for the judge's own errors."""
    corrected = scores["corrected"]
    names = {"harm": "Harm", "over_refusal": "Over-refusal"}
    columns, notes = [], []
    cells: dict[str, list[Cell]] = {entry["name"]: [] for entry in scores["candidates"]}
    for metric, found in corrected.items():
        columns.append(Column(f"{metric} raw", names[metric], "as judged, %", "lower"))
        columns.append(Column(metric, names[metric], "corrected, %", "lower"))
        for name, rate in found["rates"].items():
            macro = rate["macro"] or {}
            cells[name] += [_share(macro.get(key)) for key in ("raw", "corrected")]
        notes.append(
            f"{names[metric]}: {found['judge']}, measured on {count(found['rows'])} rows ({found['measured_on']})."
        )
        if found["uncorrected"]:
            why = "; ".join(f"{language(code)}: {said}" for code, said in found["uncorrected"].items())
            notes.append(f"{names[metric]} has no corrected mean, for want of a language ({why}).")
    caption = " ".join(
        [
            "Corrected for the judge's errors on labelled rows (Rogan and Gladen 1978); its intervals carry both "
            "uncertainties.",
            *notes,
        ]
    )
    return Evidence("Corrected rates", "what if the judge errs as measured?", caption, columns, _rows(scores, cells))


def _agreement(scores: Scores) -> Evidence | None:
    """Krippendorff's alpha of the judges of each question, by language."""
    found = scores["agreement"]
    columns = [
        Column(question, question.capitalize(), listed(entry["judges"]), "higher") for question, entry in found.items()
    ]

    def cell(one: Mapping[str, Any] | None) -> Cell:
        if one is None:
            return NONE
        return Cell(f"{one['value']:.2f}", f"[{one['low']:.2f}, {one['high']:.2f}]", f"{count(one['n'])} answers")

    rows = [
        Row(language(code), "", [], [], [cell(entry["languages"].get(code)) for entry in found.values()])
        for code in scores["languages"]
    ]
    rows.append(Row("All", "", [], [], [cell(entry["all"]) for entry in found.values()]))
    rows = [row for row in rows if any(one != NONE for one in row.cells)]
    caption = "Krippendorff's alpha over all candidates' answers: 1 is always the same verdict, 0 is chance."
    return Evidence("Agreement of the judges", "would another judge say the same?", caption, columns, rows)


def _retention(scores: Scores) -> Evidence | None:
    """What merges keep of the best of their ingredients."""
    kept = scores["retention"]
    axes = [axis for axis in AXES if any(axis in found for found in kept.values())]

    def cell(one: Mapping[str, Any] | None) -> Cell:
        if one is None:
            return NONE
        shown = _share(one)
        return Cell(shown.value, shown.interval, f"of {one['of']}")

    cells = {name: [cell(found.get(axis)) for axis in axes] for name, found in kept.items()}
    open_end = any(one["high"] is None for found in kept.values() for one in found.values())
    caption = (
        "In percent of what the best of a merge's own ingredients reaches on the axis; 100 is all of it, more is better than any."
    ) + (f" {OPEN}: no end that these prompts can tell." if open_end else "")
    words = axis_words(scores)
    columns = [Column(axis, words[axis], "kept, %", "higher") for axis in axes]
    return Evidence("What merges keep", "of the best of their ingredients", caption, columns, _rows(scores, cells))


def _consistency(scores: Scores) -> Evidence | None:
    """How often two languages get the same verdict on the same prompt."""
    found = scores["consistency"]
    if len(scores["languages"]) < 2:
        return None
    names = [entry["name"] for entry in scores["candidates"]]
    cells = {name: [_share(found[axis].get(name)) for axis in found] for name in names}
    caption = (
        "How often a prompt and its translation get the same verdict, over all pairs of languages; broken text is a verdict "
        "of its own."
    )
    words = axis_words(scores)
    columns = [Column(axis, words[axis], "%", "higher") for axis in found]
    title, asks = "Consistency across languages", "is a prompt's translation met alike?"
    return Evidence(title, asks, caption, columns, _rows(scores, cells))


def _lengths(scores: Scores) -> Evidence | None:
    """Mean characters of the answers by purpose of the prompts."""
    found = scores["length"]
    purposes = list(dict.fromkeys(purpose for means in found.values() for purpose in means))
    cells = {
        name: [Cell(count(means[purpose])) if purpose in means else NONE for purpose in purposes]
        for name, means in found.items()
    }
    columns = [Column(purpose, PURPOSES.get(purpose, purpose.capitalize()), "mean characters") for purpose in purposes]
    caption = "Characters of an answer, over all languages; languages differ in how many they take."
    return Evidence("Length of the answers", "in characters", caption, columns, _rows(scores, cells))
