"""What a merge leaves beside its weights so that anyone can check it later: mixmerge_merge.json.

The one idea: the record says from which bytes and by which configuration the model was made, so the same merge can be
computed again and compared, without writing it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError
from mixmerge.merge.checkpoint import Checkpoint
from mixmerge.merge.settings import MergeConfig

RECORD = "mixmerge_merge.json"
_SAMPLE = 4096  # bytes
_SAMPLES = 64  # of each file


def make_record(config: MergeConfig, inputs: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a merge: configuration, where relative models were looked for, inputs, seed, what was measured.

    `inputs` are the fingerprints of all that was read, for the merges that feed this one (`earlier`, in their order) too.
    """
    return {
        "mixmerge": version("mixmerge"),
        "relative_to": str(config.folder.absolute()),
        "config": config.to_mergekit(),
        "earlier": [merge.to_mergekit() for merge in config.earlier],
        "pickles": config.pickles,
        "seed": config.seed,
        "inputs": dict(inputs),
        "measured": dict(measured),
    }


def read_record(model: Path) -> dict[str, Any]:
    """The record of a merged model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = model / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(key in record for key in ("relative_to", "config", "inputs", "earlier")):
            raise ValueError
        kinds = {"relative_to": str, "config": dict, "inputs": dict, "earlier": list}
        if not all(isinstance(record[key], kind) for key, kind in kinds.items()):
            raise ValueError
    except OSError as error:
        do = "only a model that mixmerge merge has written can be verified"
        raise CheckpointError(f"cannot read the merge's record: {error.strerror}", where=str(path), do=do) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError("not the record of a merge", where=str(path)) from error
    return dict(record)


def fingerprint(model: Checkpoint) -> dict[str, Any]:
    """The size of a model and a hash of its headers and of samples of its files: cheap, the same on any machine."""
    layout = sorted((name, t.dtype, t.shape, t.file.name, t.offset) for name, t in model.tensors.items())
    digest = hashlib.sha256(json.dumps(layout).encode())
    total = 0
    for path in model.files:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for place in sorted({size * at // _SAMPLES for at in range(_SAMPLES)} | {max(0, size - _SAMPLE)}):
                    digest.update(str(place).encode() + os.pread(file.fileno(), _SAMPLE, place))
        except OSError as error:
            raise CheckpointError(f"cannot read: {error.strerror}", where=str(path)) from error
        total += size
    return {"bytes": total, "sampled_sha256": digest.hexdigest()}
