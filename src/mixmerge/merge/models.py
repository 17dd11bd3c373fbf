"""The models that a merge reads, opened; or, for one that another merge of the file has yet to make, foreseen.

The one idea: what a merge will write is known from the headers of what it reads, so a whole file of merges that feed each
other is checked before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mixmerge.errors import ModelError
from mixmerge.merge.adapters import open_model, sources_of
from mixmerge.merge.align import Model, require_one_kind, tied_heads
from mixmerge.merge.chain import require_models
from mixmerge.merge.checkpoint import Checkpoint, open_checkpoint
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Files, Raw, Source
from mixmerge.merge.targets import Plan, plan_targets
from mixmerge.merge.vocabulary import Vocabulary, plan_vocabulary


@dataclass(frozen=True, slots=True)
class Opened:
    """The models of a merge, the donor first: in one vocabulary, and without output layers that repeat an embedding."""

    models: Mapping[str, Model]
    tied: bool
    vocabulary: Vocabulary | None = None

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json's content with this vocabulary and tie."""
        told = dict(config) if self.vocabulary is None else self.vocabulary.describe(config)
        return told | ({"tie_word_embeddings": True} if self.tied else {})


def open_models(config: MergeConfig, files: Files, folders: Mapping[str, Path]) -> Opened:
    """Every model of a configuration; `folders`: those of the named merges before it.

    Raises:
        ModelError: models of different architectures, or whose output layers or vocabularies cannot go together.
    """
    models = {name: _read(_open(name, config, folders), files) for name in config.references}
    _require_distinct([model.checkpoint for model in models.values()])
    return _brought_together(config, models, files, folders)


def without_twins(models: Mapping[str, Model]) -> Opened:
    """Models of one architecture, without output layers that repeat an embedding.

    Raises:
        ModelError: models of different architectures, or that do not agree on the tie.
    """
    require_one_kind(list(models.values()))
    tied = tied_heads(list(models.values()))
    kept = {
        name: replace(model, tensors={key: source for key, source in model.tensors.items() if key not in tied})
        for name, model in models.items()
    }
    return Opened(kept, bool(tied))


def _brought_together(
    config: MergeConfig, models: Mapping[str, Model], files: Files, folders: Mapping[str, Path]
) -> Opened:
    opened = without_twins(models)
    checkpoints = {name: model.checkpoint for name, model in models.items()}
    vocabulary = plan_vocabulary(config, checkpoints, partial(_open, config=config, folders=folders))
    if vocabulary is None:
        return opened
    sources = vocabulary.put_into({name: model.tensors for name, model in opened.models.items()}, files)
    united = {name: replace(model, tensors=sources[name]) for name, model in models.items()}
    return Opened(united, opened.tied, vocabulary)


def foresee(config: MergeConfig, files: Files) -> Iterator[tuple[MergeConfig, Opened, Plan]]:
    """Check a merge and all that feed it from headers alone, in their order, as far as headers tell.

    It ends before a merge that takes a tokenizer or numbers which are not made yet.

    Raises:
        ModelError, RecipeError, CheckpointError: whatever any of them would raise before it writes.
    """
    made: dict[str, Model] = {}
    require_models(config)
    for one in (*config.earlier, config):
        models = {name: made.get(name) or _read(_open(name, one, {}), files) for name in one.references}
        if one.vocabulary is not None and not made.keys().isdisjoint({*models, *one.vocabulary.models}):
            return  # that is checked when it is there
        try:
            _require_distinct([model.checkpoint for name, model in models.items() if name not in made])
            opened = _brought_together(one, models, files, {})
            plan = plan_targets(one, opened.models)
        except _NotMadeError:
            return
        yield one, opened, plan
        made[str(one.name)] = _foreseen(str(one.name), plan, opened)


def _require_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a folder under two names: it would be two models to a method, and a base beside itself."""
    seen: dict[tuple[Path, ...], str] = {}
    for checkpoint in checkpoints:
        places = tuple(folder.resolve() for folder in checkpoint.folders)
        other = seen.setdefault(places, checkpoint.name)
        if other != checkpoint.name:
            what = f"'{other}' and '{checkpoint.name}' are the same model"
            raise ModelError(what, do="write it in the same way everywhere")


def _open(name: str, config: MergeConfig, folders: Mapping[str, Path]) -> Checkpoint:
    return (
        open_checkpoint(folders[name], name)
        if name in folders
        else open_model(name, config.folder, pickles=config.pickles)
    )


def _read(checkpoint: Checkpoint, files: Files) -> Model:
    return Model(checkpoint, sources_of(checkpoint, files))


def _foreseen(name: str, plan: Plan, opened: Opened) -> Model:
    tensors: dict[str, Source] = {
        target.name: _Foreseen(name, target.name, target.dtype, target.shape) for target in plan.targets.values()
    }
    return Model(Checkpoint(name, Path(), plan.outputs, opened.describe(plan.config)), tensors | dict(plan.copied))


def with_zeros(plan: Plan) -> Plan:
    """A foreseen plan to be tried out: what is not made yet reads as zeros."""

    def told(source: Source) -> Source:
        return (
            _Zeros(source.model, source.name, source.dtype, source.shape) if isinstance(source, _Foreseen) else source
        )

    targets = {
        name: replace(target, sources=tuple(map(told, target.sources)), base=target.base and told(target.base))
        for name, target in plan.targets.items()
    }
    return replace(plan, targets=targets)


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


class _Zeros(_Foreseen):
    def read(self, start: int, into: Raw) -> int:
        into[:] = 0
        return len(into)

    def ahead(self) -> None:
        pass
