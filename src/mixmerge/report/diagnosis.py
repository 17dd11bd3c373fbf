"""A merge's diagnosis for people: tables for the terminal, and one self-contained page with heat maps.

The one idea: a layer, a kind of module, a cell of both and a tensor are told alike, so one summary serves all of them.
With several models, a number is that of the pair or model that stands out most: the lowest cosine, the longest task vector.
What was not measured (task vectors without a base, ranks of large matrices) is left out, never shown as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import UserError
from mixmerge.report import words
from mixmerge.report.document import environment, policy, source
from mixmerge.report.heatmap import HeatCell, heat_map

Told = Mapping[str, Any]
WIDE, NARROW = 470, 255  # of a map's cells, for a wide and for a narrow page


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that is told of every place: its head in a table, its value there, and how it is written."""

    head: str
    value: Callable[[Told], float | None]
    text: Callable[[float], str]


def _lowest(entries: Sequence[Told], key: str) -> float | None:
    return min((entry[key] for entry in entries if entry[key] is not None), default=None)


def _longest(told: Told) -> float | None:
    return max((e["relative_length"] for e in told["lengths"] if e["relative_length"] is not None), default=None)


def _rank(told: Told) -> float | None:
    """Effective rank as a share of the full one, averaged over the models."""
    shares = [e["effective_rank"] / e["full_rank"] for e in told["lengths"] if e["effective_rank"] is not None]
    return math.fsum(shares) / len(shares) if shares else None


def _degrees(told: Told) -> float | None:
    cosine = _lowest(told["models"], "cosine")
    return None if cosine is None else math.degrees(math.acos(cosine))


def _percent(share: float) -> str:
    return f"{100 * share:.3g}" if share < 0.1 else f"{100 * share:.1f}"


def _short(share: float) -> str:
    """Percent for the narrow cells of a map."""
    return "<0.01" if 0 < share < 1e-4 else f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.0f}"


MEASURES = (
    Measure("lowest cosine", lambda told: _lowest(told["models"], "cosine"), lambda value: f"{value:.6f}"),
    Measure("parallel %", lambda told: _lowest(told["models"], "parallel_share"), _percent),
    Measure("task vector % of base", _longest, _percent),
    Measure("task cosine", lambda told: _lowest(told["task_vectors"], "cosine"), lambda value: f"{value:.3f}"),
    Measure("sign conflict %", lambda told: told["signs"]["conflict_share"], _percent),
    Measure("by size %", lambda told: told["signs"]["conflict_share_by_size"], _percent),
    Measure("rank %", _rank, _percent),
)

MEANINGS = (
    ("lowest cosine", "between two of the models (the base is one of them): the pair furthest apart."),
    ("parallel %", "share of the parameters in tensors that SLERP treats as parallel, and so merges linearly."),
    ("task vector % of base", "length of the longest task vector (model minus base) over the length of the base."),
    ("task cosine", "between two task vectors: the pair that points apart most."),
    ("sign conflict %", "of the elements that two or more task vectors change, those that they push both up and down."),
    ("by size %", "the same, each element counted by how far the task vectors move it."),
    ("rank %", "effective rank (entropy of the singular values) over full rank, in small matrices, averaged."),
)


@dataclass(frozen=True, slots=True)
class Map:
    """A heat map of layers by kinds: what it shows, how strong a value's colour is, and what the reader should know."""

    title: str
    about: str
    value: Callable[[Told], float | None]
    text: Callable[[float], str]
    scale: float | None = None  # the value of full strength; None: the largest there is


MAPS = (
    Map(
        "Angle between the models, degrees",
        "Largest angle between two of the models. SLERP is linear below {limit} degrees.",
        _degrees,
        lambda value: f"{value:.2f}" if value < 10 else f"{value:.0f}",
    ),
    Map("Length of the task vectors, % of the base", "The longest of them.", _longest, _short),
    Map(
        "Cosine of the task vectors",
        "The pair that points apart most. 1: they learned the same; 0: unrelated; below 0: against each other.",
        lambda told: _lowest(told["task_vectors"], "cosine"),
        lambda value: f"{value:.2f}",
        scale=1.0,
    ),
    Map(
        "Conflicting signs, % by size",
        "Of what two or more task vectors change, the share that they push both up and down.",
        lambda told: told["signs"]["conflict_share_by_size"],
        lambda value: f"{100 * value:.0f}",
        scale=0.5,
    ),
    Map(
        "Effective rank, % of the full rank",
        "Of task vectors that are small matrices: low means that few directions carry the change.",
        _rank,
        lambda value: f"{100 * value:.0f}",
        scale=1.0,
    ),
)


