"""How large the models of a plan and of earlier records are, before any of them is there.

All candidates of a study have their base's number of weights, so one number will do. It is told by what is at hand: the base's
record, the headers of its files, its configuration, or a Hub id's name (`aya-23-8B`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import MixmergeError
from mixmerge.model.folder import first_number, read_json, text_part
from mixmerge.model.package import PACKAGES
from mixmerge.plan.graph import Plan, Step

HALF = 2  # bytes of a weight, where the files are not here to tell
UNITS = {"b": 1e9, "m": 1e6}
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model: its weights, its bytes on disk, and what told so."""

    parameters: int
    weight_bytes: int
    told_by: str


def base_size(plan: Plan, record: Callable[[str], Record | None]) -> Size | None:
    """The size of the plan's base; `record` gives that of a finished step. None where nothing at hand tells it."""
    if "base" not in plan.models:
        return None
    base = plan.by_id[plan.models["base"]]
    if (made := record(base.id)) is not None and (parameters := made["measurements"].get("parameters")):
        return Size(parameters, weight_bytes(made), "the base's record")
    trim = base.what.get("trim")
    kept = None if trim is None else int(trim["size"])
    if "path" in base.how:
        return _of_folder(Path(base.how["path"]), kept)
    if "package" in base.how:
        known = PACKAGES.get(base.how["package"].lower().replace("_", "-"))
        return None if known is None else _of_config(known.config, kept)
    return _of_hub(base)


def weight_bytes(record: Record) -> int:
    """The bytes of a model step's weights, by its record."""
    files = record.get("files", {})
    return sum(size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name)


def record_parameters(step: Record, record: Callable[[str], Record | None]) -> int | None:
    """The weights of the model that an earlier step made or used: those of the base that it comes of."""
    at: Record | None = step
    for _ in range(64):  # no study is so long a chain
        if at is None:
            return None
        if at["kind"] in ("base", "adopt", "merge") and (own := at["measurements"].get("parameters")):
            return int(own)
        inputs = at["inputs"]
        roles = ("model", "base", "model0", "start", "responses", "tokenizer")
        towards = next((inputs[role] for role in roles if role in inputs), None)
        at = None if towards is None else record(towards["id"])
    return None


def _of_folder(folder: Path, kept: int | None) -> Size | None:
    from mixmerge.merge.checkpoint import open_checkpoint

    try:
        tensors = open_checkpoint(folder).tensors.values()
        config = text_part(read_json(folder / "config.json"))
    except MixmergeError:
        return None
    parameters = sum(tensor.size for tensor in tensors)
    stored = sum(tensor.bytes for tensor in tensors)
    hidden, vocabulary = first_number(config, "hidden_size", "n_embd", "d_model"), first_number(config, "vocab_size")
    if kept is None or not hidden or not vocabulary:
        return Size(parameters, stored, "the base's files")
    gone = max(0, vocabulary - kept) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    left = max(1, parameters - gone)
    return Size(left, stored * left // parameters, "the base's files and base.trim_vocab")


def _of_config(config: Mapping[str, Any], kept: int | None) -> Size | None:
    """Of a decoder of today's kind: q, k, v, o, three matrices of the feed-forward, embeddings."""
    config = text_part(dict(config))
    hidden, layers = first_number(config, "hidden_size", "n_embd"), first_number(config, "num_hidden_layers", "n_layer")
    vocabulary = kept or first_number(config, "vocab_size")
    if not hidden or not layers or not vocabulary:
        return None
    inner = first_number(config, "intermediate_size", "n_inner") or 4 * hidden
    heads = first_number(config, "num_attention_heads", "n_head") or 1
    width = first_number(config, "head_dim") or hidden // heads
    shared = first_number(config, "num_key_value_heads") or heads
    layer = 2 * hidden * width * (heads + shared) + 3 * hidden * inner
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    parameters = layers * layer + tables * vocabulary * hidden
    return Size(parameters, HALF * parameters, "the base's configuration")


def _of_hub(base: Step) -> Size | None:
    """From the local cache where the model is there, else from its name."""
    from huggingface_hub import constants

    hub, trim = str(base.how.get("hub", "")), base.what.get("trim")
    cached = Path(constants.HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}" / "snapshots"
    folder = cached / str(base.how.get("commit", ""))
    if (folder / "config.json").is_file():
        kept = None if trim is None else int(trim["size"])
        try:
            found = _of_folder(folder, kept) or _of_config(read_json(folder / "config.json"), kept)
        except MixmergeError:
            found = None
        if found is not None:
            return found
    named = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])", hub.rpartition("/")[2].lower())
    if not named:
        return None
    parameters = round(float(named[-1][0]) * UNITS[named[-1][1]])
    return Size(parameters, HALF * parameters, "the base's name")
