"""How the trainings went: what train steps logged and measured, as charts, the numbers beside them, and tables.

One idea: a training has panels (the loss, and under dpo the margin of the rewards), each with a curve of the rows that are
trained on and one a language of those held out. A training whose trainer logged nothing of the kind has none, and a table
row all the same. Which keys there are: `mixmerge.train.fit` (metrics.jsonl) and the record's measurements.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from mixmerge.report.curves import Line, Points, curve_chart, limits, shared_limits, smoothed
from mixmerge.report.tables import Cell, Row, by_kind, marks
from mixmerge.report.words import count, language, listed

MOST_CHARTS = 12
METHODS = {"sft": "SFT", "dpo": "DPO", "command": "a command"}
NONE = "–"


@dataclass(frozen=True, slots=True)
class Measure:
    """A panel's kind: its head, its key in a line of metrics.jsonl and under `held_out`, which way is better, its height."""

    head: str
    key: str
    held_key: str
    better: str
    height: int

    @property
    def wrong_way(self) -> str:
        return "Rose in" if self.better == "lower" else "Fell in"


MEASURES = (
    Measure("Loss", "loss", "loss", "lower", 130),
    Measure("Reward margin", "rewards/margins", "margin", "higher", 90),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure of a training over its steps, in nats: on the rows it learns from, and held-out rows by language."""

    measure: Measure
    trained: Points
    held_out: Mapping[str, Points] = field(default_factory=dict)

    @property
    def mean(self) -> Points:
        """The mean over languages at the steps at which all were read."""
        held = [dict(points) for points in self.held_out.values()]
        steps = sorted(set.intersection(*(set(points) for points in held))) if held else []
        return [(step, sum(points[step] for points in held) / len(held)) for step in steps]

    @property
    def worst(self) -> str | None:
        """The language that ends worst, if there are several."""
        pick = max if self.measure.better == "lower" else min
        return pick(self.held_out, key=lambda code: self.held_out[code][-1][1]) if len(self.held_out) > 1 else None

    @property
    def wrong(self) -> list[str]:
        """The languages that end worse than they began."""
        sign = 1 if self.measure.better == "lower" else -1
        return [code for code, points in self.held_out.items() if sign * (points[-1][1] - points[0][1]) > 0]

    def lines(self) -> list[Line]:
        """What the panel draws, from the back to the front."""
        found = [Line(self.trained, "var(--accent)", faint=True), Line(smoothed(self.trained), "var(--accent)")]
        found.append(Line(self.mean, "var(--ink)", dots=True))
        if self.worst is not None:  # last: where it is close to the mean, both are seen between its dashes
            found.append(Line(self.held_out[self.worst], "var(--caution)", dashed=True, dots=True))
        return [line for line in found if line.points]


@dataclass(frozen=True, slots=True)
class Training:
    """A trained candidate: what it is, what its record measured, and its panels."""

    name: str
    kind: str
    made_from: Sequence[str]
    measured: Mapping[str, Any]
    panels: Sequence[Panel]

    @property
    def method(self) -> str:
        if "command" in self.measured:
            return "command"
        return "dpo" if any(panel.measure.key == "rewards/margins" for panel in self.panels) else "sft"

    @property
    def steps(self) -> int | None:
        """How many steps it took, by its record or else by its last line."""
        logged = [step for panel in self.panels for step, _ in panel.trained]
        steps: int | None = self.measured.get("steps", int(max(logged)) if logged else None)
        return steps

    @property
    def apart(self) -> list[tuple[str, list[str]]]:
        """Languages that have no held-out row, and those that have no other, each under its head."""
        told = self.measured.get("held_out")
        heads = {"without": "No row held out", "untrained": "Never trained on"}
        return [(head, told[key]) for key, head in heads.items() if told.get(key)] if isinstance(told, Mapping) else []

    @property
    def about(self) -> str:
        """How it was made, in a line."""
        start = f" from {listed(self.made_from)}" if self.made_from else ""
        took = [f"{count(self.steps)} steps"] if self.steps else []
        took += [f"{count(tokens)} tokens"] if (tokens := self.measured.get("tokens")) else []
        return ", ".join([f"{METHODS[self.method]}{start}", *took])


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel as drawn, and the numbers to read beside it: (key of the line or none, what, its first and last value)."""

    head: str
    label: str
    picture: str
    numbers: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Section:
    """Everything that the page says of trainings."""

    cards: Sequence[tuple[Training, Sequence[Chart]]]
    unshared: Sequence[str]
    left_out: Sequence[str]
    without: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Row]
    held_heads: Sequence[str]
    held_rows: Sequence[Row]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no such file, or where another trainer means another thing by it."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
    return lines if all(isinstance(line, dict) for line in lines) else []


