"""What a candidate's weights were made of: every step down to the rows and the base, as a tree.

Steps say what they were made of when they were made. Data files are read again: of each it is said whether it still is what the
mixture was drawn from, has changed, or is gone; a mixture of an older mixmerge did not record its files one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixmerge.data.files import read_file
from mixmerge.data.sources import DataSource, fingerprint, source_files
from mixmerge.errors import CheckpointError, DataError, UserError, did_you_mean
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.store import Store

SOURCE = ("base", "adopt")  # steps that bring something in from outside
MEASURED = ("rows", "tokens", "steps", "parameters", "tensors")

KEPT, CHANGED, GONE, UNKNOWN = "as it was drawn", "changed", "gone", "not recorded"

Node = dict[str, Any]


def lineage(plan: Plan, store: Store, candidate: str) -> Node:
    """The tree of a candidate: steps with their files and inputs; one that stood above is not told again.

    Raises:
        UserError: no such candidate.
    """
    if candidate not in plan.models:
        raise UserError(f"no candidate '{candidate}' in this study", do=did_you_mean(candidate, plan.models))
    return _node(plan.by_id[plan.models[candidate]], "", plan, store, set())


def _node(step: Step, role: str, plan: Plan, store: Store, seen: set[str]) -> Node:
    node: Node = {"step": step.title, "id": step.id, "role": role}
    if step.id in seen:
        return node | {"above": True}
    seen.add(step.id)
    record = _record(step, store)
    node |= {"done": record is not None, "damage": store.damage(step.id), "measured": {}, "files": {}}
    if record is not None:
        measured, hashes = record.get("measurements", {}), record.get("sha256", {})
        node["measured"] = {key: measured[key] for key in MEASURED if isinstance(measured.get(key), int)}
        node["files"] = {
            name: {"bytes": size, "sha256": hashes.get(name)} for name, size in record.get("files", {}).items()
        }
        node["made"] = {key: record.get("provenance", {}).get(key) for key in ("started", "host", "git", "argv")}
    if step.kind in SOURCE:
        node["source"] = dict(step.what["source"]) | dict(step.how)
    if step.kind == "mixture":
        drawn = (record or {}).get("measurements", {}).get("data", {})
        node["data"] = [_data(step, name, drawn.get(name)) for name in step.how["sources"]]
    inputs = step.inputs.items()
    return node | {"inputs": [_node(plan.by_id[i], role, plan, store, seen) for role, i in inputs]}


def _record(step: Step, store: Store) -> dict[str, Any] | None:
    try:
        return store.record(step.id) if store.find(step.id) else None
    except CheckpointError:
        return None


def _data(step: Step, name: str, drawn: Mapping[str, Any] | None) -> Node:
    """A data set of a mixture: its files as they were drawn from and what has become of them, and the rows drawn."""
    source, known, folder = DataSource(**step.how["sources"][name]), step.what["data"][name], Path(step.how["folder"])
    languages = known["languages"]
    told: Node = {"name": name, "objective": known["objective"], "languages": languages}
    told |= {"fingerprint": known["fingerprint"], "drawn": None if drawn is None else drawn.get("rows")}
    if source.hub is not None:
        told |= {"hub": source.hub, "config": source.config, "split": source.split, "revision": source.revision}
        return told | {"files": list((drawn or {}).get("files", []))}
    now: dict[str, Node] = {}
    for lang, covered in source.readings(languages):
        try:
            now |= _now(source, covered[0] if lang is None else lang, folder)
        except (DataError, OSError) as error:
            told["problem"] = str(error)
    if before := {entry["file"]: entry for entry in (drawn or {}).get("files", ())}:
        told["files"] = [_since(entry, now.get(file), folder) for file, entry in before.items()]
        told.pop("problem", None)  # the files themselves tell it
        return told | {"changed": any(file["state"] != KEPT for file in told["files"])}
    told["files"] = [entry | ({} if drawn is None else {"state": UNKNOWN}) for entry in now.values()]
    try:
        told["changed"] = fingerprint(source, languages, folder) != known["fingerprint"]
    except (DataError, OSError) as error:
        told["problem"] = str(error)
    return told


def _now(source: DataSource, lang: str, folder: Path) -> dict[str, Node]:
    """The file of a language as it is now, by the name that records give it."""
    found = source_files(source, [lang], folder).items()
    return {
        file.file: asdict(file) | {"path": path, "rows": sum(1 for _ in read_file(Path(path)))} for path, file in found
    }


def _since(before: Mapping[str, Any], now: Node | None, folder: Path) -> Node:
    """A file as it was drawn from, and what has become of it; its rows are counted where they still are what they were."""
    if now is None:
        return {**before, "path": str(folder / before["file"]), "state": GONE}
    if now["sha256"] == before["sha256"]:
        return now | {"state": KEPT}
    told = {key: now[key] for key in ("bytes", "sha256", "rows")}
    return {**before, "path": now["path"], "state": CHANGED, "now": told}
