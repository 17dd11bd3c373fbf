"""Generation that several processes share: each answers whole batches, which are joined in the order of one process.

The batches are cut once, by whichever process comes first, and every process keeps to them; each batch is a file that is there
whole or not at all, named by its number and by how all were cut, which stands in it too, with its digest. So what a batch gives
does not depend on who answers it, a killed generation carries on with any number of processes, and the joined file has the very
bytes that one process writes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.engine import Engine, GenerationSettings
from mixmerge.evaluate.generate import Progress, account, answered, cut, ordered_by_length, read_responses
from mixmerge.evaluate.prompts import Prompt
from mixmerge.kept import digest, sealed, unsealed
from mixmerge.whole import write_whole

BATCHES = "batches.json"

log = logging.getLogger(__name__)


def begin_shares(folder: Path) -> None:
    """Before any process is at it: where nobody can tell any more how the batches were cut, they are cut anew."""
    place = folder / BATCHES
    if place.exists() and unsealed(place.read_bytes()) is None:
        log.warning("%s has changed since it was written: the prompts are cut into batches again", place)
        place.unlink()


def generate_share(
    engine: Engine,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: GenerationSettings,
    *,
    number: int,
    of: int,
    batch_size: int = 32,
    progress: Progress = None,
) -> None:
    """Answer every batch that falls to process `number` of `of` and is not there, into files of `folder`.

    `progress` is told how many prompts of its own are answered.
    """
    ordered, lengths = ordered_by_length(engine, prompts)
    sizes = _agreed(folder, cut(engine, ordered, lengths, settings, batch_size), len(ordered))
    own = [(at, end) for at, end in enumerate(accumulate(sizes)) if at % of == number]
    done, total = 0, sum(sizes[at] for at, _ in own)
    for at, end in own:
        file = _file(folder, sizes, at)
        if _text(file) is None:
            if progress:
                progress(done, total)
            rows = answered(engine, ordered[end - sizes[at] : end], lengths, settings)
            write_whole(file, sealed([file.name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)]))
        done += sizes[at]
    if progress:
        progress(done, total)


def join_shares(folder: Path, out: Path) -> dict[str, Any]:
    """Write all batches of `folder` to `out`, in order; counts as those of `generate`.

    Raises:
        CheckpointError: a batch is not there.
    """
    sizes = _sizes(folder)
    batches = []
    for at in range(len(sizes)):
        if (batch := _text(file := _file(folder, sizes, at))) is None:
            raise CheckpointError("no process has answered this batch", where=str(file), do="run it again to carry on")
        batches.append(batch)
    write_whole(out, "".join(batches))
    rows = read_responses(out)
    if len(rows) != sum(sizes):
        do = f"remove {folder} and run it again"
        raise CheckpointError(f"{len(rows)} rows for {sum(sizes)} prompts", where=str(folder), do=do)
    return account(rows) | {"resumed": 0}


def _agreed(folder: Path, mine: Sequence[int], prompts: int) -> list[int]:
    """The batches that the first process wrote down: this one's, if it is the first."""
    place, own = folder / BATCHES, folder / f".{BATCHES}.{uuid4().hex[:8]}"
    write_whole(own, sealed(list(mine)))
    try:
        os.link(own, place)  # fails where it is there, and shows it whole where it is not
    except FileExistsError:
        pass
    finally:
        own.unlink()
    sizes = _sizes(folder)
    if sum(sizes) != prompts:
        what = f"not the batches of {prompts} prompts"
        raise CheckpointError(what, where=str(place), do=f"remove {folder} to generate afresh")
    return sizes


def _sizes(folder: Path) -> list[int]:
    sizes: list[int] | None = unsealed((folder / BATCHES).read_bytes())
    if sizes is None:
        what = "the file has changed since it was written"
        raise CheckpointError(what, where=str(folder / BATCHES), do="run it again, which begins anew")
    return sizes


def _file(folder: Path, sizes: Sequence[int], at: int) -> Path:
    return folder / f"batch-{digest(sealed(sizes).encode())[:12]}-{at:06d}.json"


def _text(file: Path) -> str | None:
    """The rows of a batch; one that has changed since it was written is told of, and removed."""
    try:
        found = unsealed(file.read_bytes())
    except FileNotFoundError:
        return None
    if isinstance(found, list) and found[0] == file.name:
        return str(found[1])
    log.warning("%s has changed since it was written: it is answered again", file)
    file.unlink(missing_ok=True)
    return None