def section(scores: Mapping[str, Any], trainings: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """What to say of `trainings`: candidate -> {"measurements", "metrics"}; None where nothing was trained."""
    found = [
        Training(entry["name"], entry["kind"], entry["made_from"], given["measurements"], panels(given["metrics"]))
        for entry in by_kind(scores["candidates"])
        if (given := trainings.get(entry["name"])) is not None
    ]
    if not found:
        return None
    drawn = [training for training in found if training.panels]
    told_of = sorted(drawn, key=lambda training: not marks(scores, training.name))  # what the answer speaks of, first
    left_out = told_of[MOST_CHARTS:]
    shown = sorted(
        (training for training in drawn if training not in left_out), key=lambda training: training.method != "sft"
    )
    spans = _spans(shown)
    cards = [(training, [_chart(training, panel, spans) for panel in training.panels]) for training in shown]
    return Section(
        cards=cards,
        unshared=[f"{METHODS[method]}, {measure.head.lower()}" for (method, measure), span in spans.items() if not span],
        left_out=[training.name for training in left_out],
        without=[training.name for training in found if not training.panels],
        **_table(found),
        **_held_table(found),
    )  # fmt: skip


def panels(metrics: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels that there are numbers for; what is no finite number, or has no step, is passed over."""
    rows = [row for row in metrics if _finite(row.get("step"))]
    found = []
    for measure in MEASURES:
        trained = {row["step"]: row[measure.key] for row in rows if _finite(row.get(measure.key))}
        held: dict[str, dict[float, float]] = defaultdict(dict)
        for row in rows:
            for code, value in _held(row, measure):
                held[code][row["step"]] = value
        if trained:
            by_language = {code: sorted(held[code].items()) for code in sorted(held)}
            found.append(Panel(measure, sorted(trained.items()), by_language))
    return found


def _held(row: Mapping[str, Any], measure: Measure) -> Iterator[tuple[str, float]]:
    held = row.get("held_out")
    for code, told in held.items() if isinstance(held, Mapping) else ():
        value = told.get(measure.held_key) if isinstance(told, Mapping) else None
        if _finite(value):
            yield code, value


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spans(shown: Iterable[Training]) -> dict[tuple[str, Measure], tuple[float, float] | None]:
    """The y axis that all charts of one method and measure share, or None where each has its own."""
    own: dict[tuple[str, Measure], list[tuple[float, float]]] = defaultdict(list)
    for training in shown:
        for panel in training.panels:
            own[training.method, panel.measure].append(limits(panel.lines()))
    return {key: shared_limits(spans) for key, spans in own.items()}


def _chart(training: Training, panel: Panel, spans: Mapping[tuple[str, Measure], tuple[float, float] | None]) -> Chart:
    from markupsafe import Markup

    lines, measure = panel.lines(), panel.measure
    span = spans[training.method, measure] or limits(lines)
    last = max(step for line in lines for step, _ in line.points)
    picture = curve_chart(lines, limits=span, steps=last, height=measure.height, zero=measure.better == "higher")
    numbers = [("trained", "In training", from_to(ends(panel.trained)))]
    if panel.mean:
        among = f", mean of {len(panel.held_out)}" if panel.worst else f", {language(next(iter(panel.held_out)))}"
        numbers.append(("held", f"Held out{among}", from_to((panel.mean[0][1], panel.mean[-1][1]))))
    if panel.worst is not None:
        points = panel.held_out[panel.worst]
        numbers.append(("worst", f"Worst: {language(panel.worst)}", from_to((points[0][1], points[-1][1]))))
    if panel.wrong:
        names = [language(code) for code in panel.wrong]
        numbers.append(("", measure.wrong_way, listed(names if len(names) < 4 else panel.wrong)))
    for head, codes in training.apart:
        numbers.append(("", head, listed([language(code) for code in codes] if len(codes) < 4 else codes)))
    return Chart(measure.head, f"{measure.head} of {training.name} over its steps", Markup(picture), numbers)


def ends(points: Points) -> tuple[float, float]:
    """Means over the first and the last fifth of the steps, as a record has them.

    >>> ends([(1, 4.0), (2, 3.0), (3, 1.0)])
    (4.0, 1.0)
    """
    fifth = -(-len(points) // 5)
    return sum(value for _, value in points[:fifth]) / fifth, sum(value for _, value in points[-fifth:]) / fifth


def nats(value: float) -> str:
    """A loss or margin; small ones keep a digit.

    >>> nats(0.6931), nats(-0.0), nats(0.00004), nats(1234.5)
    ('0.693', '0', '4e-05', '1234.5')
    """
    if value == 0:
        return "0"
    return f"{value:.1g}" if abs(value) < 0.0005 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def from_to(pair: tuple[float, float]) -> str:
    """The first and the last value."""
    return f"{nats(pair[0])} → {nats(pair[1])}"


def _table(found: Sequence[Training]) -> dict[str, Any]:
    """What each training took and how its loss ended; columns that no training has a number for are left out."""
    columns: dict[str, list[str]] = {"Method": [METHODS[training.method] for training in found]}
    for head, key in (("Rows", "rows"), ("Steps", "steps"), ("Tokens", "tokens")):
        columns[head] = [_counted(training.measured.get(key)) for training in found]
    columns["Seconds"] = [_counted(training.measured.get("seconds"), short=True) for training in found]
    columns["Tokens/s"] = [_counted(training.measured.get("tokens_per_second")) for training in found]
    for measure in MEASURES:
        trained = [next((p.trained for p in training.panels if p.measure == measure), None) for training in found]
        columns[measure.head] = [NONE if points is None else from_to(ends(points)) for points in trained]
    for head, key in (("Rows cut", "truncated_rows"), ("Rows dropped", "dropped_rows")):
        columns[head] = [_counted(training.measured.get(key)) for training in found]
    columns = {head: values for head, values in columns.items() if set(values) != {NONE}}
    rows = zip(found, zip(*columns.values(), strict=True), strict=True)
    return {"heads": list(columns), "rows": [_row(training, [Cell(v) for v in values]) for training, values in rows]}


def _held_table(found: Sequence[Training]) -> dict[str, Any]:
    """The held-out loss of each language before and after, of the trainings that held rows out."""
    losses = [(t, panel) for t in found for panel in t.panels if panel.measure == MEASURES[0] and panel.held_out]
    codes = sorted({code for _, panel in losses for code in panel.held_out})
    rows = []
    for training, panel in losses:
        cells = [Cell(from_to((panel.mean[0][1], panel.mean[-1][1])) if panel.mean else NONE)]
        for code in codes:
            points = panel.held_out.get(code)
            notes = ["worst"] * (code == panel.worst) + ["rose"] * (code in panel.wrong)
            both = from_to((points[0][1], points[-1][1])) if points else NONE
            cells.append(Cell(both, note=", ".join(notes)))
        rows.append(_row(training, cells))
    return {"held_heads": ["Mean", *(language(code) for code in codes)], "held_rows": rows}


def _row(training: Training, cells: Sequence[Cell]) -> Row:
    return Row(training.name, training.kind, training.made_from, [], cells)


def _counted(value: Any, *, short: bool = False) -> str:
    if not _finite(value):
        return NONE
    return f"{value:.1f}" if short and value < 100 else count(value)
