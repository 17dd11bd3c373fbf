"""The command line: the only place that prints answers and picks exit codes.

Answers go to stdout, progress and errors to stderr. Exit 0: done; 1: something failed, what was finished is kept;
2: a mistake in what was given, nothing was started; 70: a bug, with its traceback. Commands import what they need.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from mixmerge.cli import study  # the order of imports is that of the commands in --help

# isort: split
from mixmerge.cli import judging

# isort: split
from mixmerge.cli import origins

# isort: split
from mixmerge.cli import keeping

# isort: split
from mixmerge.cli import models
from mixmerge.cli.options import app
from mixmerge.cli.printing import ready_streams
from mixmerge.cli.study import RECIPES, recipe_file
from mixmerge.errors import FULL, MixmergeError

__all__ = ["RECIPES", "app", "judging", "keeping", "main", "models", "origins", "recipe_file", "study"]

CANNOT_WRITE = (*FULL, errno.EIO, errno.EROFS, errno.EFBIG)


def main() -> None:
    """Run the command line; every error becomes its line and its exit code."""
    ready_streams()
    try:
        app(prog_name="mixmerge")
    except MixmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, PermissionError):
            print(f"error: {error.filename}: no permission", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:80]}...: this name is too long", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            print(f"error: {error.filename or 'what is printed'}: {error.strerror}", file=sys.stderr)
            if error.filename is None:
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - what could not be written is not tried again at the end
            sys.exit(1)
        import traceback

        traceback.print_exc()
        sys.exit(70)
