"""What earlier runs left: the store's finished steps by kind and name, and which steps failed when they were last tried.

The one idea: folders are listed once, and only records that somebody asks for are read, the newest first; so a store of
thousands of steps is looked through in a moment. What it tells of a step's state is the store's own word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mixmerge.errors import CheckpointError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.plans import PLAN, read_plan
from mixmerge.run.record import RECORD, whole_record
from mixmerge.run.store import Store

MOST = 200  # records of a kind that are learnt from: the newest
MOST_NAMED = 4  # records of one kind and name that a step is compared with: each is read for each step


class _Made(NamedTuple):
    at: float
    id: str
    folder: Path


class History:
    """A store as it was when this was made; `events`: the event log of the study, which tells of failures.

    The plan that the study was run by last lies beside its event log.
    """

    def __init__(self, store: Store, events: Path | None = None) -> None:
        self._store, self._events = store, events
        self._records: dict[str, dict[str, Any] | None] = {}
        self._of_kind: dict[str, list[dict[str, Any]]] = {}

    def find(self, step_id: str) -> Path | None:
        return self._store.find(step_id)

    def damage(self, step_id: str) -> str | None:
        return self._store.damage(step_id)

    def interrupted(self, step: Step) -> bool:
        return self._store.partial(step).name in self._partial

    def running(self, step: Step) -> dict[str, Any] | None:
        return self._store.running(step) if self._leased else None

    def named(self, kind: str, name: str) -> list[dict[str, Any]]:
        """The records of finished steps of that kind and name, whatever their ids: the last run's own, then the newest."""
        made = sorted(self._made.get((kind, name), ()), key=lambda one: one.id not in self._last_ids)
        found = (self.record(one.id) for one in made[:MOST_NAMED])
        return [record for record in found if record is not None]

    def own(self, record: Mapping[str, Any]) -> bool:
        """Whether a step was made for this study: its last run has it, or it was made by the same recipe."""
        recipe = None if self._last is None else self._last.called.get("recipe")
        made_by = record.get("provenance", {}).get("recipe")
        return record.get("id") in self._last_ids or (made_by is not None and made_by == recipe)

    def record(self, step_id: str) -> dict[str, Any] | None:
        """The record of a finished step whose files are whole; None where there is none."""
        if step_id not in self._records:
            self._records[step_id] = None
            if (said := self._store.whole(step_id)) is not None and (folder := self._store.find(step_id)) is not None:
                self._records[step_id] = whole_record(said, folder.parent.name)
        return self._records[step_id]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of the newest finished steps of a kind, the newest first."""
        if kind not in self._of_kind:
            made = sorted((m for (k, _), all_ in self._made.items() if k == kind for m in all_), reverse=True)[:MOST]
            found = (self.record(one.id) for one in made)
            self._of_kind[kind] = [record for record in found if record is not None]
        return self._of_kind[kind]

    def failure(self, step_id: str) -> str | None:
        """What a step failed of when the study's last run tried it; None where it did not fail, or was begun again."""
        return self._failures.get(step_id)

    @cached_property
    def _made(self) -> dict[tuple[str, str], list[_Made]]:
        """(kind, name) -> finished steps, the newest first."""
        found: dict[tuple[str, str], list[_Made]] = {}
        for kind in _subfolders(self._store.folder):
            for folder in _subfolders(kind):
                name, _, step_id = folder.name.rpartition("--")
                try:
                    at = (folder / RECORD).stat().st_mtime
                except OSError:
                    continue
                found.setdefault((kind.name, name), []).append(_Made(at, step_id, folder))
        for made in found.values():
            made.sort(reverse=True)
        return found

    @cached_property
    def _last(self) -> Plan | None:
        """The plan that the study was run by last."""
        try:
            return None if self._events is None else read_plan(self._events.with_name(PLAN))
        except CheckpointError:
            return None

    @cached_property
    def _last_ids(self) -> frozenset[str]:
        return frozenset(self._last.by_id if self._last is not None else ())

    @cached_property
    def _partial(self) -> set[str]:
        return {folder.name for folder in _subfolders(self._store.folder / ".partial", hidden=True)}

    @cached_property
    def _leased(self) -> bool:
        return any((self._store.folder / ".leases").glob("*.json"))

    @cached_property
    def _failures(self) -> dict[str, str]:
        failed: dict[str, str] = {}
        try:
            lines = self._events.read_text(encoding="utf-8", errors="replace").splitlines() if self._events else []
        except OSError:
            return failed
        for line in lines:
            try:
                event = json.loads(line)
                step, what = event.get("step"), event.get("event")
            except (ValueError, AttributeError):
                continue  # cut short by a kill
            if what == "failed":
                failed[step] = str(event.get("error", "without a word"))
            elif what in ("start", "done"):
                failed.pop(step, None)
        return failed


def _subfolders(folder: Path, *, hidden: bool = False) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(e.path) for e in entries if e.is_dir() and (hidden or not e.name.startswith("."))]
    except OSError:
        return []