def diagnosis_table(found: Told, by: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows by "kinds", "layers" or "tensors"; a measure that has no value anywhere is left out."""
    places = found[by]
    measures = [m for m in MEASURES if any(m.value(told) is not None for told in places)]
    head = {"kinds": "kind", "layers": "layer", "tensors": "tensor"}[by]
    layer = _layers(found)
    counts = ["parameters"] if by == "tensors" else ["tensors", "parameters"]
    rows = []
    for told in places:
        sizes = [words.count(told[{"parameters": "elements"}.get(count, count)]) for count in counts]
        values = [(m, m.value(told)) for m in measures]
        name = layer(told) if by == "layers" else told["kind" if by == "kinds" else "name"]
        rows.append([name, *sizes, *("" if value is None else m.text(value) for m, value in values)])
    return [head, *counts, *(m.head for m in measures)], rows


def write_diagnosis(file: Path, found: Told) -> None:
    """Write the page of a diagnosis: one HTML file without scripts, that opens from disk and reaches for nothing."""
    from markupsafe import Markup

    style = source("report.css") + source("diagnosis.css")
    page = environment().get_template("diagnosis.html.j2").render(
        found=found,
        style=Markup(style),
        policy=policy(style),
        tables=[(by, *diagnosis_table(found, by)) for by in ("kinds", "layers", "tensors")],
        meanings=MEANINGS,
        pairs=_pairs(found),
        maps=[(shown.title, about, Markup(wide), Markup(narrow)) for shown, about, wide, narrow in _maps(found)],
    )  # fmt: skip
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the page cannot be written: {(error.strerror or str(error)).lower()}", where=str(file)
        ) from error


def _pairs(found: Told) -> list[list[str]]:
    """Each pair of models, over all tensors: cosine, cosine of the task vectors, parallel tensors."""
    tasks = {tuple(entry["pair"]): entry["cosine"] for entry in found["total"]["task_vectors"]}
    rows = []
    for entry in found["total"]["models"]:
        task = tasks.get(tuple(entry["pair"]))
        rows.append(
            [
                *(found["names"].get(model, model) for model in entry["pair"]),
                "" if entry["cosine"] is None else f"{entry['cosine']:.6f}",
                "" if task is None else f"{task:.3f}",
                f"{words.count(entry['parallel_tensors'])} of {words.count(entry['compared_tensors'])}",
            ]
        )
    return rows


def _maps(found: Told) -> list[tuple[Map, str, str, str]]:
    """Each map that there are values for, with what is said of it, drawn for a wide and for a narrow page."""
    label, limit = _layers(found), math.degrees(math.acos(found["parallel_above"]))
    rows = list(dict.fromkeys(label(told) for told in found["cells"]))
    drawn = []
    for shown in MAPS:
        values = [(told, value) for told in found["cells"] if (value := shown.value(told)) is not None]
        if not values:
            continue
        full = shown.scale or max(abs(value) for _, value in values) or 1.0
        cells = [HeatCell(label(told), told["kind"], shown.text(value), value / full) for told, value in values]
        there = {cell.column for cell in cells}
        columns = [told["kind"] for told in found["kinds"] if told["kind"] in there]
        wide = heat_map(cells, rows=rows, columns=columns, width=WIDE)
        narrow = heat_map(cells, rows=rows, columns=columns, width=NARROW, letters=10)
        drawn.append((shown, shown.about.format(limit=f"{limit:.2f}"), wide, narrow))
    return drawn


def _layers(found: Told) -> Callable[[Told], str]:
    """How layers are called: by number, with their stack's name where there are several stacks."""
    several = len({told["stack"] for told in found["cells"]} - {None}) > 1

    def label(told: Told) -> str:
        if told["layer"] is None:
            return "no layer"
        return f"{told['stack']}.{told['layer']}" if several else str(told["layer"])

    return label
