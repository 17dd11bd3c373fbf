"""The process between us and a server: `python -m mixmerge.evaluate.keeper GRACE PROGRAM ARGUMENT...`.

It starts the program in a process group of its own and holds it for as long as its own standard input stays open. The
other end of that pipe is held by the process that asked for the server, so that the group ends with it, however it ends.
Ending is SIGTERM, and SIGKILL after GRACE seconds; whatever the program leaves in its group goes with it.
Nothing but the standard library is imported: it has to be there before the server is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

PR_SET_PDEATHSIG = 1  # prctl(2), Linux
NOT_FOUND = 127  # as a shell says


def main(argv: list[str]) -> int:
    """Run the program until it ends or standard input does; gives its exit status, 128 + signal where one ended it."""
    grace, *command = argv
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_me())
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return NOT_FOUND
    ended = threading.Event()
    threading.Thread(target=_hold, args=(server.pid, float(grace), ended), daemon=True).start()
    # closing its own input wakes no reader, so a signal ends the group as the pipe does
    signal.signal(
        signal.SIGTERM, lambda *_: threading.Thread(target=_end, args=(server.pid, float(grace), ended)).start()
    )
    status = server.wait()
    ended.set()
    _signal(server.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _hold(group: int, grace: float, ended: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    _end(group, grace, ended)


def _end(group: int, grace: float, ended: threading.Event) -> None:
    _signal(group, signal.SIGTERM)
    if not ended.wait(grace):
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _die_with_me() -> Callable[[], object] | None:
    """What the program does first, on Linux: ask the kernel to be killed where its keeper is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
