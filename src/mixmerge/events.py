"""Events from a process to the one that started it: JSON lines on its standard output, and nothing else there.

Shared by `run/` (a worker and its runner) and `train/` (the processes of a training and the one that hears them).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Emit = Callable[..., None]


def take_stdout() -> Emit:
    """Keep the real standard output for events, and send everything else that is printed to standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: str, **data: Any) -> None:
        with lock:
            events.write(json.dumps({"event": event, **data}, ensure_ascii=False) + "\n")
            events.flush()

    return emit


def read_events(stream: Iterable[str], beside: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """The events that a process wrote; one that is killed may leave half a line, which is none.

    Of a process that takes its standard output nothing else comes; where others may write to it, `beside` gets what is
    no event.
    """
    for line in stream:
        try:
            event = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            if beside is None:
                raise
            event = None
        if isinstance(event, dict) and "event" in event:
            yield event
        elif beside is not None:
            beside(line)
        elif event is not None:
            raise ValueError(f"no event: {line[:80]!r}")
