"""The runner's end of the fork server: processes that begin with the libraries loaded.

Importing torch, transformers and TRL takes longer than many a step, and so does taking them down.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from mixmerge.keeper import ends_with_us

SIZE = struct.Struct("<Q")
# A driver of an accelerator does not survive a fork, and libraries ask it as they are imported
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/accel")


class Request(NamedTuple):
    """A process that is wanted: its words, the kinds of its steps, the file for its output, the pipe for its events."""

    argv: list[str]
    kinds: list[str]
    log: str
    events: int


class Forked:
    """A process of the server, to be waited for like a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: Future[int] = Future()

    def poll(self) -> int | None:
        return self.code.result() if self.code.done() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        try:
            return self.code.result(timeout)
        except FutureTimeout:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None


class ForkServer:
    """The runner's end. The server is killed with the thread that made it, also while it imports, which takes seconds.

    What it forked ends with this process: it follows a pipe that closes then.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "mixmerge.run.fork_server", str(theirs.fileno())]
        with theirs, log.open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=ends_with_us(signal.SIGKILL),
            )
        self._born: SimpleQueue[Forked | None] = SimpleQueue()
        self._alive: dict[int, Forked] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, request: Request) -> Forked | None:
        """A new process, or None where the server is gone; `request.events` stays the caller's to close.

        Interrupted meanwhile, the server is ended at once: it may import for long before it reads or tells anything more,
        also how a process ended that is waited for.
        """
        try:
            send(self._socket, request)
            return self._born.get()
        except OSError:
            return None
        except BaseException:
            self._process.kill()
            raise

    def close(self) -> None:
        """End the server and what it forked."""
        for pid in list(self._alive):
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._socket.close()

    def _read(self) -> None:
        # a server that is killed before it has read a request resets the connection
        with self._socket.makefile("r", encoding="utf-8") as news, suppress(ConnectionResetError):
            for line in news:
                told = json.loads(line)
                if "code" in told:
                    self._alive.pop(told["pid"]).code.set_result(told["code"])
                else:
                    process = self._alive[told["pid"]] = Forked(told["pid"])
                    self._born.put(process)
        for process in self._alive.values():  # the server was killed, and nobody else can say how these end
            process.code.set_result(-signal.SIGKILL)
        self._born.put(None)


def usable() -> bool:
    """Whether a fork is safe on this machine, and its end can be waited for."""
    if sys.platform != "linux" or any(Path(device).exists() for device in ACCELERATORS):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def send(server: socket.socket, request: Request) -> None:
    """Ask for a process; OSError where the server is gone."""
    words = json.dumps({"argv": request.argv, "kinds": request.kinds, "log": request.log}).encode()
    socket.send_fds(server, [SIZE.pack(len(words))], [request.events])
    server.sendall(words)


def receive(runner: socket.socket) -> Request | None:
    """The next request, at the server's end; None once the runner is gone."""
    head, descriptors, _, _ = socket.recv_fds(runner, SIZE.size, 1)
    if len(head) < SIZE.size:
        return None
    (size,), words = SIZE.unpack(head), b""
    while len(words) < size:
        if not (part := runner.recv(size - len(words))):
            return None
        words += part
    return Request(**json.loads(words), events=descriptors[0])
