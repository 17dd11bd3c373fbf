"""Servers that mixmerge starts for a candidate: a command, a free loopback port, ready when it answers, gone with the step.

The command is a template of words, run without a shell: `vllm serve {model} --port {port} --host 127.0.0.1`. Every replica
is held by a keeper process (`mixmerge.keeper`), which ends the server and all that it has started when this process ends, also
when it is killed. A server is ready when its own process tree listens on its port and answers; one that dies first is an error with
its last words, except where another program took its port in between: that is tried again on another port.
"""

from __future__ import annotations

import http.client
import os
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mixmerge.errors import MixmergeError, StepError, UserError, did_you_mean
from mixmerge.machine import named_gpus

HOST = "127.0.0.1"
FIELDS = ("model", "port", "host", "threads")
NEEDED = ("model", "port")
GRACE_S = 20.0  # from SIGTERM to SIGKILL
PORTS = 5  # tried, where other programs take them
LOOK_S = 0.1
LOOK_BACK_S = 1.0
PROBE_S = 10.0
LAST_LINES, LAST_CHARACTERS = 4, 600


@dataclass(slots=True)
class Server:
    """One replica: its keeper process, its port, and the log that it writes."""

    keeper: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Where the OpenAI-compatible API starts."""
        return f"http://{HOST}:{self.port}/v1"

    def died(self) -> StepError | None:
        """Why it is not running any more, with its last words; None: it runs."""
        status = self.keeper.poll()
        if status is None:
            return None
        number = -status if status < 0 else status - 128  # of the keeper itself, or of the server by way of it
        how = f"by signal {number}" if number > 0 else f"with status {status}"
        return StepError(f"the server ended {how}: {_last_words(self.log)}", where=str(self.log), do="see its log")

    def stop(self) -> None:
        """End it and wait until all that it has started is gone."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait()


def check_command(command: str) -> list[str]:
    """The words of a command template; `{model}` and `{port}` have to stand in it, `{host}` and `{threads}` may.

    Raises:
        UserError: quotes that do not close, another `{name}`, one missing, or no such program.
    """
    try:
        words = shlex.split(command)
        found = {name for word in words for _, name, *_ in string.Formatter().parse(word) if name is not None}
    except ValueError as error:
        what = f"the server's command cannot be read: {str(error).lower()}"
        raise UserError(what, do="double braces that mean themselves") from error
    for name in sorted(found - {*FIELDS}):
        raise UserError(f"the server's command has an unknown {{{name}}}", do=did_you_mean(name, FIELDS))
    for name in NEEDED:
        if name not in found:
            raise UserError(
                f"the server's command does not use {{{name}}}", do="it has to say what it serves, and where"
            )
    if shutil.which(words[0]) is None:
        raise UserError(f"no program {words[0]!r}", do="install it, or give its path")
    return words


@contextmanager
def serving(
    command: str,
    model: Path,
    *,
    log: Path,
    replicas: int = 1,
    threads: int = 1,
    devices: Sequence[str] | None = None,
    ready_seconds: float = 900.0,
    grace_seconds: float = GRACE_S,
) -> Iterator[list[str]]:
    """Start `replicas` servers of `model` with `command`; gives their URLs when all are ready, and stops them at the end.

    What they print is appended to `log`, of the second and later to `log` with their number. `devices` (default: the GPUs
    that this process may use) are split evenly among the replicas by CUDA_VISIBLE_DEVICES, `threads` likewise by
    OMP_NUM_THREADS and `{threads}`. An error of ours while a server is dead is told as that server's death.

    Raises:
        UserError: a command that cannot be run (see `check_command`), or fewer devices than replicas.
        StepError: a server ended, or was not ready within `ready_seconds`; its last lines are in the message.
    """
    words = check_command(command)
    if replicas < 1:
        raise ValueError(f"replicas {replicas} is not positive")
    shares = _shares(visible_devices() if devices is None else devices, replicas)
    each = max(1, threads // replicas)
    servers: list[Server] = []
    until = time.monotonic() + ready_seconds
    try:
        for number in range(replicas):
            place = log if number == 0 else log.with_name(f"{log.stem}.{number}{log.suffix}")
            servers.append(_start(words, model, place, each, shares[number], grace_seconds))
        for number in range(replicas):
            for attempt in range(PORTS):
                server = servers[number]
                if _wait(server, until, ready_seconds, last=attempt + 1 == PORTS):
                    break
                server.stop()
                servers[number] = _start(words, model, server.log, each, shares[number], grace_seconds)
        try:
            yield [server.url for server in servers]
        except MixmergeError as error:
            until = time.monotonic() + LOOK_BACK_S  # a connection is lost before its server is seen to be dead
            for server in servers:
                with suppress(subprocess.TimeoutExpired):
                    server.keeper.wait(max(0.0, until - time.monotonic()))
                if (death := server.died()) is not None:
                    raise death from error
            raise
    finally:
        for server in servers:
            assert server.keeper.stdin is not None
            server.keeper.stdin.close()  # all of them at once: each may take its grace
        for server in servers:
            server.stop()


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := named_gpus()) is not None:
        return named
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _shares(devices: Sequence[str], replicas: int) -> list[list[str]]:
    """As many devices to each replica; those that do not divide are left idle, for a server may need them to be equal."""
    if not devices:
        return [[] for _ in range(replicas)]
    each = len(devices) // replicas
    if each == 0:
        raise UserError(f"{replicas} servers on {len(devices)} GPUs", do="ask for at most one server a GPU")
    return [list(devices[number * each : (number + 1) * each]) for number in range(replicas)]


