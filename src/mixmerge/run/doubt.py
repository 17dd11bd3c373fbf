"""What was made from bytes that had changed, and the removal of what is damaged together with it.

Bytes that change on a disk raise no alarm when they are read: whoever read them is in doubt, and so is what was made from that.
Who has read what is told by the plans of the store's studies and by records.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Plan
from mixmerge.run.gc import running_studies
from mixmerge.run.plans import PLAN, PLANS, read_plan
from mixmerge.run.record import shape_fault
from mixmerge.run.store import BEGUN, GC, Store, read_json, read_record
from mixmerge.run.verify import Checked, how_to_mend, link_of, title_of


class _Reader(NamedTuple):
    """A step that is finished or was begun, and what it was made from."""

    checked: Checked
    inputs: Sequence[str]


def made_from(found: Iterable[Checked], store: Store, plans: Iterable[Plan] = ()) -> list[Checked]:
    """What of the store may have read bytes which had changed, by itself or through other steps; the nearest first.

    Nobody can tell when bytes changed: dates of files may be those of a copy. `plans`: known beside those of the store.
    """
    bad = {step.step for step in found if step.changed}
    titles, doubtful = {step.step: step.title for step in found}, list[Checked]()
    waiting = [reader for reader in _readers(store, plans) if reader.checked.partial or reader.checked.step not in bad]
    generation = 1
    while bad and (readers := [reader for reader in waiting if not bad.isdisjoint(reader.inputs)]):
        for reader in readers:
            waiting.remove(reader)
            one = reader.checked
            one.generation, one.sources = generation, [step for step in dict.fromkeys(reader.inputs) if step in bad]
            one.problems = [f"made from {titles[step]}, perhaps after that had changed" for step in one.sources]
            one.mend = how_to_mend(one)
            doubtful.append(one)
        for reader in readers:
            if not reader.checked.partial:
                bad.add(reader.checked.step)
                titles[reader.checked.step] = reader.checked.title
        generation += 1
    return doubtful


def mend(found: Iterable[Checked], store: Store) -> None:
    """Remove what is damaged or in doubt, so that the next run makes it again; the last made first, as a kill may come between.

    What a study that is running now is made of stays, and so do links; and all that something was made from that stays, since
    its damage tells of that.
    """
    steps = sorted((step for step in found if step.problems), key=lambda step: -step.generation)
    needed: dict[str, str] = {}
    with store.hold(GC, roomless=True) as alone:
        live = store.leases.live() - {GC}
        running = {step for plan in running_studies(store, live) for step in plan.by_id}
        for step in steps:
            if not alone:
                step.mend = "another removal is at this store; wait until it has ended"
            elif step.step in needed and not step.partial:
                step.mend = f"it stays as long as {needed[step.step]} does, which was made from it"
            elif link_of(step.folder) is None:
                with store.hold(step.step, roomless=True) as held:
                    if held and step.step not in running:
                        store.remove(step.folder)
                        step.mended, step.mend = True, "removed; the next run makes it again"
                    else:
                        step.mend = "a live run has it; wait until that has ended"
            if not step.mended:
                needed |= dict.fromkeys(step.sources, step.title)
        if alone:
            store.sweep()
        if alone and not live and any(step.mended and step.changed for step in steps):
            shutil.rmtree(store.tokens, ignore_errors=True)  # rows as trainings read them


def _readers(store: Store, plans: Iterable[Plan]) -> Iterator[_Reader]:
    known = {step.id: step for plan in plans for step in plan.steps}
    for file in [file for name in (PLAN, PLANS) for file in (store.root / "runs").glob(f"*/{name}")]:
        with suppress(CheckpointError):
            known |= read_plan(file).by_id
    for step, folder in store.folders().items():
        inputs = [*known[step].inputs.values()] if step in known else _recorded_inputs(step, folder)
        yield _Reader(Checked(step, title_of(folder), folder), inputs)
    for folder in sorted((store.folder / ".partial").glob("*-*")):
        with suppress(CheckpointError, KeyError):  # without it nothing was begun yet
            begun = read_json(folder / BEGUN)
            one = Checked(folder.name.rpartition("-")[2], f"partial work of {begun['title']}", folder, partial=True)
            yield _Reader(one, begun["inputs"])


def _recorded_inputs(step: str, folder: Path) -> list[str]:
    try:
        record = read_record(folder)
    except CheckpointError:
        return []
    return [] if shape_fault(record, step) else [entry["id"] for entry in record.get("inputs", {}).values()]
