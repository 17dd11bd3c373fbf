"""One of the machines that train a model together: `python -m mixmerge.train.node SPEC`, which `how.launcher` runs on each.

Which one it is it finds out by itself, whatever the launcher: the first to make the folder of a number in the meeting
folder, which all machines see, has that number. It starts its processes and passes on what they say; once the meeting
folder is gone or nobody touches its file any more, so is the training, and it ends them.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from mixmerge.events import take_stdout
from mixmerge.train.team import Event, ranks, running

LOOK_S = 1.0  # how often to look for the file
LOST_S = 120.0  # untouched for so long: a network's file system may show a change a minute late


def main(argv: list[str]) -> int:
    """Train as the file SPEC says, as the next machine of its training."""
    spec = Path(argv[0])
    told = json.loads(spec.read_text(encoding="utf-8"))
    emit = take_stdout()
    number = _claim(Path(told["meeting"]), told["devices"]["nodes"])
    if number is None:
        what = f"the launcher ran the command more than {told['devices']['nodes']} times"
        do = f"have it run the command once on each of how.nodes: {told['devices']['nodes']}"
        emit("failed", rank=None, kind="UserError", lost=False, what=what, where="how.launcher", do=do)
        return 2
    queue: Queue[Event] = Queue()
    statuses: list[int] = []
    beat = _Beat(spec)
    with suppress(BrokenPipeError), running(ranks(spec, number, queue)):
        while len(statuses) < told["devices"]["processes"] and beat.heard():
            try:
                event = queue.get(timeout=LOOK_S)
            except Empty:
                continue
            emit(**event)
            if event["event"] == "exit":
                statuses.append(event["status"])
    return 0 if statuses == [0] * told["devices"]["processes"] else 1


class _Beat:
    """Whether the one that heads the training is still there: it touches a file, whose times are compared with each other only."""

    def __init__(self, file: Path) -> None:
        self.file, self.last, self.since = file, -1, time.monotonic()

    def heard(self) -> bool:
        """Look, and say so."""
        try:
            found = self.file.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if found != self.last:
            self.last, self.since = found, time.monotonic()
        return time.monotonic() - self.since < LOST_S


def _claim(meeting: Path, nodes: int) -> int | None:
    """The first number that no other machine has; None where all are taken."""
    for number in range(nodes):
        with suppress(FileExistsError):
            (meeting / f"node-{number}").mkdir()
            return number
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
