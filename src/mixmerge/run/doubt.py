"""What was made from bytes that had changed, and the removal of what is damaged together with it.

Bytes that change on a disk raise no alarm when they are read: whoever read them after they changed, or may have, is in doubt,
and so is what was made from that. Who has read what is told by the plans of the store's studies and by records.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Step
from mixmerge.run.gc import running_studies
from mixmerge.run.plans import PLAN, read_plan
from mixmerge.run.record import RECORD, shape_fault
from mixmerge.run.store import BEGUN, GC, Store, read_json, read_record
from mixmerge.run.verify import Checked, how_to_mend, title_of


class _Reader(NamedTuple):
    """A step that is finished or was begun, what it was made from, and when it last read or wrote."""

    checked: Checked
    inputs: Sequence[str]
    ended: float


def made_from(found: Iterable[Checked], store: Store) -> list[Checked]:
    """What of the store may have read bytes which had changed, by itself or through other steps; the nearest first.

    What was ended before the changed file was last written has read what was there before.
    """
    bad = {step.step: step.changed for step in found if step.changed is not None}
    titles, doubtful = {step.step: step.title for step in found}, list[Checked]()
    waiting = [reader for reader in _readers(store) if reader.checked.partial or reader.checked.step not in bad]
    generation = 1
    while bad and (round_ := [(reader, own) for reader in waiting if (own := _changed_inputs(reader, bad))]):
        for reader, own in round_:
            waiting.remove(reader)
            one = reader.checked
            one.generation = generation
            one.problems = [f"made from {titles[i]}, perhaps after that had changed" for i in own]
            one.mend = how_to_mend(one)
            doubtful.append(one)
            if not one.partial:
                titles[one.step], bad[one.step] = one.title, -math.inf  # whatever was made from it is later
        generation += 1
    return doubtful


def mend(found: Iterable[Checked], store: Store) -> None:
    """Remove what is damaged or in doubt, so that the next run makes it again; the last made first, as a kill may come between.

    What a study that is running now is made of stays, and so does a link.
    """
    steps = sorted((step for step in found if step.problems), key=lambda step: -step.generation)
    with store.hold(GC, roomless=True) as alone:
        live = store.leases.live() - {GC}
        running = {step for plan in running_studies(store, live) for step in plan.by_id}
        for step in steps:
            if step.folder.is_symlink():
                continue
            with store.hold(step.step, roomless=True) as held:
                if alone and held and step.step not in running:
                    store.remove(step.folder)
                    step.mended, step.mend = True, "removed; the next run makes it again"
                else:
                    step.mend = "a live run has it; wait until that has ended"
        if alone:
            store.sweep()
        if alone and not live and any(step.mended and step.changed is not None for step in steps):
            shutil.rmtree(store.tokens, ignore_errors=True)  # rows as trainings read them


def _changed_inputs(reader: _Reader, bad: Mapping[str, float | None]) -> list[str]:
    """The inputs that had perhaps changed when they were read."""
    return [i for i in reader.inputs if (since := bad.get(i)) is not None and since <= reader.ended]


def _readers(store: Store) -> Iterator[_Reader]:
    known: dict[str, Step] = {}
    for file in sorted((store.root / "runs").glob(f"*/{PLAN}")):
        with suppress(CheckpointError):
            known |= read_plan(file).by_id
    for step, folder in store.folders().items():
        inputs = [*known[step].inputs.values()] if step in known else _recorded_inputs(step, folder)
        with suppress(OSError):
            yield _Reader(Checked(step, title_of(folder), folder), inputs, (folder / RECORD).stat().st_mtime)
    for folder in sorted((store.folder / ".partial").glob("*-*")):
        with suppress(CheckpointError, KeyError):  # without it nothing was begun yet
            begun = read_json(folder / BEGUN)
            one = Checked(folder.name.rpartition("-")[2], f"partial work of {begun['title']}", folder, partial=True)
            yield _Reader(one, begun["inputs"], _last_written(folder))


def _recorded_inputs(step: str, folder: Path) -> list[str]:
    try:
        record = read_record(folder)
    except CheckpointError:
        return []
    return [] if shape_fault(record, step) else [entry["id"] for entry in record.get("inputs", {}).values()]


def _last_written(folder: Path) -> float:
    last = 0.0
    for path in folder.rglob("*"):
        with suppress(OSError):
            last = max(last, path.lstat().st_mtime)
    return last
