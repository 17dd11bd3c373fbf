"""A Ray cluster: joining it quickly or saying why not, what its nodes have, and whether they see the study's folder.

Without an address a cluster of this machine alone is started, and ends with the run. What Ray says goes to a log of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from mixmerge.errors import StepError, UserError, reason
from mixmerge.machine import usable_cores
from mixmerge.run.ray.address import GIVE_TOKEN, QUIET, own_handlers, own_token
from mixmerge.run.ray.task import SIGHT_S, Seen, look

ANSWER_S = 5.0  # of a port
JOIN_S = 40.0  # Ray itself gives up after two minutes
LOOK_S = 90.0  # a node starts a process that imports this package
HEAD_S = 20.0  # without an answer of the head; Ray ends the process after a minute
STORE = 100 << 20  # bytes for objects in shared memory: there are none but events
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
WHERE = "--address"
ALIKE = "put --out on a folder that all nodes see by the same path, and install the same mixmerge on them"


class Node(NamedTuple):
    """A node that is alive and has cores: its id, its address, and what it has; memory in bytes."""

    id: str
    address: str
    cores: int
    gpus: int
    memory: int


class Cluster:
    """A cluster that this process has joined, until `close`."""

    def __init__(self, address: str | None, log: Path) -> None:
        """Join the cluster at `host:port`, at `auto` (one of this machine), at RAY_ADDRESS, or else start one here.

        Raises:
            UserError: Ray is not installed; there is no cluster at that address.
        """
        os.environ.update(QUIET)
        self._ray = ray = imported()
        where = WHERE if address else "RAY_ADDRESS"
        address = address or os.environ.get("RAY_ADDRESS") or None
        _check_address(address, where)
        log.parent.mkdir(parents=True, exist_ok=True)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        self._stack = ExitStack()
        # Ray's listener prints what it hears of dying nodes
        self._stack.enter_context(redirect_stdout(self._stack.enter_context(log.open("a", encoding="utf-8"))))
        if address is None:
            self._stack.enter_context(own_token())
        self.lost = False
        self._stack.callback(self._leave)
        try:
            own = {"num_cpus": usable_cores(), "object_store_memory": STORE, "include_dashboard": False}
            with own_handlers(), _hang_ups_not_for_children():
                ray.init(address=address or "local", **({} if address else own), **quiet)
        except Exception as error:
            self.close()
            do = "give host:port of its head, or leave it out for a cluster of this machine"
            raise UserError(f"no Ray cluster: {reason(error)}", where=where, do=do) from error

        context = ray.get_runtime_context()
        self.address = str(context.gcs_address)  # `host:port`, by which other processes join it
        self._own = str(context.get_node_id())  # what this process asks of the cluster goes through that node

    def check_head(self) -> None:
        """Ask whether the head is there; without it Ray would end this process without a word.

        Raises:
            StepError: it is not.
        """
        until = time.monotonic() + HEAD_S
        while (told := _no_answer(self.address)) is not None:
            if time.monotonic() > until:
                self.lost = True
                do = "start it again, and run the same command again to carry on"
                raise StepError(f"the head of the Ray cluster at {self.address} is gone: {told}", do=do)
            time.sleep(1)

    def nodes(self) -> list[Node]:
        """The nodes that steps can run on now.

        Raises:
            StepError: the head is gone, or the node by which this process is in the cluster.
        """
        self.check_head()
        found = []
        for node in self._ray.nodes():
            has = node["Resources"]
            if node["NodeID"] == self._own and not node["Alive"]:
                what = f"the Ray node {node['NodeManagerAddress']}, by which this run is in the cluster, is gone"
                raise StepError(what, do="start it again, and run the same command again to carry on")
            if node["Alive"] and has.get("CPU", 0) >= 1:
                numbers = int(has["CPU"]), int(has.get("GPU", 0)), int(has.get("memory", 0))
                found.append(Node(node["NodeID"], node["NodeManagerAddress"], *numbers))
        return found

    def check_sight(self, file: Path) -> None:
        """Look from every node at a file of the study's folder.

        Raises:
            UserError: nodes that do not see it, or have another mixmerge.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        mine, nodes = look(file, 0.0), self.nodes()
        task = self._ray.remote(look)
        looks = [
            task.options(num_cpus=0, max_retries=2, scheduling_strategy=On(node.id, soft=False)).remote(
                file, SIGHT_S, mine.digest
            )
            for node in nodes
        ]
        ready, _ = self._ray.wait(looks, num_returns=max(1, len(looks)), timeout=LOOK_S)
        told: dict[str, list[str]] = {}
        for node, sight in zip(nodes, looks, strict=True):
            if (wrong := self._wrong(sight, mine, file.parent) if sight in ready else "does not answer") is not None:
                told.setdefault(wrong, []).append(node.address)
        for wrong, where in told.items():
            raise UserError(wrong, where=_of_nodes(where), do=ALIKE)

    def _wrong(self, sight: Any, mine: Seen, folder: Path) -> str | None:
        try:
            theirs = self._ray.get(sight)
        except self._ray.exceptions.RayTaskError as error:
            return f"cannot run mixmerge ({reason(error.cause)})"
        except self._ray.exceptions.RayError:
            return None  # it died meanwhile: nothing will run on it
        return unlike(theirs, mine, folder)

    def _leave(self) -> None:
        if not self.lost:
            self._ray.shutdown()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._stack.close()


@contextmanager
def _hang_ups_not_for_children() -> Iterator[None]:
    """What is started in the block never hears that the terminal was closed, as Ray has it for Ctrl-C; this process does, after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def imported() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed", where="--backend ray", do="pip install 'mixmerge[ray]'") from error
    return ray


def unlike(theirs: Seen, mine: Seen, folder: Path) -> str | None:
    """How what a node sees differs from what is here, in a few words; `folder`: the study's."""
    if theirs.version != mine.version:
        return f"has mixmerge {theirs.version}, here is {mine.version}"
    return None if theirs.digest == mine.digest else f"does not see the study in {folder}"


def _of_nodes(addresses: list[str]) -> str:
    some = ", ".join(sorted(set(addresses))[:5])
    return f"node{'s' * (len(addresses) > 1)} {some}" + (" and others" if len(set(addresses)) > 5 else "")


def _check_address(address: str | None, where: str) -> None:
    """Refuse an address that no cluster is at, sooner than Ray would.

    Raises:
        UserError: says what is there.
    """
    if address is None:
        return
    do = "give host:port as `ray start` prints it, with the run on a machine of the cluster"
    if address != "auto":
        _check_port(address, where, do)
    # in a process of its own, since Ray ends a process that it cannot join
    tried = [sys.executable, "-c", JOIN, address]
    try:
        done = subprocess.run(
            tried, capture_output=True, text=True, timeout=JOIN_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"what answers at {address} is no Ray cluster", where=where, do=do) from None
    if done.returncode:
        if "AuthenticationError" in done.stderr:
            raise UserError(f"the cluster at {address} wants another token, or one at all", where=where, do=GIVE_TOKEN)
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(f"cannot join the cluster at {address}: {said[:300]}", where=where, do=do)


def _check_port(address: str, where: str, do: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"'{address}' is no host:port", where=where, do=do)
    if (told := _no_answer(address)) is not None:
        raise UserError(f"nothing answers at {address}: {told}", where=where, do=do)


def _no_answer(address: str) -> str | None:
    """Why nothing answers there; None: something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error) or "no answer"
    return None
