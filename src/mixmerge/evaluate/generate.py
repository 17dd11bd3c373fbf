"""Generation: prompts in, response rows out, in batches that are fixed when the file is begun.

An engine turns texts into completions; `generate` keeps the file. Prompts are sorted by length, so a batch pads little.
How they are cut into batches depends on what the engine may hold here and now, and the shape of a batch can change the last
bits of its arithmetic: so the batches are written to a plan before the first row, and a call that carries on keeps to them.
Rows are appended and synced a batch at a time, then the batch's digest is added to the plan: what is on disk is whole batches
of one fixed order, and what follows the last that is as its digest says is cut off and made again. So a killed run that is
called again ends with the same file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.batches import plan_batches
from mixmerge.evaluate.engine import Completion, Engine, Finish, GenerationSettings
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.transformers_engine import TransformersEngine
from mixmerge.kept import digest, sealed, unsealed
from mixmerge.whole import write_whole

__all__ = [
    "Completion",
    "Engine",
    "Finish",
    "GenerationSettings",
    "TransformersEngine",
    "generate",
    "plan_batches",
    "read_responses",
]

Progress = Callable[[int, int], None] | None
log = logging.getLogger(__name__)
REASONS = 3  # of a server that would not answer, told in the result


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    out: Path,
    settings: GenerationSettings,
    *,
    batch_size: int = 32,
    progress: Progress = None,
    plan: Path | None = None,
) -> dict[str, Any]:
    """Append a response row for every prompt to `out` (JSONL), carrying on where an earlier call was killed.

    `plan`: the file of the batches and their digests, which stays for the caller to remove once `out` is in its place, and
    without which no row is believed. If none is named it lies beside `out` until that is complete.

    Rows: the prompt's key, `text`, `tokens`, `finish`; and `reason` where a server gave none. A prompt that leaves no room
    for `max_new_tokens` in the model's context is not cut: its row is empty with finish `too_long`, and the result names it.
    A batch is `batch_size` prompts at most, fewer where the engine may not hold as many.

    Returns:
        Counts over the whole file: rows, tokens, truncated (finish `length`), empty, too_long, too_long_ids; filtered and
        unanswered (finish), with the first unanswered_reasons; and `resumed`, the rows found.

    Raises:
        CheckpointError: `out` holds rows of other prompts, or is damaged before its last line.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not positive")
    ordered, lengths = ordered_by_length(engine, prompts)
    place = plan or out.with_name(f"{out.name}.batches")
    sizes, digests = _recorded(place, out, len(ordered))
    if plan is not None and sizes is None:
        out.unlink(missing_ok=True)
    planned = sizes or cut(engine, ordered, lengths, settings, batch_size)
    rows = _recover(out, ordered, planned, None if sizes is None else digests)
    resumed = len(rows)
    if plan is not None or resumed < len(ordered):
        _record(place, out, planned)
    with out.open("ab") as file:
        for end, size in zip(accumulate(planned), planned, strict=True):
            if end <= resumed:
                continue
            if progress:
                progress(len(rows), len(ordered))
            fresh = answered(engine, ordered[end - size : end], lengths, settings)
            # one write, so that a kill leaves either no row of the batch or a stump that _recover cuts off
            batch = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh).encode()
            file.write(batch)
            file.flush()
            os.fsync(file.fileno())
            with place.open("ab") as told:  # a digest that is lost costs its batch
                told.write(f"{digest(batch)}\n".encode())
            rows += fresh
    if plan is None:
        place.unlink(missing_ok=True)
    if progress:
        progress(len(rows), len(ordered))
    return account(rows) | {"resumed": resumed}


