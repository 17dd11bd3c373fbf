"""What a person sees while a study runs: a live table on a terminal, plain lines elsewhere. Everything goes to stderr.

What is finished, failed or to be known is a line in both, above the table. Names and errors may hold what others wrote, so
they are shown as plain text without control characters. Where nobody reads any more, the study goes on in silence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mixmerge.data.account import Account
from mixmerge.plan.graph import Step
from mixmerge.run.live import Board
from mixmerge.terminal import visible

if TYPE_CHECKING:
    from mixmerge.run.runner import Outcome

PLAIN_EVERY_S = 15.0
REFRESHED_A_SECOND = 2
LONG = ("base", "train", "harness")  # kinds whose start is told where there is no table


class _Stderr(Console):
    """A console whose reader may go away."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class Progress:
    """Shows the events of one run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Stderr(stderr=True, highlight=False)
        # a colour that is forced is no terminal whose cursor can be moved
        self.live = self.console.is_interactive and (console is not None or self.console.file.isatty())
        self.board = Board()
        self._table: Live | None = None
        self.spoken = 0.0

    def begin(
        self,
        study: str,
        *,
        total: int,
        todo: Sequence[Step],
        seconds: Mapping[str, float] | None = None,
        jobs: int | None = None,
    ) -> None:
        """Of so many steps that are wanted, these are left to run; `seconds`: what they are expected to take, by id."""
        self.board.begin(study, total=total, todo=todo, seconds=seconds or {}, jobs=jobs)
        self._say(f"{study}: {total} step{'s' * (total != 1)}, {self.board.finished} already there, {len(todo)} to run")
        if self.live and todo:
            self._table = Live(
                console=self.console,
                transient=True,
                redirect_stdout=False,
                refresh_per_second=REFRESHED_A_SECOND,
                get_renderable=lambda: self.board,
                vertical_overflow="crop",
            )
            self._table.start()

    def damaged(self, step: Step, damage: str) -> None:
        """A step that was finished once is made again."""
        self._say(f"damaged, made again: {step.title}: {damage}")

    def removal(self, who: str) -> None:
        """The run begins once a removal is over."""
        self._say(f"waiting for `mixmerge gc` or `verify --mend` to end, which removes from this store ({who})")

    def take(self, step: Step, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        self.board.take(step, event)
        if kind == "start":
            if self._table is None and step.kind in LONG:
                self._say(f"{self._count()} {step.title} ...")
        elif kind == "progress":
            if self._table is None and time.monotonic() - self.spoken > PLAIN_EVERY_S:
                self._say(f"{self._count()} {step.title}: {event['done']}/{event['total']}")
        elif kind == "waiting":
            self._say(f"{self._count()} {step.title}: another runner is at it, waiting")
        elif kind == "note":
            self._say(f"{self._count()} {step.title}: {event['text']}")
        elif kind == "done":
            how = f"made by {event['by']}" if "by" in event else f"{event['seconds']:.1f} s{_remark(step, event)}"
            self._say(f"{self._count()} {step.title}  {how}")
        elif kind == "failed":
            self._say(f"{self._count()} {step.title}  FAILED: {event['error']}")

    def end(self, outcome: Outcome) -> None:
        self.stop()

    def stopping(self) -> None:
        """Steps are being ended before the run ends."""
        self._say("stopping; what is finished is kept (once more: at once)")

    def stop(self) -> None:
        """Leave the terminal as it was, also after an interruption."""
        table, self._table = self._table, None
        if table is not None:
            try:
                table.stop()
            except OSError:
                self._nobody_reads()

    def _count(self) -> str:
        width = len(str(self.board.total))
        return f"[{self.board.finished:>{width}}/{self.board.total}]"

    def _say(self, text: str) -> None:
        self.spoken = time.monotonic()
        try:
            self.console.print(Text(visible(text, keep="\n")), soft_wrap=True)
        except OSError:
            self._nobody_reads()

    def _nobody_reads(self) -> None:
        """The terminal or the program behind the pipe is gone; nothing is said any more."""
        self.console.quiet = True


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
