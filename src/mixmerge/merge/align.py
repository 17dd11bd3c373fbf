"""Whether models can be merged tensor by tensor, found from their headers before anything is written.

The one idea: no table of architectures. Tensors are matched by name and must have one shape everywhere; what is not
merged (integers, float64, float8) is copied where all models hold the same bytes.
A tied lm_head is dropped where it only repeats the embedding, because loaders would drop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixmerge.errors import ModelError
from mixmerge.merge.checkpoint import FLOATS, Checkpoint

_HEAD = "lm_head.weight"
_STRETCH = 1 << 22


@dataclass(frozen=True, slots=True)
class Agreed:
    """The tensors that are combined, those that are copied, and whether a repeated lm_head was left out."""

    merged: tuple[str, ...]
    copied: tuple[str, ...]
    tied: bool


def agree(models: Sequence[Checkpoint]) -> Agreed:
    """Check that all models hold the same tensors; the first gives the configuration.

    Raises:
        ModelError: a tensor that one model lacks or has in another shape, or that cannot be merged and differs.
    """
    first = models[0]
    for other in models[1:]:
        kinds = [model.config.get("model_type") for model in (first, other)]
        if kinds[0] != kinds[1]:
            raise ModelError(f"'{first.name}' is a {kinds[0]} model and '{other.name}' a {kinds[1]} model", do=_ALIKE)
    tied = {name for name in {name for model in models for name in model.tensors} if _repeats_embedding(name, models)}
    names = sorted({name for model in models for name in model.tensors} - tied)
    merged: list[str] = []
    copied: list[str] = []
    for name in names:
        _require_same_shape(name, models)
        dtypes = {model.tensors[name].dtype for model in models}
        if dtypes <= set(FLOATS):
            (merged if first.tensors[name].size else copied).append(name)
            continue
        for other in models[1:]:
            if len(dtypes) > 1 or not _same_bytes(first, name, other, name):
                what = (
                    f"tensor '{name}' ({', '.join(sorted(dtypes))}) differs between '{first.name}' and '{other.name}'"
                )
                do = "only float32, float16 and bfloat16 are merged; any other tensor must be the same in all models"
                raise ModelError(what, do=do)
        copied.append(name)
    return Agreed(tuple(merged), tuple(copied), bool(tied))


def _require_same_shape(name: str, models: Sequence[Checkpoint]) -> None:
    owner = next(model for model in models if name in model.tensors)
    for model in models:
        if name not in model.tensors:
            what = f"tensor '{name}' is in '{owner.name}' and not in '{model.name}'"
            raise ModelError(what, do=_ALIKE)
        ours, theirs = owner.tensors[name].shape, model.tensors[name].shape
        if ours != theirs:
            what = f"tensor '{name}' has shape {list(ours)} in '{owner.name}' and {list(theirs)} in '{model.name}'"
            raise ModelError(what, do=_ALIKE)


def _repeats_embedding(name: str, models: Sequence[Checkpoint]) -> bool:
    """Whether this tensor is an lm_head that has to go: some models tie theirs, and the others' repeat the embedding."""
    if not name.endswith(_HEAD):
        return False
    lacking = next((model for model in models if name not in model.tensors), None)
    if lacking is None and says_tied(models[0]) is not True:
        return False
    for model in models:
        if name in model.tensors and (says_tied(model) is False or not _has_twin(name, model)):
            whose = f"'{(lacking or models[0]).name}' ties its output layer to its embedding"
            what = f"{whose}, and '{model.name}' has a '{name}' of its own"
            raise ModelError(what, do="merge models that agree on tie_word_embeddings")
    return True


def says_tied(model: Checkpoint) -> bool | None:
    """What config.json says on tied embeddings; None where it is silent."""
    text = model.config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    said = model.config.get("tie_word_embeddings", inner)
    return None if said is None else bool(said)


def _has_twin(name: str, model: Checkpoint) -> bool:
    shape = model.tensors[name].shape
    twins = [other for other, tensor in model.tensors.items() if other != name and tensor.shape == shape]
    return any(_same_bytes(model, name, model, twin) for twin in twins)


def _same_bytes(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str) -> bool:
    if a.tensors[name_a].dtype != b.tensors[name_b].dtype:
        return False
    size = a.tensors[name_a].size
    stretches = ((start, min(_STRETCH, size - start)) for start in range(0, size, _STRETCH))
    return all(a.read_bytes(name_a, *stretch) == b.read_bytes(name_b, *stretch) for stretch in stretches)


_ALIKE = "only models with equal tensors can be merged: fine-tunes of one base, with one vocabulary"
