"""Every number of the scores as one flat table to compute with: scores.csv.

A row for each candidate, split, metric and language; `macro` is the mean over languages. Numbers that are of one language
alone or of none have no language, what is not about one candidate has no candidate, and what does not count verdicts no n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixmerge.report.tables import splits

Scores = Mapping[str, Any]
Row = tuple[Any, ...]
HEADER = ("candidate", "kind", "split", "metric", "language", "unit", "value", "low", "high", "n")


def rows(scores: Scores) -> list[Row]:
    """Rows under `HEADER`; an end of an interval that is open or not known is empty.

    metrics: those of the scores as fractions; `relative_harm` in percent, as in the paper; `difference/<axis>` from the
    base with its sign-flip `p/<axis>` and, by Holm over the candidates, `p_holm/<axis>` (n: prompts that tell);
    `corrected/<metric>`; `rating` in Elo points above the base and `win_at_equal_length`; `retention/<axis>`,
    `consistency/<axis>`; `length/<purpose>` in characters; `alpha/<question>`, the judges' agreement (n: answers).
    """
    kinds = {entry["name"]: entry["kind"] for entry in scores["candidates"]} | {"": ""}
    found = [*_metrics(scores), *_comparisons(scores), *_beside(scores), *_agreement(scores)]
    return [
        (name, kinds[name], split, metric, code, unit, *map(_text, map(one.get, ("value", "low", "high", "n"))))
        for name, split, metric, code, unit, one in found
    ]


Found = Iterator[tuple[str, str, str, str, str, Mapping[str, Any]]]


def _text(value: float | None) -> float | str:
    return "" if value is None else value


def _metrics(scores: Scores) -> Found:
    for split in splits(scores):
        for metric, by_candidate in scores["splits"][split].items():
            for name, score in by_candidate.items():
                if score is not None:
                    yield name, split, metric, "macro", "fraction", score["macro"]
                    for code, one in score["languages"].items():
                        yield name, split, metric, code, "fraction", one
    for key, entry in scores["harness"].items():
        for name, one in entry["candidates"].items():
            yield name, "test", key, "", "fraction" if entry["share"] else "number", one


def _comparisons(scores: Scores) -> Found:
    for name, one in scores["relative_harm"].items():
        yield name, "test", "relative_harm", "macro", "percent", one
    for name, one in scores["balance"].items():
        yield name, "test", "balance", "macro", "fraction", one
        if scores["answer"]["chosen_on"] == "dev":
            yield name, "dev", "balance", "macro", "fraction", {"value": one["chosen_by"]}
    for axis, tested in scores["tests"].get("axes", {}).items():
        for name, one in tested["candidates"].items():
            n = {"n": one["clusters"]}
            difference = {"value": one["difference"], "low": one["low"], "high": one["high"]}
            yield name, "test", f"difference/{axis}", "macro", "fraction", difference | n
            yield name, "test", f"p/{axis}", "macro", "probability", {"value": one["p"]} | n
            yield name, "test", f"p_holm/{axis}", "macro", "probability", {"value": one["adjusted"]} | n
    for metric, entry in scores["corrected"].items():
        for name, rate in entry["rates"].items():
            by_language = {"macro": rate["macro"]} | rate["languages"]
            for code, both in by_language.items():
                if both is not None and both["corrected"] is not None:
                    yield name, "test", f"corrected/{metric}", code, "fraction", both["corrected"]


def _beside(scores: Scores) -> Found:
    for name, one in scores["ratings"].get("candidates", {}).items():
        if one["value"] is not None:
            yield name, "test", "rating", "macro", "elo", one
        if one["score"]["value"] is not None:
            yield name, "test", "win_at_equal_length", "macro", "fraction", one["score"]
    for name, kept in scores["retention"].items():
        for axis, one in kept.items():
            yield name, "test", f"retention/{axis}", "macro", "ratio", one
    for axis, by_name in scores["consistency"].items():
        for name, one in by_name.items():
            yield name, "test", f"consistency/{axis}", "", "fraction", one
    for name, means in scores["length"].items():
        for purpose, mean in means.items():
            yield name, "test", f"length/{purpose}", "", "characters", {"value": mean}


def _agreement(scores: Scores) -> Found:
    for question, entry in scores["agreement"].items():
        for code, one in {**entry["languages"], "": entry["all"]}.items():
            if one is not None:
                yield "", "", f"alpha/{question}", code, "alpha", one