def ordered_by_length(engine: Engine, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts, the shortest first, and the tokens of each by its id."""
    lengths = dict(zip((p.id for p in prompts), engine.lengths([p.text for p in prompts]), strict=True))
    if len(lengths) != len(prompts):
        raise ValueError("two prompts have one id")
    return sorted(prompts, key=lambda p: (lengths[p.id], p.id)), lengths


def cut(
    engine: Engine,
    ordered: Sequence[Prompt],
    lengths: Mapping[str, int],
    settings: GenerationSettings,
    batch_size: int,
) -> list[int]:
    """The sizes of the batches that the engine may hold here and now."""
    room = _room(engine, settings)
    asked = [lengths[p.id] if room is None else min(lengths[p.id], max(room, 1)) for p in ordered]
    return plan_batches(
        asked,
        batch_size,
        lambda rows, length: engine.fits(rows, length, settings),
        engine.batch_cost(settings),
    )


def answered(
    engine: Engine, batch: Sequence[Prompt], lengths: Mapping[str, int], settings: GenerationSettings
) -> list[dict[str, Any]]:
    """The rows of a batch."""
    room = _room(engine, settings)
    fitting = [p for p in batch if room is None or lengths[p.id] <= room]
    completions = engine.complete([p.text for p in fitting], settings) if fitting else []
    made = dict(zip((p.id for p in fitting), completions, strict=True))
    return [_row(p, made.get(p.id)) for p in batch]


def _room(engine: Engine, settings: GenerationSettings) -> int | None:
    return None if engine.context is None else engine.context - settings.max_new_tokens


def read_responses(path: Path) -> list[dict[str, Any]]:
    """The response rows of a finished file.

    Raises:
        CheckpointError: a line that is not a whole row; names file and row.
    """
    rows, whole, size = _scan(path)
    if whole != size:
        raise CheckpointError("a torn row", where=f"{path}:{len(rows) + 1}", do="generate again to carry on")
    return rows


def account(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of a file's rows."""
    too_long = [row["prompt_id"] for row in rows if row["finish"] == "too_long"]
    unanswered = [row for row in rows if row["finish"] == "unanswered"]
    return {
        "rows": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "truncated": sum(row["finish"] == "length" for row in rows),
        "empty": sum(not row["text"].strip() for row in rows),
        "too_long": len(too_long),
        "too_long_ids": too_long,
        "filtered": sum(row["finish"] == "filtered" for row in rows),
        "unanswered": len(unanswered),
        "unanswered_reasons": list(dict.fromkeys(row["reason"] for row in unanswered))[:REASONS],
    }


def _row(prompt: Prompt, made: Completion | None) -> dict[str, Any]:
    made = made or Completion("", 0, "too_long")
    row = {**prompt.key(), "text": made.text, "tokens": made.tokens, "finish": made.finish}
    return row if made.reason is None else row | {"reason": made.reason}


def _recorded(place: Path, out: Path, prompts: int) -> tuple[list[int] | None, list[str]]:
    """The sizes of the batches that the file was begun with, and the digests of those in it; None where it was not, or is finished.

    A plan that has changed since it was written tells nothing of the rows any more: they go too.
    """
    if not place.exists():
        return None, []
    first, *digests = place.read_text(encoding="utf-8", errors="replace").split("\n")
    if (sizes := unsealed(first)) is None:
        log.warning("%s has changed since it was written: all is answered again", place)
        out.unlink(missing_ok=True)
        place.unlink()
        return None, []
    if sum(sizes) != prompts:
        what = f"not the batches of {prompts} prompts"
        raise CheckpointError(what, where=str(place), do=f"delete it and {out.name} to generate afresh")
    return sizes, digests


def _record(place: Path, out: Path, sizes: Sequence[int]) -> None:
    """Write down the batches, and the digests of those that are in `out`."""
    digests = [digest(batch) for batch in _batches(out, sizes)]
    write_whole(place, "\n".join([sealed(list(sizes)), *digests, ""]))


def _batches(out: Path, sizes: Sequence[int]) -> Iterator[bytes]:
    """The bytes of each whole batch in `out`."""
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        if end <= len(lines) and lines[end - 1].endswith(b"\n"):
            yield b"".join(lines[end - size : end])


def _recover(
    out: Path, ordered: Sequence[Prompt], sizes: Sequence[int], digests: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The rows of whole batches already in `out`; whatever follows them is cut off the file."""
    if not out.exists():
        return []
    if digests is not None:
        _cut(out, _as_written(out, sizes, digests))
    rows, _, size = _scan(out)
    for number, (row, prompt) in enumerate(zip(rows, ordered, strict=False), 1):
        if row["prompt_id"] != prompt.id:
            where = f"{out}:{number}"
            raise CheckpointError(
                f"row of {row['prompt_id']!r}, expected {prompt.id!r}", where=where, do="delete it to generate afresh"
            )
    if len(rows) > len(ordered):
        raise CheckpointError(
            f"{len(rows)} rows for {len(ordered)} prompts", where=str(out), do="delete it to generate afresh"
        )
    rows = rows[: max((end for end in accumulate(sizes) if end <= len(rows)), default=0)]
    keep = sum(len(line) + 1 for line in out.read_bytes().split(b"\n")[: len(rows)])
    if keep != size:
        _cut(out, keep)
    return rows


def _as_written(out: Path, sizes: Sequence[int], digests: Sequence[str]) -> int:
    """The bytes of the batches up to the first that is not as its digest says, or has none."""
    keep, batches = 0, _batches(out, sizes)
    for number, told in enumerate(filter(None, digests), 1):
        batch = next(batches, b"")
        if digest(batch) != told:
            log.warning("%s: batch %d has changed since it was written: answered again from there on", out, number)
            break
        keep += len(batch)
    return keep


def _cut(out: Path, keep: int) -> None:
    with out.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())


def _scan(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Whole rows, the bytes that they take, and the file's size: they differ by a torn last line."""
    data = path.read_bytes()
    lines = data.split(b"\n")
    torn = len(lines.pop())
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["prompt_id"], row["text"], row["tokens"], row["finish"]
        except (ValueError, KeyError, TypeError):
            # a crash of the machine (not only of the process) can leave zeros or a hole at the end
            if number == len(lines) and not torn:
                return rows, len(data) - len(line) - 1, len(data)
            raise CheckpointError(
                "not a response row", where=f"{path}:{number}", do="delete it to start afresh"
            ) from None
        rows.append(row)
    return rows, len(data) - torn, len(data)
