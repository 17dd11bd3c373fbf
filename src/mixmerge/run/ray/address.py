"""How the process of a step learns that it runs on a Ray cluster, and joins it; light to import."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from secrets import token_hex
from typing import Any

from mixmerge.errors import StepError, reason

VARIABLE = "MIXMERGE_RAY_ADDRESS"
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # how to join a cluster that asks for a token
GIVE_TOKEN = "give the cluster's token here too: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or ~/.ray/auth_token"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks after the end would start a cluster, and leave a token in the home folder
}


def ray_address() -> str | None:
    """Where the cluster is that this step runs on; None: on none."""
    return os.environ.get(VARIABLE)


def for_a_step(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """The environment of a step's process on a node, without what Ray tells its own processes, but with its tokens."""
    kept = {name: value for name, value in environment.items() if name in AUTH or not name.startswith("RAY_")}
    return kept | {VARIABLE: address}


@contextmanager
def own_token() -> Iterator[None]:
    """While a cluster of this machine alone is there: a token for it, in the environment of its processes alone.

    Ray would write one into the home folder, and every cluster that is started later would ask for it.
    """
    before = {name: os.environ.get(name) for name in AUTH}
    mode, *given = before.values()
    if mode != "disabled" and not any(given):
        os.environ["RAY_AUTH_TOKEN"] = _token()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@cache
def _token() -> str:
    """One for each process: Ray reads it once."""
    return token_hex(32)


@contextmanager
def own_handlers() -> Iterator[None]:
    """Signal handlers that were there before the block are there after it: Ray puts its own in their place as it is joined."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray, with this process a part of the cluster; what it started there ends with the block.

    Raises:
        StepError: it cannot be joined.
    """
    os.environ.update(QUIET)
    import ray

    try:
        with own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise StepError(f"its process cannot join the Ray cluster at {address}: {reason(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
