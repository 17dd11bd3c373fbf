"""One row of a finished mixture as the model meets it: rendered, tokenised, with the part that is learned marked.

One idea: nothing is rendered here. The row goes through the training's own tokenisation, and what is shown is decoded
from its ids, so that a wrong template, a cut answer or a token too many is seen as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.data.mixture import ORIGINS
from mixmerge.errors import UserError

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan, Step
    from mixmerge.run.store import Store

WHOLE = 1 << 30  # tokens; longer than any row


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the text that is all learned, or all only read; `tokens` is how many ids it has."""

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Example:
    """Row `row` (from 1) of a mixture. No parts: cut at `max_length`, nothing of its answer was left to learn.

    `rejected` is the answer that a preference training learns to avoid; None where the mixture has none. `training` is
    the one that learns it so; `own_marks`: it is a command of the user's, which decides by itself what it learns. `origin`: the
    data set, the file and the row in it that it comes from; None where an older mixmerge drew it.
    """

    row: int
    id: str
    parts: tuple[Part, ...]
    truncated: bool
    max_length: int | None
    rejected: Part | None = None
    training: str | None = None
    own_marks: bool = False
    origin: Mapping[str, Any] | None = None

    def tokens(self, *, trained: bool) -> int:
        return sum(part.tokens for part in self.parts if part.trained == trained)


def step_example(plan: Plan, step: Step, store: Store, row: int) -> Example | None:
    """Row `row` (from 1) of a mixture as the training that reads it does, or of the mixture of a training.

    Of several trainings of a mixture it is the one of its name, else the first. None where the mixture is not drawn.

    Raises:
        UserError, ModelError: as `training_example`.
    """
    mixture = plan.by_id[step.inputs["mixture"]] if step.kind == "train" else step
    folder = store.find(mixture.id)
    if folder is None:
        return None
    readers = [other for other in plan.steps if other.inputs.get("mixture") == mixture.id]
    readers.sort(key=lambda other: other.name != step.name)
    training = step if step.kind == "train" else next(iter(readers), None)
    told = {} if training is None else training.what.get("settings", training.what)
    # The start's own template and tokenizer, where it is there: an adopted one may have another than the base.
    start = None if training is None else store.find(training.inputs["model"])
    example = training_example(
        folder,
        start or store.path(mixture.inputs["tokenizer"]),
        row=row,
        max_length=told.get("max_length"),
        all_turns=told.get("train_on") == "all",
    )
    own_marks = training is not None and training.what.get("engine") == "command"
    return replace(example, training=training.title if training else None, own_marks=own_marks)


def training_example(
    mixture: Path, tokenizer: Path, *, row: int, max_length: int | None, all_turns: bool = False
) -> Example:
    """Row `row` (from 1) of the mixture's folder, by the tokenizer of a model folder, cut at `max_length` tokens.

    With `all_turns` the assistant's earlier turns are learned too.

    Raises:
        UserError: the mixture has fewer rows.
        ModelError: no tokenizer, or a chat template that refuses the row.
    """
    from mixmerge.train.tokens import IGNORED, load_tokenizer, tokenise

    record = _row(mixture / "rows.jsonl", row)
    origins = mixture / ORIGINS
    reader = load_tokenizer(tokenizer)
    sides = [record] + ([record | {"completion": record["rejected"]}] if "rejected" in record else [])
    found = [tokenise([side], reader, max_length or WHOLE, all_turns=all_turns) for side in sides]
    parts, *others = (
        tuple(_parts(side.ids[0].tolist(), (side.labels[0] != IGNORED).tolist(), reader)) if side.ids else ()
        for side in found
    )
    rejected = next((part for other in others for part in other if part.trained), None)
    truncated, origin = any(side.truncated for side in found), _row(origins, row) if origins.is_file() else None
    return Example(row, record["id"], parts, truncated, max_length, rejected, origin=origin)


def _row(path: Path, row: int) -> Any:
    count = 0
    with path.open(encoding="utf-8") as lines:
        for count, line in enumerate(lines, start=1):
            if count == row:
                return json.loads(line)
    raise UserError(f"the mixture has {count} rows", where=f"--example {row}", do=f"give a number from 1 to {count}")


def _parts(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> Iterator[Part]:
    """Stretches of one kind; each is decoded with all before it, since some decoders drop a text's first space."""
    before, end = "", 0
    for trained, group in groupby(learned):
        size = sum(1 for _ in group)
        end += size
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A character whose bytes are parted is whole only in the later stretch.
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        yield Part(whole[shared:], trained, size)
        before = whole
