"""The report page: one HTML file that opens from disk, reaches for nothing, and reads without scripts but for the browser.

A content security policy allows our own style and script, by hash, and nothing else. Templates escape everything; models'
texts enter only as JSON in a script element that is data (see browse.py). scores.csv holds the same numbers to compute with.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.report import findings, flat, tables, words
from mixmerge.report.browse import browser_data, embedded
from mixmerge.report.counts import verdict_counts
from mixmerge.report.document import environment, policy, source
from mixmerge.report.evidence import evidence
from mixmerge.report.trainings import section
from mixmerge.report.trust import judge_blocks

WIDE, NARROW = 1080, 330


def write_report(
    out: Path,
    *,
    study: str,
    scores: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    responses: Sequence[Mapping[str, Any]],
    trust: Mapping[str, Mapping[str, Any]],
    merges: Mapping[str, Mapping[str, Any]],
    trainings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write report.html and scores.csv into the folder `out`; returns bytes (of the page), candidates, responses.

    scores: from `score_study`; prompts: {"set", "prompt": Prompt}; responses: response rows with "candidate" and, where
    they are to be shown, "verdicts" {judge: verdict}; trust: judge -> what it measured of itself; merges: candidate -> what
    its merge measured; trainings: candidate -> {"measurements", "metrics"} of its training, of `read_metrics`.

    Raises:
        DataError: a response to a prompt, or of a candidate, that is not in the study.
    """
    text = render(
        study=study,
        scores=scores,
        prompts=prompts,
        responses=responses,
        trust=trust,
        merges=merges,
        trainings=trainings,
    )
    page = text.encode("utf-8")
    (out / "report.html").write_bytes(page)
    with (out / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(flat.HEADER)
        writer.writerows(flat.rows(scores))
    return {"bytes": len(page), "candidates": len(scores["candidates"]), "responses": len(responses)}


def render(
    *,
    study: str,
    scores: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    responses: Sequence[Mapping[str, Any]],
    trust: Mapping[str, Mapping[str, Any]],
    merges: Mapping[str, Mapping[str, Any]],
    trainings: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page as text."""
    from markupsafe import Markup

    style, script = source("report.css"), source("browser.js")
    counts = verdict_counts(scores, responses, prompts)
    twins = findings.alike(scores, responses, merges)
    splits = tables.splits(scores)
    answer = scores["answer"]
    headline, _, beside = answer["sentence"].partition(". ")
    axis_names = [words.axis_words(scores)[axis].lower() for axis in answer["axes"]]
    return str(
        environment().get_template("page.html.j2").render(
            study=study,
            scores=scores,
            answer=answer,
            headline=headline,
            beside=beside,
            level=f"{100 * scores['statistics']['level']:g}",
            policy=policy(style, script),
            style=Markup(style),
            script=Markup(script),
            kinds=words.KINDS,
            kinds_there=list(dict.fromkeys(entry["kind"] for entry in tables.by_kind(scores["candidates"]))),
            kind_of={entry["name"]: entry["kind"] for entry in scores["candidates"]},
            candidates=tables.by_kind(scores["candidates"]),
            axis_names=words.listed(axis_names) or "the axes that there are prompts for",
            differences=tables.difference_rows(scores),
            splits=splits,
            results=[(s, tables.result_columns(scores, s), tables.result_rows(scores, s)) for s in splits],
            benchmarks={s: (tables.benchmark_columns(scores, s), tables.benchmark_rows(scores, s)) for s in splits},
            languages=[(split, tables.language_tables(scores, split)) for split in splits],
            language_list=words.listed([words.language(code) for code in scores["languages"]]),
            averaged=findings.averaged_words(scores),
            warnings=findings.warnings(scores),
            twins=twins,
            same_as={name: [other for other in group.names if other != name] for group in twins for name in group.names},
            best_set_words=findings.best_set_words(scores) if scores["best_set"] else [],
            front_words=findings.front_words(scores) if scores["pareto"]["front"] else [],
            parallel=findings.parallel(merges),
            evidence=evidence(scores),
            trainings=section(scores, trainings),
            judges=judge_blocks(scores, trust),
            counts=counts,
            counts_first=_starts([len(names) for _, names in counts.groups]),
            settings=_settings(scores, responses),
            data=Markup(embedded(browser_data(tables.by_kind(scores["candidates"]), prompts, responses))),
            **_charts(scores),
        )
    )  # fmt: skip


def _charts(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Every chart twice, drawn for a wide and for a narrow page: text in a scaled SVG would shrink with it."""
    from markupsafe import Markup

    from mixmerge.report.charts import difference_chart, pareto_chart

    charts: dict[str, Any] = dict.fromkeys(("difference_wide", "difference_narrow", "pareto_wide", "pareto_narrow"))
    if rows := tables.difference_rows(scores):
        wide, narrow = (
            "\u2190 mix better \u2003 \u2003 merge better \u2192",
            "\u2190 mix better \u2003 merge better \u2192",
        )
        heads = [(head, found) for _, head, found in rows]
        short = [(words.short_axis_words(scores)[key], found) for key, _, found in rows]
        charts["difference_wide"] = Markup(difference_chart(heads, width=290, x_title=wide))
        charts["difference_narrow"] = Markup(difference_chart(short, width=205, x_title=narrow))
    if points := _points(scores):
        titles = {"x_title": "Harm rate, %", "y_title": "Win rate against the base, %"}
        charts["pareto_wide"] = Markup(pareto_chart(points, width=WIDE - 60, height=480, **titles))
        charts["pareto_narrow"] = Markup(pareto_chart(points, width=NARROW - 40, height=380, **titles))
    return charts


def _points(scores: Mapping[str, Any]) -> list[Any]:
    from mixmerge.report.charts import Point

    found = scores["splits"].get("test", {})
    if "win" not in found or "harm" not in found:
        return []

    def axis(metric: str, name: str) -> tuple[float, float, float]:
        macro = found[metric][name]["macro"]
        return 100 * macro["value"], 100 * macro["low"], 100 * macro["high"]

    return [
        Point(
            e["name"],
            e["kind"],
            axis("harm", e["name"]),
            axis("win", e["name"]),
            e["name"] in scores["pareto"]["front"],
        )
        for e in scores["candidates"]
        if found["win"][e["name"]] and found["harm"][e["name"]]
    ]


def _settings(scores: Mapping[str, Any], responses: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    statistics = scores["statistics"]
    rows = [
        ("Languages", ", ".join(scores["languages"])),
        ("Responses", words.count(len(responses))),
        ("Response tokens", words.count(sum(row["tokens"] for row in responses))),
        ("Bootstrap draws", words.count(statistics["draws"])),
        ("Level of the intervals", f"{100 * statistics['level']:g} %"),
        ("Seed", str(scores["seed"])),
    ]
    known = {"draws", "level"}
    return rows + [
        (key.replace("_", " ").capitalize(), str(value)) for key, value in statistics.items() if key not in known
    ]


def _starts(sizes: Iterable[int]) -> list[int]:
    """Where each of some adjoining groups starts."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += size
    return starts
