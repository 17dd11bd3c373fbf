"""What a person sees while a study runs: a live bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from mixmerge.data.account import Account
from mixmerge.plan.graph import Step

if TYPE_CHECKING:
    from mixmerge.run.runner import Outcome

PLAIN_EVERY_S = 15.0


class Progress:
    """Shows the events of one run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.total = self.finished = 0
        self.spoken = 0.0

    def begin(self, study: str, *, total: int, left: int) -> None:
        """Of so many steps that are wanted, so many are left to run."""
        self.total, self.finished = total, total - left
        self._say(f"{study}: {total} steps, {self.finished} already there, {left} to run")
        self.bars.start()
        self.tasks[""] = self.bars.add_task("study", total=self.total, completed=self.finished)

    def damaged(self, step: Step, damage: str) -> None:
        """A step that was finished once is made again."""
        self._say(f"damaged, made again: {step.title}: {damage}")

    def take(self, step: Step, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self.tasks[step.id] = self.bars.add_task(escape(step.title), total=None)
            if not self.live and step.kind in ("base", "train"):
                self._say(f"{self._count()} {step.title} ...")
        elif kind == "progress":
            self.bars.update(self.tasks[step.id], completed=event["done"], total=event["total"])
            if not self.live and time.monotonic() - self.spoken > PLAIN_EVERY_S:
                self._say(f"{self._count()} {step.title}: {event['done']}/{event['total']}")
        elif kind == "waiting":
            self._say(f"{self._count()} {step.title}: another runner is at it, waiting")
        elif kind == "note":
            self._say(f"{self._count()} {step.title}: {event['text']}")
        elif kind in ("done", "failed"):
            if step.id in self.tasks:
                self.bars.remove_task(self.tasks.pop(step.id))
            if kind == "done":
                self.finished += 1
                self.bars.update(self.tasks[""], completed=self.finished)
                self._say(f"{self._count()} {step.title}  {event['seconds']:.1f} s{_remark(step, event)}")
            else:
                self._say(f"{self._count()} {step.title}  FAILED: {event['error']}")

    def end(self, outcome: Outcome) -> None:
        self.bars.stop()

    def stopping(self) -> None:
        """Steps are being ended before the run ends."""
        self._say("stopping; what is finished is kept (once more: at once)")

    def stop(self) -> None:
        """Leave the terminal as it was, also after an interruption."""
        self.bars.stop()

    def _count(self) -> str:
        width = len(str(self.total))
        return f"[{self.finished:>{width}}/{self.total}]"

    def _say(self, text: str) -> None:
        self.spoken = time.monotonic()
        self.console.print(escape(text), soft_wrap=True)


def _remark(step: Step, event: Mapping[str, Any]) -> str:
    """The one or two measurements of a step that tell whether it went well."""
    found = event.get("measurements") or {}
    parts: list[str] = []
    if step.kind == "mixture" and "rows" in found:
        parts = [f"{found['rows']} rows", f"{found['tokens']} tokens"]
        if lost := sum(Account.from_json(account).lost_rows for account in found.get("data", {}).values()):
            parts.append(f"{lost} bad row{'s' * (lost > 1)} of its data left out")
    elif step.kind == "train" and "last_loss" in found:
        parts = [f"loss {found['first_loss']:.2f} -> {found['last_loss']:.2f}", f"{found['steps']} steps"]
    elif step.kind == "generate" and "rows" in found:
        parts = [f"{found['rows']} responses", f"{found['truncated']} truncated"]
    elif step.kind == "base" and "parameters" in found:
        parts = [f"{found['parameters'] / 1e6:.0f} M parameters"]
    return f"  ({', '.join(parts)})" if parts else ""
