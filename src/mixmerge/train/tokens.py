"""From mixture rows to token ids, with the answer marked.

One idea: the model learns exactly what it will be asked: ids are those of the chat template, and the answer begins
where the tokens of the whole conversation leave those of the generation prompt (as TRL does it). A row cut at
`max_length` is counted; one with no answer left is dropped and counted. Tokenised once, kept as int32 Arrow columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mixmerge.errors import ModelError
from mixmerge.model.chat import CHOICES
from mixmerge.model.loading import load_pretrained

if TYPE_CHECKING:
    from mixmerge.data.formats import Row

IGNORED = -100  # the label of a token that is read but not learned, in torch and transformers alike
BATCH = 256
TURN_BYTES, TEMPLATE_BYTES = 64, 256  # more than a template adds to what it is given
BLANK = 2  # tokens of a blank row: the fewest of which a model predicts one


@dataclass(slots=True)
class Tokenised:
    """Rows as ids and labels (-100 on the prompt), with what happened to the rows that did not fit.

    `kept` holds the places, in the mixture, of the rows that are here.
    """

    ids: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    diverging: int = 0
    columns: ClassVar[tuple[str, ...]] = ("ids", "labels")
    pairs: ClassVar[bool] = False

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def dataset(self, order: Sequence[int]) -> Any:
        """A `datasets.Dataset` with `input_ids` and `labels` (int32), in the given order of rows.

        In the place after the last is a blank row: BLANK tokens of which none is learnt.
        """
        blank, silent = [0] * BLANK, [IGNORED] * BLANK
        return _dataset({"input_ids": [*self.ids, blank], "labels": [*self.labels, silent]}, order)


@dataclass(slots=True)
class TokenisedPairs:
    """Preference rows as ids of the prompt and of its two answers, with what happened to those that did not fit."""

    prompts: list[Any] = field(default_factory=list)
    chosen: list[Any] = field(default_factory=list)
    rejected: list[Any] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    diverging: int = 0
    columns: ClassVar[tuple[str, ...]] = ("prompts", "chosen", "rejected")
    pairs: ClassVar[bool] = True

    @property
    def lengths(self) -> list[int]:
        """Of the longer side of each pair: both are padded to the longest in their batch."""
        sides = zip(self.prompts, self.chosen, self.rejected, strict=True)
        return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]

    def dataset(self, order: Sequence[int]) -> Any:
        """A `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `rejected_ids` (int32), in the given order of rows.

        In the place after the last is a blank pair: a prompt of BLANK tokens without answers.
        """
        parts = {"prompt_ids": self.prompts, "chosen_ids": self.chosen, "rejected_ids": self.rejected}
        columns = {name: [*ids, [0] * BLANK if name == "prompt_ids" else []] for name, ids in parts.items()}
        return _dataset(columns, order)


def _dataset(columns: Mapping[str, Sequence[Any]], order: Sequence[int]) -> Any:
    import pyarrow as arrow
    from datasets import Dataset

    kind = arrow.list_(arrow.int32())
    arrays = {name: arrow.array(values, type=kind) for name, values in columns.items()}
    return Dataset(arrow.table(arrays)).select(order)


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer, or one without a chat template.
    """
    tokenizer = load_pretrained("AutoTokenizer", model)
    if tokenizer.chat_template is None:
        do = f"name one with 'chat_template': {CHOICES}"
        raise ModelError("the tokenizer has no chat template", where=str(model), do=do)
    return tokenizer


def token_counter(model: Path, *, pairs: bool = False, max_length: int | None = None) -> Callable[[Row], int]:
    """A function that counts the tokens of a row as training sees it: chat template, prompt and answer, up to `max_length`.

    With `pairs` the prompt with the rejected answer is counted too: DPO reads both sides.
    """
    tokenizer = load_tokenizer(model)

    def count(row: Row) -> int:
        answers = [row.completion, *([row.rejected] if pairs and row.rejected is not None else [])]
        texts = [
            _render(tokenizer, [*row.prompt, {"role": "assistant", "content": answer}], answer=True)
            for answer in answers
        ]
        lengths = (len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        return sum(length if max_length is None else min(length, max_length) for length in lengths)

    return count


def most_tokens(row: Row) -> int:
    """More tokens than a row's prompt can have, told without counting them: a token is at least a byte."""
    return TEMPLATE_BYTES + sum(len(turn["content"].encode()) + TURN_BYTES for turn in row.prompt)


def long_prompts(rows: Iterable[Row], model: Path, max_length: int) -> list[Row]:
    """The rows whose prompt alone fills `max_length` tokens: training has no room for their answer."""
    perhaps = [row for row in rows if most_tokens(row) >= max_length]  # few, and mostly none
    if not perhaps:
        return []
    tokenizer = load_tokenizer(model)
    prompts = tokenizer([_render(tokenizer, row.prompt, answer=False) for row in perhaps], add_special_tokens=False)
    return [row for row, ids in zip(perhaps, prompts["input_ids"], strict=True) if len(ids) >= max_length]


def tokenise(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, *, all_turns: bool = False
) -> Tokenised:
    """Tokenise rows of rows.jsonl (`prompt` and `completion` messages), at most `max_length` tokens each.

    With `all_turns` the assistant's earlier turns in the prompt are learnt as well as the answer.
    `diverging` counts rows whose template renders the prompt differently once an answer follows: these learn their
    answer after a prompt that inference never sees.
    """
    import numpy as np

    out = Tokenised()
    for index, (prompt_ids, ids) in enumerate(_encoded(rows, tokenizer, "completion")):
        start = _common(prompt_ids, ids)
        out.diverging += start < len(prompt_ids)
        if start >= min(len(ids), max_length):
            out.dropped += 1
            continue
        out.truncated += len(ids) > max_length
        kept = np.asarray(ids[:max_length], dtype=np.int32)
        labels = kept.copy()
        labels[:start] = IGNORED
        for first, end in _earlier_turns(rows[index], ids, tokenizer) if all_turns else ():
            labels[first:end] = kept[first:end]
        out.ids.append(kept)
        out.labels.append(labels)
        out.kept.append(index)
    return out


def tokenise_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> TokenisedPairs:
    """Tokenise preference rows (`prompt`, `completion` and `rejected` messages), at most `max_length` tokens a side.

    Dropped are pairs whose prompt fills `max_length`, and those whose sides are equal as far as they are kept.
    """
    import numpy as np

    out = TokenisedPairs()
    for index, (prompt_ids, chosen, rejected) in enumerate(_encoded(rows, tokenizer, "completion", "rejected")):
        start = min(_common(prompt_ids, chosen), _common(prompt_ids, rejected))
        out.diverging += start < len(prompt_ids)
        sides = [ids[start:max_length] for ids in (chosen, rejected)]
        if not all(sides) or sides[0] == sides[1]:
            out.dropped += 1
            continue
        out.truncated += max(len(chosen), len(rejected)) > max_length
        parts = (out.prompts, chosen[:start]), (out.chosen, sides[0]), (out.rejected, sides[1])
        for column, ids in parts:
            column.append(np.asarray(ids, dtype=np.int32))
        out.kept.append(index)
    return out


def _earlier_turns(row: Mapping[str, Any], ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns of the prompt begin and end in the ids of the whole conversation."""
    for at, turn in enumerate(row["prompt"]):
        if turn["role"] == "assistant":
            texts = [
                _render(tokenizer, row["prompt"][:at], answer=False),
                _render(tokenizer, row["prompt"][: at + 1], answer=True),
            ]
            before, after = tokenizer(texts, add_special_tokens=False)["input_ids"]
            yield _common(before, ids), _common(after, ids)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    differs = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differs, min(len(one), len(two)))


def _encoded(rows: Sequence[Mapping[str, Any]], tokenizer: Any, *answers: str) -> Iterator[tuple[list[int], ...]]:
    """The ids of the prompt and of the prompt with each answer, a row at a time; encoded in batches, several times faster."""
    for begin in range(0, len(rows), BATCH):
        block = rows[begin : begin + BATCH]
        texts = [[_render(tokenizer, row["prompt"], answer=False) for row in block]]
        texts += [
            [_render(tokenizer, [*row["prompt"], *row[answer]], answer=True) for row in block] for answer in answers
        ]
        yield from zip(*(tokenizer(part, add_special_tokens=False)["input_ids"] for part in texts), strict=True)


def _render(tokenizer: Any, messages: Sequence[Any], *, answer: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(f"the chat template refuses a conversation of {roles}: {error}") from error
    return str(text)
