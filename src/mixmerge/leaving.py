"""The quick end of a process that has loaded large libraries."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process: exit functions run and output is flushed, modules are not taken down one by one.

    With torch and transformers loaded that takes seconds, longer than many a step.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
