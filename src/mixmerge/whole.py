"""Text files that are there whole or not at all, for whoever writes what another process may read."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 beside the file, sync it, and give it the file's name; nothing is left behind where that fails.

    Raises:
        OSError: with a file's name, also where the system gives none: on a full disk.
    """
    scratch = path.with_name(f".{path.name}.{uuid4().hex}")  # a pid would be that of another machine too
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)
