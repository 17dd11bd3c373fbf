"""Tables of what stands beside the results: tests against the base, ratings, what merges keep, consistency, lengths, judges.

Plain grids from the scores alone; a table that the study has no numbers for is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixmerge.report.tables import by_kind, interval_text
from mixmerge.report.trust import Grid
from mixmerge.report.words import AXES, PURPOSES, SHORT_AXES, count, language, number, percent

Scores = Mapping[str, Any]


def evidence(scores: Scores) -> list[Grid]:
    """Every such table that the study has numbers for."""
    found = (
        _tests(scores),
        _ratings(scores),
        _corrected(scores),
        _retention(scores),
        _consistency(scores),
        _lengths(scores),
    )
    return [*(grid for grid in found if grid is not None and grid.rows), *_agreement(scores)]


def _names(scores: Scores) -> list[str]:
    return [entry["name"] for entry in by_kind(scores["candidates"])]


def _harness(scores: Scores) -> Grid | None:
    """Every score of lm-evaluation-harness, as the harness counts it."""
    found = scores.get("harness", {})
    if not found:
        return None
    rows = []
    for name in _names(scores):
        cells = []
        for entry in found.values():
            one = entry["candidates"].get(name)
            if one is None:
                cells.append("–")
            elif one["low"] is None:
                cells.append(f"{one['value']:.4g}")
            else:
                cells.append(f"{one['value']:.4g} [{one['low']:.4g}, {one['high']:.4g}]")
        rows.append([name, *cells])
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    heads = ["Candidate", *(entry["name"] + arrows[entry["better"]] for entry in found.values())]
    return Grid("Scores of lm-evaluation-harness, as it counts them", heads, rows, "lm-evaluation-harness")


def _tests(scores: Scores) -> Grid | None:
    """Difference from the base on each axis, and its p-value by Holm."""
    tests = scores.get("tests", {}).get("axes", {})
    if not tests:
        return None
    rows = []
    for name in _names(scores):
        cells = []
        for found in tests.values():
            one = found["candidates"].get(name)
            cells += ["–", "–"] if one is None else [percent(one["difference"], signed=True), p_value(one["adjusted"])]
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    heads = ["Candidate"]
    for axis in tests:
        heads += [SHORT_AXES[axis], "p"]
    caption = (
        "Against the base, in points (above zero is better on every axis), and the probability of a difference at least as "
        "large by chance: sign flips of whole prompts, p-values by Holm over the candidates"
    )
    return Grid(caption, heads, rows, "Against the base")


def p_value(p: float) -> str:
    """A p-value as text.

    >>> p_value(0.04321), p_value(0.0004)
    ('0.043', 'under 0.001')
    """
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def _ratings(scores: Scores) -> Grid | None:
    ratings = scores.get("ratings")
    if not ratings:
        return None
    rows = []
    for name in _names(scores):
        found = ratings["candidates"].get(name)
        if found is not None:
            rating = "–" if found["value"] is None else number(found["value"], signed=True)
            score = found["score"]["value"]
            rows.append([name, rating, _between(found), "–" if score is None else percent(score)])
    caption = (
        "Bradley-Terry ratings with ties, in Elo points above the base (100 points: about 64 to 36), and the win rate that "
        "is left when both answers are equally long"
    )
    return Grid(caption, ["Candidate", "Rating", "Interval", "Win rate at equal length, %"], rows, "Ratings")


def _between(found: Mapping[str, Any]) -> str:
    low, high = ("…" if found[key] is None else number(found[key], signed=True) for key in ("low", "high"))
    return f"[{low}, {high}]"


def _corrected(scores: Scores) -> Grid | None:
    """Raw rates beside rates corrected for the judge's own errors."""
    corrected = scores.get("corrected", {})
    if not corrected:
        return None
    rows = []
    for name in _names(scores):
        cells = []
        for found in corrected.values():
            macro = found["rates"][name]["macro"] or {}
            for key in ("raw", "corrected"):
                one = macro.get(key)
                cells.append("–" if one is None else f"{percent(one['value'])} {interval_text(one)}")
        rows.append([name, *cells])
    heads = ["Candidate"]
    for metric in corrected:
        name = {"harm": "Harm", "over_refusal": "Over-refusal"}[metric]
        heads += [f"{name}, as judged, %", f"{name}, corrected, %"]
    caption = (
        "Rates as judged, and corrected for the judge's errors on labelled rows (Rogan and Gladen 1978); the intervals of the "
        "corrected ones carry the uncertainty of both"
    )
    return Grid(caption, heads, rows, "Rates corrected for the judge's errors")


def _retention(scores: Scores) -> Grid | None:
    kept = scores.get("retention", {})
    axes = [axis for axis in AXES if any(axis in found for found in kept.values())]
    rows = []
    for name, found in kept.items():
        cells = []
        for axis in axes:
            one = found.get(axis)
            high = "" if one is None else "–" if one["high"] is None else percent(one["high"])
            cells.append(
                "–" if one is None else f"{percent(one['value'])} [{percent(one['low'])}, {high}] of {one['of']}"
            )
        rows.append([name, *cells])
    caption = "What each merge keeps: its share, in percent, of what the best of its own ingredients reaches on an axis"
    return Grid(caption, ["Merge", *(AXES[axis] for axis in axes)], rows, "What merges keep of their ingredients")


def _consistency(scores: Scores) -> Grid | None:
    found = scores.get("consistency", {})
    if len(scores["languages"]) < 2:
        return None
    rows = []
    for name in _names(scores):
        there = [found[axis].get(name) for axis in found]
        if any(there):
            rows.append(
                [name, *("–" if one is None else f"{percent(one['value'])} {interval_text(one)}" for one in there)]
            )
    caption = (
        "Consistency across languages: how often two languages get the same verdict on the same prompt, in percent"
    )
    return Grid(caption, ["Candidate", *(AXES[axis] for axis in found)], rows, "Consistency across languages")


def _lengths(scores: Scores) -> Grid | None:
    found = scores.get("length", {})
    purposes = list(dict.fromkeys(purpose for means in found.values() for purpose in means))
    rows = [
        [name, *(count(found[name][p]) if p in found[name] else "–" for p in purposes)]
        for name in _names(scores)
        if name in found
    ]
    heads = [PURPOSES.get(purpose, purpose.capitalize()) for purpose in purposes]
    return Grid("Mean length of the answers, in characters", ["Candidate", *heads], rows, "Length of the answers")


def _agreement(scores: Scores) -> Iterator[Grid]:
    """Krippendorff's alpha of the judges of one question, by language."""
    for question, found in scores.get("agreement", {}).items():
        rows = []
        for code, one in found["languages"].items():
            rows.append([language(code), *_alpha(one)])
        rows.append(["All", *_alpha(found["all"])])
        caption = f"Do the judges of {question} agree? Krippendorff's alpha of {', '.join(found['judges'])}; 1 is always, 0 is chance"
        yield Grid(
            caption, ["Language", "Alpha", "Interval", "Answers"], rows, f"Agreement of the judges of {question}"
        )


def _alpha(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["–", "–", "–"]
    return [f"{found['value']:.2f}", f"[{found['low']:.2f}, {found['high']:.2f}]", count(found["n"])]