def _start(words: Sequence[str], model: Path, log: Path, threads: int, devices: Sequence[str], grace: float) -> Server:
    port = _free_port()
    values = {"model": str(model), "port": str(port), "host": HOST, "threads": str(threads)}
    command = [word.format_map(values) for word in words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        keeper = subprocess.Popen(
            [sys.executable, "-m", "mixmerge.keeper", str(grace), *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=_environment(threads, devices),
            start_new_session=True,  # a Ctrl-C in the terminal is for us; the server goes when we do
        )
    return Server(keeper, port, log)


def _environment(threads: int, devices: Sequence[str]) -> Mapping[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _wait(server: Server, until: float, allowed: float, *, last: bool) -> bool:
    """Wait until the server is ready; False: another program holds its port, and there may be another try.

    Raises:
        StepError: it ended, or `until` has passed.
    """
    while True:
        ours, others = _listeners(server)
        if (death := server.died()) is not None:
            # another program's socket says that the port was lost, whatever words the server has for it
            if not last and (others or _taken(server.port)):
                return False
            raise death
        if others and not ours:
            if last:
                raise StepError(f"other programs took {PORTS} ports in turn", where=str(server.log), do="run it again")
            return False
        if ours and _answers(server.port):
            return True
        if time.monotonic() > until:
            raise StepError(
                f"the server is not ready after {allowed:.0f} s: {_last_words(server.log)}",
                where=str(server.log),
                do="see its log, or allow it more time",
            )
        time.sleep(LOOK_S)


def _listeners(server: Server) -> tuple[bool, bool]:
    """Whether the server's process tree listens on its port, and whether some other process does."""
    taken = _taken(server.port)  # looked at first: the server may come to listen at any moment
    ours = False
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server.keeper.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = ours or any(
                    found.status == psutil.CONN_LISTEN and found.laddr.port == server.port
                    for found in process.net_connections(kind="tcp")
                )
    return ours, taken and not ours


def _taken(port: int) -> bool:
    """Whether something listens; asked by a connection, for binding the port could take it from the server."""
    with socket.socket() as trial:
        trial.settimeout(PROBE_S)
        return trial.connect_ex((HOST, port)) == 0


def _answers(port: int) -> bool:
    """Whether the server says that it is ready: 200 from /health, or from /v1/models where it has no /health."""
    status = _status(port, "/health")
    return status == 200 or (status in (404, 405, 501) and _status(port, "/v1/models") == 200)


def _status(port: int, path: str) -> int | None:
    # not urllib: a proxy in the environment is not for loopback
    connection = http.client.HTTPConnection(HOST, port, timeout=PROBE_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _last_words(log: Path) -> str:
    """The last lines of a log, on one line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 14)))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = " | ".join(line for line in lines[-LAST_LINES:] if not line.startswith("$ "))
    return said[-LAST_CHARACTERS:] or "it said nothing"
