"""Hub data sets, and local folders laid out like them, through `datasets`.

One idea: the library finds files, configurations and types; what comes out is plain records, a class label as its name,
with the place each stands at. A local folder (`./folder`, `/folder`, `~/folder`) has its contents for a commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixmerge.data.files import Record
from mixmerge.errors import DataError, reason
from mixmerge.hashes import file_sha256

LOCAL = ("./", "../", "/", "~")


def hub_records(
    hub: str, config: str | None, split: str | None, revision: str | None, relative_to: Path, *, streaming: bool
) -> Iterator[tuple[str, Record]]:
    """Yield (`hub:id/config/split:row`, record); with `streaming`, nothing is fetched beyond what is read.

    Raises:
        DataError: a data set that cannot be loaded, or that breaks while it is read.
    """
    import datasets

    where = "/".join(part for part in (f"hub:{hub}", config, split) if part)
    folder = local_folder(hub, relative_to)
    with _quiet():
        try:
            rows = datasets.load_dataset(
                hub if folder is None else str(folder),
                name=config,
                split=split or "train",
                revision=revision,
                streaming=streaming,
            )
            left = iter(rows)
        except Exception as error:  # of the library, of its HTTP client, of a file's reader: all the same to the user
            raise DataError(
                f"cannot load the data set: {reason(error)}",
                where=where,
                do="check hub, config, split and revision, and that the Hub can be reached",
            ) from error
        labels = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
        row = 0
        while True:
            row += 1
            try:
                record = next(left, None)
            except Exception as error:
                raise DataError(f"cannot read on: {reason(error)}", where=f"{where}:{row}") from error
            if record is None:
                return
            yield f"{where}:{row}", {key: _named(value, labels.get(key)) for key, value in record.items()}


def commit(hub: str, revision: str | None, relative_to: Path, sha256: Callable[[Path], str] = file_sha256) -> str:
    """What a data set is now: its commit on the Hub, or the sha256 of a local folder's files and their names.

    A full commit id stands for itself and needs no network.

    Raises:
        DataError: it cannot be asked for, or there is no such folder.
    """
    folder = local_folder(hub, relative_to)
    if folder is not None:
        return _contents(folder, sha256)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub

    try:
        sha = huggingface_hub.HfApi().dataset_info(hub, revision=revision).sha
    except Exception as error:  # the client raises its own, httpx's and OSError alike; all mean the same to the user
        raise DataError(
            f"cannot resolve the data set's commit: {type(error).__name__}",
            where=f"hub:{hub}",
            do="check the id and the network, or pin 'revision' to a full commit id",
        ) from error
    return str(sha)


def local_folder(hub: str, relative_to: Path) -> Path | None:
    """The folder that a local name means, None for an id.

    Raises:
        DataError: no such folder.
    """
    if not hub.startswith(LOCAL):
        return None
    folder = relative_to / Path(hub).expanduser()
    if not folder.is_dir():
        raise DataError("cannot load the data set: no such folder", where=f"hub:{hub}", do="for one file use 'path'")
    return folder


def _contents(folder: Path, sha256: Callable[[Path], str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _named(value: Any, label: Any) -> Any:
    if label is None or not isinstance(value, int):
        return value
    return label.names[value] if 0 <= value < len(label.names) else None  # -1: the row has no label


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of the library: what goes wrong is said in our one line."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
