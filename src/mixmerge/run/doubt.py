"""What was made from bytes that had changed, and the removal of what is damaged together with it.

Bytes that change on a disk raise no alarm when they are read: whoever read them is in doubt, and so is what was made from that.
Who has read what is told by the plans of the store's studies and by records.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.gc import running_steps
from mixmerge.run.plans import plans_under
from mixmerge.run.store import BEGUN, GC, GONE, Store, is_folder, read_json, read_record
from mixmerge.run.verify import Checked, how_to_mend, link_of, record_problems, title_of

Stamp = tuple[int, int]  # of a folder: its inode and its date in ns, which tell it from one in its place later


def made_from(found: Iterable[Checked], store: Store, plans: Iterable[Plan] = ()) -> list[Checked]:
    """What of the store may have read bytes which had changed, by itself or through other steps, also such as are gone.

    Nobody can tell when bytes changed: dates of files may be those of a copy. Of steps in `found` that are damaged themselves it
    is noted there. `plans`: known beside those of the store.
    """
    damaged = {step.step: step for step in found if step.problems}
    changed = {step.step for step in damaged.values() if step.changed}
    if not changed:
        return []
    planned = [step for plan in [*plans, *plans_under(store.root)] for step in plan.steps]
    folders = _folders(store, planned)
    titles = {step.id: step.title for step in planned} | {step: title_of(folder) for step, folder in folders.items()}
    partial = {folder: folder.name.rpartition("-") for folder in _begun(store)}
    told = {step: _recorded_inputs(step, folder) for step, folder in folders.items()}
    begun = {step: _begun_from(folder) for folder, (_, _, step) in partial.items() if step not in told}
    inputs = _inputs(planned, told | begun)
    depths, roots = _depths(inputs, changed)
    doubtful = list[Checked]()

    def doubt(one: Checked, made_from: list[str] | None) -> None:
        read = sorted(changed - {one.step}) if made_from is None else dict.fromkeys(made_from)
        sources = [step for step in read if step in depths]
        if sources:
            one.generation = 1 + max(depths[step] for step in sources)
            one.roots = set().union(*(roots[step] for step in sources)) - {one.step}
            first, more = titles.get(sources[0], sources[0]), len(sources) - 1
            made = "made from" if made_from is not None else "perhaps made from"
            one.problems.append(f"{made} {first}{f' and {more} more' * bool(more)}, perhaps after that had changed")
            one.mend = how_to_mend(one)
            if one.doubtful:
                doubtful.append(one)

    for step, folder in folders.items():
        one = damaged.get(step) or Checked(step, title_of(folder), folder, doubtful=True)
        doubt(one, inputs[step])
    for folder, (kind, _, step) in partial.items():
        one = Checked(step, f"partial work of {titles.get(step, kind)}", folder, doubtful=True, partial=True)
        doubt(one, inputs[step])
    return doubtful


def mend(found: Iterable[Checked], store: Store, stamps: Mapping[Path, Stamp] | None = None) -> None:
    """Remove what is damaged or in doubt, so that the next run makes it again; `stamps`: `stamps_of` the store before it was read.

    What has changed goes last, and only where nothing is left that may have been made from it: its damage is all that tells of
    that. What a study that is running now is made of stays, and so do links, and what the system lets nobody remove.
    """
    steps = sorted((step for step in found if step.problems), key=lambda step: (step.changed, -step.generation))
    try:
        _mend(steps, store, stamps)
    except (CheckpointError, OSError) as error:  # the store cannot be written at all
        for step in (step for step in steps if not step.mended):
            step.mend = f"nothing can be removed: {error}"


def _mend(steps: Sequence[Checked], store: Store, stamps: Mapping[Path, Stamp] | None) -> None:
    needed: dict[str, str] = {}
    with store.hold(GC, roomless=True) as alone:
        live = store.leases.live() - {GC}
        store.leases.sweep()  # those that were watched just now, and are dead
        running = running_steps(store, live)
        now = stamps_of(store)
        before = now if stamps is None else stamps
        fresh = {folder for folder, found in now.items() if found != before.get(folder)}
        made = any(folder.name.rpartition("-")[2] not in (running or ()) for folder in fresh)
        for step in steps:
            if not alone:
                step.mend = "another removal is at this store; wait until it has ended"
            elif running is None:
                step.mend = "a live run whose plan is not in this --out is at this store; wait until that has ended"
            elif step.changed and step.step in needed:
                step.mend = f"it stays as long as {needed[step.step]} does, which was made from it"
            elif step.folder in fresh:
                step.mend = "it was made again meanwhile; verify again"
            elif step.changed and made:
                step.mend = "steps were made meanwhile, perhaps from it; verify again"
            elif link_of(step.folder) is None:
                try:
                    _remove(step, store, running)
                except CheckpointError as error:
                    step.mend = f"it cannot be removed: {error}"
            if not step.mended:
                needed = dict.fromkeys(step.roots, step.title) | needed
        if alone:
            store.sweep()
        if alone and not live and any(step.mended and step.changed for step in steps):
            shutil.rmtree(store.tokens, ignore_errors=True)  # rows as trainings read them


def _remove(step: Checked, store: Store, running: Collection[str]) -> None:
    with store.hold(step.step, roomless=True) as held:
        if not held or step.step in running:
            step.mend = "a live run has it; wait until that has ended"
        else:
            if step.folder.exists():
                store.remove(step.folder)
            step.mended, step.mend = True, "removed; the next run makes it again"


def stamps_of(store: Store) -> dict[Path, Stamp]:
    """What tells each folder of the store, also of partial work, from one that is put in its place later."""
    found = {}
    for folder in [*store.folders().values(), *_begun(store)]:
        with suppress(OSError):  # gone since it was listed
            stat = folder.lstat()
            found[folder] = stat.st_ino, stat.st_mtime_ns
    return found


def _inputs(planned: Iterable[Step], told: Mapping[str, list[str] | None]) -> dict[str, list[str] | None]:
    """What steps were made from, by plans and by what they tell themselves; None where neither does, as of steps that are gone."""
    found = dict[str, list[str] | None]()
    for step, made_from in [*((step.id, [*step.inputs.values()]) for step in planned), *told.items()]:
        before = found.setdefault(step, made_from)
        if before is not None and made_from is not None:
            found[step] = [*dict.fromkeys(before + made_from)]
    gone = {one for made_from in found.values() for one in made_from or () if one not in found}
    return found | dict.fromkeys(sorted(gone))


def _depths(
    inputs: Mapping[str, list[str] | None], changed: Collection[str]
) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Of each step that may be made from changed ones: how many steps lead to it at most, and from which of these.

    A step whose inputs nobody knows may be made from any.
    """
    readers = defaultdict[str, list[str]](list)
    for step, made_from in inputs.items():
        for one in made_from or ():
            readers[one].append(step)
    reached = set(changed)
    depths, roots = dict.fromkeys(reached, 0), defaultdict[str, set[str]](set, {step: {step} for step in reached})
    unknown = {step for step, made_from in inputs.items() if made_from is None and reached - {step}}
    for depth in range(1, len(inputs) + 1):  # a longer way would go in a circle
        for step in reached:
            for reader in readers[step]:
                roots[reader] |= roots[step]
        for step in unknown:
            roots[step] |= set(changed)
        reached = {reader for step in reached for reader in readers[step]} | unknown
        unknown = set()
        depths |= dict.fromkeys(reached, depth)
        if not reached:
            break
    return depths, roots


