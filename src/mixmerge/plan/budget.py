"""How many tokens a row can have, told before the base is there: a budget that the data cannot fill is refused early.

A local base counts with its own tokenizer.json, with some slack, since transformers may set a tokenizer up in its own way.
Elsewhere a token is at least one byte of the rendered text. The mixture step counts exactly; only what it would certainly
refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mixmerge.data.formats import Row
from mixmerge.errors import UserError
from mixmerge.model.chat import Message, compile_template, own_chat_template
from mixmerge.model.folder import read_json

FEWEST = 2  # tokens of a row: a question and an answer
SLACK, SLACK_TOKENS = 0.05, 8
TEMPLATE_BYTES, TURN_BYTES = (
    2048,
    256,
)  # what a template that is not known yet may add: to a row, and to each of its turns

Bounds = Callable[[Row], tuple[int, int]]


def token_bounds(folder: Path | None, jinja: str | None, *, trimmed: bool) -> Bounds:
    """The least and the most tokens of a row; `folder` is the local base and `jinja` the recipe's template, if any."""
    count = _counter(folder, jinja, trimmed=trimmed)
    return cache_by_id(lambda row: count([*row.prompt, {"role": "assistant", "content": row.completion}]))


def prompt_bounds(folder: Path | None, jinja: str | None, *, trimmed: bool) -> Bounds:
    """The least and the most tokens of a row's prompt without what opens its answer, which adds a few."""
    count = _counter(folder, jinja, trimmed=trimmed)
    return cache_by_id(lambda row: count(row.prompt))


def _counter(
    folder: Path | None, jinja: str | None, *, trimmed: bool
) -> Callable[[Sequence[Message]], tuple[int, int]]:
    settings: dict[str, Any] = {}
    if folder is not None:
        own = own_chat_template(folder)
        jinja = jinja or (own[0] if own else None)
        file = folder / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
    render = None if jinja is None else compile_template(jinja, settings, "the chat template")
    local = None if trimmed else folder

    def count(messages: Sequence[Message]) -> tuple[int, int]:
        content = sum(len(str(message["content"]).encode()) for message in messages)
        unknown = FEWEST, content + TEMPLATE_BYTES + TURN_BYTES * len(messages)
        try:
            text = render(messages) if render else None
        except UserError:
            return unknown  # the mixture step says why
        if text is None:
            return unknown
        if local is None:
            return FEWEST, len(text.encode())
        tokens = _encoder(local)(text)  # read when there is something to count: a large one takes a second
        return max(FEWEST, int(tokens * (1 - SLACK)) - SLACK_TOKENS), int(tokens * (1 + SLACK)) + SLACK_TOKENS

    return count


def cut_at(longest: int | None, bounds: Bounds) -> Bounds:
    """The bounds of what training reads of a row, which is cut at that many tokens."""
    if longest is None:
        return bounds
    most = longest

    def cut(row: Row) -> tuple[int, int]:
        least, greatest = bounds(row)
        return min(least, most), min(greatest, most)

    return cut


def both_sides(bounds: Bounds) -> Bounds:
    """The bounds of a row of which DPO reads the prompt with either answer."""

    def pair(row: Row) -> tuple[int, int]:
        sides = (bounds(row), bounds(replace(row, completion=row.rejected))) if row.rejected else (bounds(row),)
        return sum(least for least, _ in sides), sum(most for _, most in sides)

    return cache_by_id(pair)


def cache_by_id(bounds: Bounds) -> Bounds:
    """Count a row once, however many mixtures draw from it; rows are compared by identity, which is quick."""
    known: dict[int, tuple[Row, tuple[int, int]]] = {}

    def cached(row: Row) -> tuple[int, int]:
        if id(row) not in known:
            known[id(row)] = row, bounds(row)
        return known[id(row)][1]

    return cached


@cache
def _encoder(folder: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
