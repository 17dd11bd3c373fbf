"""What a candidate's weights were made of: every step down to the rows and the base, as a tree.

Steps say what they were made of when they were made; data files are read again, so that one that has changed since is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.data.files import read_file
from mixmerge.data.sources import DataSource, fingerprint, resolve
from mixmerge.errors import CheckpointError, DataError, UserError, did_you_mean
from mixmerge.hashes import file_sha256
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.store import Store

SOURCE = ("base", "adopt")  # steps that bring something in from outside
MEASURED = ("rows", "tokens", "steps", "parameters", "tensors")

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
    node |= {"done": record is not None, "measured": {}, "files": {}}
    if record is not None:
        measured, hashes = record.get("measurements", {}), record.get("sha256", {})
        node["measured"] = {key: measured[key] for key in MEASURED if isinstance(measured.get(key), int)}
        node["files"] = {
            name: {"bytes": size, "sha256": hashes.get(name)} for name, size in record.get("files", {}).items()
        }
        node["made"] = {key: record["provenance"].get(key) for key in ("started", "host", "git", "argv")}
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
    """A data set of a mixture: its files with sha256 and rows, and how many rows the mixture has of it."""
    source, known, folder = DataSource(**step.how["sources"][name]), step.what["data"][name], Path(step.how["folder"])
    languages = known["languages"]
    told: Node = {"name": name, "objective": known["objective"], "languages": languages}
    told |= {"fingerprint": known["fingerprint"], "drawn": None if drawn is None else drawn.get("rows")}
    if source.hub is not None:
        told |= {"hub": source.hub, "config": source.config, "split": source.split, "revision": source.revision}
        return told | {"files": []}
    try:
        told["files"] = [_file(source, lang, folder) for lang, _ in source.readings(languages)]
        told["changed"] = fingerprint(source, languages, folder) != known["fingerprint"]
    except (DataError, OSError) as error:
        told |= {"files": [], "problem": str(error)}
    return told


def _file(source: DataSource, lang: str | None, folder: Path) -> Node:
    path = resolve(str(source.path), lang=lang, relative_to=folder)
    rows = sum(1 for _ in read_file(path))
    return {"lang": lang, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path), "rows": rows}
