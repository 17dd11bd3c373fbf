"""The table that a terminal shows while a study runs: what runs, how far it is, what is left, and a line for the whole.

It is drawn anew from the state a few times a second; the state changes with events only, and has no process, store or
console in it. A narrow terminal gets fewer columns and shorter names; many steps are counted after the first ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mixmerge.amounts import clock, duration
from mixmerge.plan.graph import Step, longest_chains
from mixmerge.terminal import visible

MOST = 12  # running steps that have a line of their own
WIDE, NARROW = 72, 50  # columns from which all is shown, and below which the remaining time is left out
BESIDE = 3  # lines of the table that are no step: heads, how many more, the study


@dataclass(slots=True)
class Row:
    """A step at work: when it began, and how far it is; `first`: when it told so first, and how far it was then."""

    step: Step
    began: float
    gpus: Sequence[str] = ()
    done: int = 0
    total: int = 0
    first: tuple[float, int] | None = None

    def advance(self, now: float, done: int, total: int) -> None:
        self.first = self.first or (now, done)
        self.done, self.total = done, total

    def left(self, now: float, expected: float | None) -> float | None:
        """Seconds to go: at the pace it has shown, else what is left of the time it was expected to take, 0 once it is over."""
        if self.first is not None and self.total > 0:
            since, before = self.first
            if self.done > before and now > since:
                return (now - since) * (self.total - self.done) / (self.done - before)
        return None if expected is None else max(0.0, expected - (now - self.began))


@dataclass(slots=True)
class Board:
    """How far a run is. `todo`: steps not done; `seconds`: what they are expected to take; `jobs`: processes at once."""

    clock: Callable[[], float] = time.monotonic
    study: str = ""
    total: int = 0
    finished: int = 0
    failed: int = 0
    jobs: int = 1
    began: float = 0.0
    todo: dict[str, Step] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    waiting: dict[str, Step] = field(default_factory=dict)

    def begin(
        self, study: str, *, total: int, todo: Sequence[Step], seconds: Mapping[str, float], jobs: int | None
    ) -> None:
        """Of so many steps that are wanted, these are left to run."""
        self.study, self.total, self.finished = study, total, total - len(todo)
        self.todo, self.seconds, self.jobs = {step.id: step for step in todo}, seconds, jobs or 1
        self.began = self.clock()

    def take(self, step: Step, event: Mapping[str, Any]) -> None:
        """Change with an event of a step."""
        kind = event["event"]
        if kind == "start":
            self.waiting.pop(step.id, None)
            self.rows[step.id] = Row(step, self.clock(), tuple(map(str, event.get("gpus") or ())))
        elif kind == "progress" and (row := self.rows.get(step.id)) is not None:
            row.advance(self.clock(), event["done"], event["total"])
        elif kind == "waiting":
            self.waiting[step.id] = step
        elif kind in ("done", "failed", "skipped"):
            self.rows.pop(step.id, None)
            self.waiting.pop(step.id, None)
            self.finished += kind == "done"
            self.failed += kind == "failed"
            if kind != "skipped":
                self.todo.pop(step.id, None)

    def left(self) -> tuple[float, bool] | None:
        """Seconds until the study ends, and whether all that is left is known; None where nothing is.

        No less than the longest chain of what is left, and than all of it shared out to as many processes as may run.
        """
        now, steps, known = self.clock(), list(self.todo.values()), {}
        for step in steps:
            row, expected = self.rows.get(step.id), self.seconds.get(step.id)
            left = expected if row is None else row.left(now, expected)
            if left is not None:
                known[step.id] = left
        if not known:
            return None
        chain = max(longest_chains(steps, lambda step: known.get(step.id, 0.0)).values(), default=0.0)
        return max(chain, sum(known.values()) / self.jobs), len(known) == len(steps)

    def line(self) -> str:
        """The study in a line."""
        told = [f"{self.finished}/{self.total} done"]
        told += [f"{self.failed} failed"] * bool(self.failed)
        told.append(clock(self.clock() - self.began))
        if (left := self.left()) is not None:
            seconds, whole = left
            told.append(f"{'about' if whole else 'more than'} {duration(max(1.0, seconds))} left")
        return f"{visible(self.study)}: " + ", ".join(told)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now, rows = self.clock(), list(self.rows.values())
        width, room = options.max_width, max(1, console.height - BESIDE - 2)
        shown = rows[: min(MOST, room)]
        if shown:
            yield self._table(shown, now, width)
        if len(rows) > len(shown):
            yield _line(f"and {len(rows) - len(shown)} more", "dim")
        if self.waiting:
            titles = ", ".join(visible(step.title) for step in list(self.waiting.values()))
            yield _line(f"another runner is at {titles}", "yellow")
        yield _line(self.line(), "bold red" if self.failed else "bold")

    def _table(self, rows: Sequence[Row], now: float, width: int) -> Table:
        gpus = width >= WIDE and any(row.gpus for row in rows)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="dim")
        table.add_column("running", ratio=1, no_wrap=True, overflow="ellipsis")
        for name in ("done", "for", *["left"] * (width >= NARROW), *["GPU"] * gpus):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            left = row.left(now, self.seconds.get(row.step.id))
            cells = [visible(row.step.title), _share(row, width), clock(now - row.began)]
            cells += [duration(left) if left else ""] * (width >= NARROW)
            cells += [",".join(row.gpus)] * gpus
            table.add_row(*(Text(cell) for cell in cells))
        return table


def _share(row: Row, width: int) -> str:
    """How far a step is: of how many, where there is room."""
    if row.total <= 0:
        return ""
    share = f"{100 * row.done // row.total} %"
    return f"{row.done}/{row.total}  {share:>5}" if width >= WIDE else share


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
