"""The models that a merge reads, opened; or, for one that another merge of the file has yet to make, foreseen.

The one idea: what a merge will write is known from the headers of what it reads, so a whole file of merges that feed each
other is checked before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mixmerge.merge.adapters import open_model, sources_of
from mixmerge.merge.align import Model
from mixmerge.merge.chain import require_models
from mixmerge.merge.checkpoint import Checkpoint, open_checkpoint
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Files, Raw, Source, stored
from mixmerge.merge.targets import Plan, plan_targets


def open_models(config: MergeConfig, files: Files, folders: Mapping[str, Path]) -> dict[str, Model]:
    """Every model of a configuration, the donor first; `folders`: those of the named merges before it."""
    return {
        name: _made(name, folders[name], files) if name in folders else _open(name, config, files)
        for name in config.references
    }


def foresee(config: MergeConfig) -> list[int]:
    """Check a merge and all that feed it from headers alone; how many parameters each will write.

    Raises:
        ModelError, RecipeError, CheckpointError: whatever any of them would raise before it writes.
    """
    made: dict[str, Model] = {}
    sizes: list[int] = []
    require_models(config)
    with closing(Files()) as files:
        for one in (*config.earlier, config):
            models = {name: made.get(name) or _open(name, one, files) for name in one.references}
            try:
                plan = plan_targets(one, models)
            except _NotMadeError:  # that takes a look at the numbers: it is checked when they are there
                return sizes
            sizes.append(sum(tensor.size for tensor in plan.outputs.values()))
            made[str(one.name)] = _foreseen(str(one.name), plan)
    return sizes


def _made(name: str, folder: Path, files: Files) -> Model:
    checkpoint = open_checkpoint(folder, name)
    return Model(checkpoint, stored(checkpoint, files))


def _open(name: str, config: MergeConfig, files: Files) -> Model:
    checkpoint = open_model(name, config.folder)
    return Model(checkpoint, sources_of(checkpoint, files))


def _foreseen(name: str, plan: Plan) -> Model:
    tensors: dict[str, Source] = {
        target.name: _Foreseen(name, target.name, target.dtype, target.shape) for target in plan.targets.values()
    }
    tied = {"tie_word_embeddings": True} if plan.tied else {}
    return Model(Checkpoint(name, Path(), plan.outputs, {**plan.config, **tied}), tensors | dict(plan.copied))


class _NotMadeError(Exception):
    """The numbers of a tensor were asked for that is not made yet."""


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """A tensor that an earlier merge will make: all but its numbers."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self, start: int, into: Raw) -> int:
        raise _NotMadeError

    def ahead(self) -> None:
        raise _NotMadeError
