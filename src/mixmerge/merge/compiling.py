"""Loops over elements compiled to machine code: once per machine, when first used, into a cache on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

# Called once in a process, when a kernel had to be compiled because this machine's cache did not have it.
when_compiling: list[Callable[[], None]] = []
_helpers: list[Any] = []


def helper(function: Any) -> Any:
    """Compiled into the kernels of the same file that call it (numba knows a kernel in its cache by its file alone)."""
    _helpers.append(function)
    return function


def kernel(function: Any) -> Callable[..., Any]:
    """Compile on first use, with the interpreter lock released; kept on disk for the next process."""
    lock = Lock()
    compiled: Any = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            with lock:
                if compiled is None:
                    import numba  # here, so that reading a configuration does not wait for it

                    while _helpers:
                        part = _helpers.pop()
                        part.__globals__[part.__name__] = numba.njit(nogil=True, error_model="numpy")(part)
                    fresh = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
                    found = fresh(*args)
                    while fresh.stats.cache_misses and when_compiling:
                        when_compiling.pop()()
                    compiled = fresh
                    return found
        return compiled(*args)

    return call