def _folders(store: Store, planned: Iterable[Step]) -> dict[str, Path]:
    """The folders of finished steps, and of such as are out of reach now, behind a link to a disk that is not mounted."""
    lost = {step: place for step, place in store.places() if _out_of_reach(place)}
    kinds = {place.name for place in store.folder.glob("[!.]*") if _out_of_reach(place)}
    lost |= {step.id: store.folder / step.kind / f"{step.name}--{step.id}" for step in planned if step.kind in kinds}
    return lost | store.folders()


def _out_of_reach(place: Path) -> bool:
    """Whether it is a link that leads nowhere now."""
    return place.is_symlink() and not is_folder(place)


def _begun(store: Store) -> list[Path]:
    """The folders of partial work."""
    found = sorted((store.folder / ".partial").glob("[!.]*-*"))
    return [folder for folder in found if is_folder(folder) and not folder.name.startswith(GONE)]


def _begun_from(folder: Path) -> list[str] | None:
    """The inputs of partial work, by its own word; None where it says nothing."""
    try:
        inputs = read_json(folder / BEGUN).get("inputs")
    except CheckpointError:
        return None
    return inputs if isinstance(inputs, list) and all(isinstance(step, str) for step in inputs) else None


def _recorded_inputs(step: str, folder: Path) -> list[str] | None:
    """The inputs of a finished step, by its record; None where that is not as it was written."""
    try:
        record = read_record(folder)
    except CheckpointError:
        return None
    return None if record_problems(step, record) else [entry["id"] for entry in record.get("inputs", {}).values()]
