"""The process between us and a program that is to end with us: `python -m mixmerge.keeper GRACE PROGRAM ARGUMENT...`.

It starts the program, a server or a training, in a session of its own and holds it for as long as its own standard input stays
open. The other end of that pipe is held by the process that asked for the program, so that all of it ends with that process,
however it ends. All of it is the program, what it has started and what these have, also in other sessions: on Linux whoever
loses its parent becomes a child of the keeper, so none gets out of its sight. Ending is SIGTERM, and SIGKILL for what is left
after GRACE seconds; what the program leaves behind when it ends by itself is killed at once.
Nothing but the standard library is imported: it has to be there before the program is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2), Linux
NOT_FOUND = 127  # as a shell says
LINUX = sys.platform.startswith("linux")
LOOK_S = 0.02


def main(argv: list[str]) -> int:
    """Run the program until it ends or standard input does; gives its exit status, 128 + signal where one ended it."""
    grace, *command = argv
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=ends_with_us(signal.SIGKILL)
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return NOT_FOUND
    keeper = _Keeper(program.pid, float(grace))
    threading.Thread(target=keeper.hold, daemon=True).start()
    # closing its own input wakes no reader, so a signal ends the program as the pipe does
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=keeper.end).start())
    status = keeper.wait()
    keeper.end_the_rest()
    return status if status >= 0 else 128 - status


class _Keeper:
    """Holds one program and all that has come of it."""

    def __init__(self, pid: int, grace: float) -> None:
        self.pid, self.grace = pid, grace
        self.ended = threading.Event()
        self.until = 0.0  # when the patience is over with those that were asked to end

    def hold(self) -> None:
        while os.read(0, 4096):
            pass
        self.end()

    def end(self) -> None:
        self.until = time.monotonic() + self.grace
        self._signal(signal.SIGTERM)
        if not self.ended.wait(self.grace):
            self._signal(signal.SIGKILL)

    def wait(self) -> int:
        """How the program itself ended; who came to us as an orphan is buried on the way."""
        pid = status = 0
        while pid != self.pid:
            pid, status = os.waitpid(-1, 0)
        self.ended.set()
        return os.waitstatus_to_exitcode(status)

    def end_the_rest(self) -> None:
        """Leave nothing: by now the program itself is over."""
        while _family() and time.monotonic() < self.until:
            time.sleep(LOOK_S)
        while self._signal(signal.SIGKILL):  # until no new one was started meanwhile
            time.sleep(LOOK_S)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _signal(self, number: int) -> bool:
        """Send a signal to everyone; whether there is someone who is to take it."""
        if not LINUX:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            return False
        sent = False
        for pid in _family():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
                sent = True
        return sent


def _family() -> list[int]:
    """All that descend from this process and are not over, by what Linux tells."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat") if LINUX else ():
        with suppress(OSError):
            state, parent = stat.read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children[int(parent)].append(int(stat.parent.name))
    found = children[os.getpid()]
    for pid in found:  # it grows on the way
        found += children[pid]
    return found


def ends_with_us(number: signal.Signals) -> Callable[[], None] | None:
    """What a child does first, on Linux: ask the kernel for this signal when we are gone, and end where we are already."""
    if not LINUX:
        return None
    prctl, we = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != we:
            os._exit(1)

    return ask


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
