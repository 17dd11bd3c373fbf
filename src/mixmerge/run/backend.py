"""What the runner asks of a place where steps run: this machine, a cluster, a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mixmerge.plan.graph import Step

Event = Mapping[str, Any]


class Backend(Protocol):
    """Runs batches of steps, each batch in one process.

    Events are those of a worker (start, progress, waiting, done, failed: `step` is its id) and, at the end of each process,
    `{"event": "exit", "steps": [Step], "code": int}` with a negative code for a signal,
    and `why` where more is known of an end that left steps undone.
    """

    def start(self, batch: Sequence[Step]) -> bool:
        """Start a batch; False while there is no room for it."""

    def next(self) -> Event:
        """The next event, once there is one."""

    @property
    def room(self) -> int:
        """How many more processes it would run at once, at most."""

    @property
    def busy(self) -> bool:
        """Whether a process runs."""

    def stop(self) -> None:
        """End every process: asked first, killed a few seconds later."""

    def kill(self) -> None:
        """Kill every process at once."""

    def close(self) -> None:
        """Let go of what the backend holds; nothing runs any more."""
