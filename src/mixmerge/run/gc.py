"""What of a store no recipe reaches, and its removal.

Reached is every step of the plans given, and every step of a study that a live runner is at: a runner says so before it looks
for what is done, and waits for a removal; a removal says so before it looks for runners. A link to outside is never followed
and never removed; a file with names elsewhere (hard links) gives its room back only with its last name. A removal needs no
room itself: it goes on a disk that is full.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Plan
from mixmerge.run.plans import plans_under
from mixmerge.run.store import GC, GONE, RUN, Store, named_os_error, run_lease


@dataclass(slots=True)
class Unreached:
    """A folder that no plan reaches: a finished step's, `partial` work, or the trainings' `tokens`; bytes that it gives back."""

    kind: str
    title: str
    step: str
    folder: Path
    bytes: int = 0
    removed: bool = False


@dataclass(slots=True)
class Garbage:
    """All that is not reached, and what is kept all the same, with the reason."""

    found: list[Unreached] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.found)


def unreached(store: Store, plans: Collection[Plan]) -> Garbage:
    """What of the store none of the plans reaches, with what it would give back."""
    garbage = Garbage()
    live = store.leases.live()
    store.leases.sweep()  # those that were watched just now, and are dead, need not be watched again
    wanted = {step.id for plan in plans for step in plan.steps}
    for plan in _running_studies(store, live - wanted):
        told = f"the study {plan.study} is running now: all its steps are kept"
        garbage.kept += [told] * (told not in garbage.kept)
        wanted |= plan.by_id.keys()
    wanted |= live
    for folder in sorted(store.folder.glob("[!.]*/*--*")):
        name, _, step = folder.name.rpartition("--")
        if step in wanted:
            continue
        if folder.parent.is_symlink():
            garbage.kept.append(f"{folder} is in another place, by a link: kept")
        elif folder.is_symlink():
            garbage.kept.append(f"{folder} is a link to {folder.readlink()}: kept")
        elif folder.is_dir():
            garbage.found.append(Unreached("step", f"{folder.parent.name}/{name}", step, folder))
    for folder in sorted((store.folder / ".partial").glob("*-*")):
        kind, _, step = folder.name.rpartition("-")
        if (step not in wanted or folder.name.startswith(GONE)) and folder.is_dir() and not folder.is_symlink():
            title = "rest of a removed step" if folder.name.startswith(GONE) else f"partial work of {kind}"
            garbage.found.append(Unreached("partial", title, step, folder))
    trainings = (step for plan in plans for step in plan.steps if step.kind == "train")
    if store.tokens.is_dir() and not live and all(store.find(step.id) is not None for step in trainings):
        garbage.found.append(Unreached("tokens", "tokenised rows", "", store.tokens))
    _weigh(garbage.found)
    return garbage


def remove(garbage: Garbage, store: Store) -> None:
    """Remove what was found, each under its lease; what a live runner has taken meanwhile is kept.

    Raises:
        CheckpointError: a folder that may not be removed.
    """
    if not garbage.found:
        return
    with store.hold(GC, roomless=True) as alone:
        live = store.leases.live() - {GC}
        running = running_steps(store, live)
        if not alone:
            garbage.kept.append("another one removes from this store now: nothing is removed")
        elif running is None:
            garbage.kept.append("a live run whose plan is not in this --out is at this store: nothing is removed")
        else:
            _remove(garbage, store, running | ({""} if live else set()))


def _remove(garbage: Garbage, store: Store, running: Collection[str]) -> None:
    for entry in garbage.found:
        if entry.step in running:
            garbage.kept.append(f"{entry.title} {entry.step} is of a study that is running now: kept")
            continue
        try:
            with store.hold(entry.step or "tokens", roomless=True) as held:
                if not held:
                    garbage.kept.append(f"{entry.title} {entry.step} is in the hands of a live runner now: kept")
                    continue
                if entry.kind == "step":
                    store.remove(entry.folder)
                else:
                    shutil.rmtree(entry.folder)
                entry.removed = True
        except CheckpointError:
            raise
        except OSError as error:  # it names the file alone, without its folder
            raise named_os_error(OSError(error.errno, error.strerror), entry.folder) from error


def running_steps(store: Store, live: Collection[str]) -> set[str] | None:
    """The steps of the studies that live runs are at; None where the plan of one is not here: by another --out, or not written yet."""
    plans = list(_running_studies(store, live))
    known = tuple(run_lease(plan.study) for plan in plans)
    if any(name.startswith(RUN) and not name.startswith(known) for name in live):
        return None
    return {step for plan in plans for step in plan.by_id}


def _running_studies(store: Store, live: Collection[str]) -> Iterator[Plan]:
    """The plans under `runs/` that have one of these steps, or a runner that has one of these leases."""
    for plan in plans_under(store.root) if live else ():
        if any(name in plan.by_id or name.startswith(run_lease(plan.study)) for name in live):
            yield plan


def _weigh(found: Iterable[Unreached]) -> None:
    """Give each entry the bytes of the files that lose their last name with all of them."""
    files = [(entry, os.lstat(path)) for entry in found for path in _files(entry.folder)]
    names = Counter((stat.st_dev, stat.st_ino) for _, stat in files)
    seen = set()
    for entry, stat in files:
        key = (stat.st_dev, stat.st_ino)
        if key not in seen and names[key] >= stat.st_nlink:
            entry.bytes += stat.st_size
        seen.add(key)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
