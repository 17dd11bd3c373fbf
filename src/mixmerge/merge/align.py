"""Whether tensors can be merged with each other, found from headers before anything is written.

The one idea: no table of architectures. Tensors that are combined must have one shape; what is not merged (integers,
float64, float8) is copied where all models hold the same bytes.
A tied lm_head is dropped where it only repeats the embedding, because loaders would drop it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge.checkpoint import FLOATS, ITEM_BYTES, Checkpoint, config_says
from mixmerge.merge.sources import Source

HEAD = "lm_head.weight"
_STRETCH = 1 << 22


@dataclass(frozen=True, slots=True)
class Model:
    """An opened model and where each of its tensors is read from."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Source]

    @property
    def name(self) -> str:
        return self.checkpoint.name


def require_one_kind(models: Sequence[Model]) -> None:
    """Refuse models of different architectures."""
    first = models[0]
    for other in models[1:]:
        kinds = [model.checkpoint.config.get("model_type") for model in (first, other)]
        if kinds[0] != kinds[1]:
            raise ModelError(f"'{first.name}' is a {kinds[0]} model and '{other.name}' a {kinds[1]} model", do=ALIKE)


def agree(name: str, sources: Sequence[Source], *, per_token: bool = False) -> bool:
    """Whether the sources of an output tensor are merged; False where all hold the same and one is copied.

    `per_token`: it has a row for each token, so that another number of rows means another vocabulary.

    Raises:
        ModelError: shapes that differ, or a tensor that cannot be merged and differs.
    """
    first = sources[0]
    for other in sources[1:]:
        if first.shape != other.shape:
            what = f"{_what(name, first)} has shape {list(first.shape)} in '{first.model}' and {list(other.shape)}"
            do = OTHER_VOCABULARY if per_token and first.shape[1:] == other.shape[1:] else ALIKE
            raise ModelError(f"{what} in '{other.model}'{_renamed(name, other)}", do=do)
    dtypes = {source.dtype for source in sources}
    if dtypes <= set(FLOATS):
        return math.prod(first.shape) > 0
    odd = next((source for source in sources if source.dtype not in FLOATS and len(dtypes) > 1), None)
    if odd is not None:
        what = f"tensor '{name}' is stored as {odd.dtype} in '{odd.model}', and not so in the others"
        do = "convert it to float32, float16 or bfloat16: any other tensor must be the same in all models"
        raise ModelError(what, do=do)
    for other in sources[1:]:
        if not _same_bytes(first, other):
            what = f"tensor '{name}' ({', '.join(sorted(dtypes))}) differs between '{first.model}' and '{other.model}'"
            do = "only float32, float16 and bfloat16 are merged; any other tensor must be the same in all models"
            raise ModelError(what, do=do)
    return False


def tied_heads(models: Sequence[Model]) -> set[str]:
    """The lm_heads that have to go: some models tie theirs, and the others' repeat the embedding."""
    names = {name for model in models for name in model.tensors if name.endswith(HEAD)}
    return {name for name in names if _repeats_embedding(name, models)}


def _repeats_embedding(name: str, models: Sequence[Model]) -> bool:
    lacking = next((model for model in models if name not in model.tensors), None)
    if lacking is None and says_tied(models[0].checkpoint) is not True:
        return False
    for model in models:
        if name in model.tensors and (says_tied(model.checkpoint) is False or not _has_twin(name, model)):
            whose = f"'{(lacking or models[0]).name}' ties its output layer to its embedding"
            what = f"{whose}, and '{model.name}' has a '{name}' of its own"
            raise ModelError(what, do="merge models that agree on tie_word_embeddings")
    return True


def says_tied(model: Checkpoint) -> bool | None:
    """What config.json says on tied embeddings; None where it is silent."""
    said = config_says(model.config, "tie_word_embeddings")
    return None if said is None else bool(said)


def _has_twin(name: str, model: Model) -> bool:
    head = model.tensors[name]
    return any(
        _same_bytes(head, twin) for other, twin in model.tensors.items() if other != name and twin.shape == head.shape
    )


def _same_bytes(a: Source, b: Source) -> bool:
    if a.dtype != b.dtype:
        return False
    size, item = math.prod(a.shape), ITEM_BYTES[a.dtype]
    pieces = [np.empty(min(size, _STRETCH) * item, np.uint8) for _ in range(2)]
    for start in range(0, size, _STRETCH):
        ours, theirs = (piece[: min(_STRETCH, size - start) * item] for piece in pieces)
        a.read(start, ours)
        b.read(start, theirs)
        if not np.array_equal(ours, theirs):
            return False
    return True


def _what(name: str, source: Source) -> str:
    return f"tensor '{name}'{_renamed(name, source)}"


def _renamed(name: str, source: Source) -> str:
    return "" if source.name == name else f" (there '{source.name}')"


OTHER_VOCABULARY = (
    "their vocabularies differ: set tokenizer_source to union, base or one of the models, to align them by token"
)
ALIKE = "only models with equal tensors can be merged: fine-tunes of one base"
