"""From mixture rows to token ids, with the answer marked.

One idea: the model learns exactly what it will be asked: ids are those of the chat template, and the answer begins
where the tokens of the whole conversation leave those of the generation prompt (as TRL does it). A row cut at
`max_length` is counted; one with no answer left is dropped and counted. Tokenised once, kept as int32 Arrow columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import ModelError
from mixmerge.model.loading import load_pretrained

if TYPE_CHECKING:
    from mixmerge.data.formats import Row

IGNORED = -100  # the label of a token that is read but not learned, in torch and transformers alike
BATCH = 256


@dataclass(slots=True)
class Tokenised:
    """Rows as ids and labels (-100 on the prompt), with what happened to the rows that did not fit."""

    ids: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    diverging: int = 0

    def dataset(self, order: Sequence[int]) -> Any:
        """A `datasets.Dataset` with `input_ids` and `labels` (int32), in the given order of rows."""
        import pyarrow as arrow
        from datasets import Dataset

        kind = arrow.list_(arrow.int32())
        table = arrow.table(
            {"input_ids": arrow.array(self.ids, type=kind), "labels": arrow.array(self.labels, type=kind)}
        )
        return Dataset(table).select(order)


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer, or one without a chat template.
    """
    tokenizer = load_pretrained("AutoTokenizer", model)
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template", where=str(model), do="name one with 'chat_template'")
    return tokenizer


def token_counter(model: Path) -> Callable[[Row], int]:
    """A function that counts the tokens of a row as training sees it: chat template, prompt and answer."""
    tokenizer = load_tokenizer(model)

    def count(row: Row) -> int:
        text = _render(tokenizer, [*row.prompt, {"role": "assistant", "content": row.completion}], answer=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def tokenise(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> Tokenised:
    """Tokenise rows of rows.jsonl (`prompt` and `completion` messages), at most `max_length` tokens each.

    `diverging` counts rows whose template renders the prompt differently once an answer follows: these learn their
    answer after a prompt that inference never sees.
    """
    import numpy as np

    out = Tokenised()
    for prompt_ids, ids in _pairs(rows, tokenizer):
        start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), None)
        start = min(len(prompt_ids), len(ids)) if start is None else start
        out.diverging += start < len(prompt_ids)
        if start >= min(len(ids), max_length):
            out.dropped += 1
            continue
        out.truncated += len(ids) > max_length
        kept = np.asarray(ids[:max_length], dtype=np.int32)
        labels = kept.copy()
        labels[:start] = IGNORED
        out.ids.append(kept)
        out.labels.append(labels)
    return out


def _pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """The ids of prompt and of prompt with answer, a row at a time; encoded in batches, which is several times faster."""
    for begin in range(0, len(rows), BATCH):
        block = rows[begin : begin + BATCH]
        prompts = [_render(tokenizer, row["prompt"], answer=False) for row in block]
        wholes = [_render(tokenizer, [*row["prompt"], *row["completion"]], answer=True) for row in block]
        yield from zip(
            tokenizer(prompts, add_special_tokens=False)["input_ids"],
            tokenizer(wholes, add_special_tokens=False)["input_ids"],
            strict=True,
        )


def _render(tokenizer: Any, messages: Sequence[Any], *, answer: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(f"the chat template refuses a conversation of {roles}: {error}") from error
    return str(text)
