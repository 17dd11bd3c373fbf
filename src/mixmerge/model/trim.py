"""Trim a model's vocabulary to some languages: fewer embedding rows, the same answers where the kept tokens suffice.

The one idea: most of a small multilingual model is its embedding, and most of its tokens belong to languages that
a study does not use. Tokens are chosen by word use (words.py) and closed over their merges (tokens.py), the
room shared so that no language is left far behind. Covered text keeps its pieces; the rest is spelled with shorter
ones, down to bytes, and needs more bits (measured in tests/model/test_model_prepare.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, ModelError, UserError
from mixmerge.linking import link_or_copy
from mixmerge.model.folder import (
    INDEX,
    copy_model,
    read_json,
    save_tensors,
    weight_files,
    whole_folder,
    write_json,
)
from mixmerge.model.tokens import BpeTokenizer, write_trimmed
from mixmerge.model.words import LanguageWords, check_languages, read_words

Progress = Callable[[int, int], None]

# Tensors with one row (or one number) a token, by the end of their names, over the model families of transformers.
ROW_TENSORS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "output.weight",
)
# Part of the free room for tokens without letters (quotes with commas, brackets after a space): of 0.9 to 7.5 % of
# the 53,600 free places that Gemma has at 80,000 tokens, 0.9 % was best on translated news.
PUNCTUATION = 0.01
ID_KEYS = ("_token_id", "_token_ids", "_token_index", "_token_indices")
# Lists of ids to keep out of generation: a token that is gone needs no keeping out.
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
UNKNOWN_IDS = ("bad_words_ids", "force_words_ids", "sequence_bias", "forced_decoder_ids")


@dataclass(frozen=True, slots=True)
class TrimReport:
    """What trimming did; `unchanged` is the share (0..1) of each language's word mass that encodes as before."""

    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int
    unchanged: Mapping[str, float]


def trim_vocabulary(
    model: Path, out: Path, *, languages: Sequence[str], size: int, progress: Progress | None = None
) -> TrimReport:
    """Write `model` to the new folder `out` with `size` tokens, chosen for `languages` (wordfreq's codes).

    Special, byte and single-character tokens always stay. Room that the word lists leave over goes to the tokens
    with the lowest ids, which BPE learned first. Weight files without token rows are hard-linked. `progress` counts
    languages and weight files.

    Raises:
        UserError: unknown language, wordfreq missing, a size below the tokens that must stay (named) or not below
            the present number of tokens, or `out` is already there.
        ModelError: not a safetensors folder, not a BPE tokenizer, or ids that cannot be renumbered.
        CheckpointError: a damaged weight file, or a disk that refuses a write.
    """
    check_languages(languages)
    files = weight_files(model)
    tokenizer = BpeTokenizer.read(model)
    configs = {name: read_json(model / name) for name in _CONFIGS if (model / name).is_file()}
    rows = _vocabulary_size(configs["config.json"], str(model / "config.json"))
    kept = tokenizer.always_kept() | {number for name in configs for number in _ids_in(configs[name])}
    _check_ids(tokenizer, kept, rows, size, str(model))

    def step(done: int) -> None:
        if progress is not None:
            progress(done, len(languages) + len(files))

    words: list[LanguageWords] = []
    engine = tokenizer.open()
    for at, language in enumerate(languages):
        step(at)
        words.append(read_words(language, engine))
    kept = choose_tokens(tokenizer, kept, words, size)
    with whole_folder(out) as partial:
        copy_model(model, partial, weights=False)
        new = write_trimmed(tokenizer, kept, partial)
        for name, config in configs.items():
            write_json(partial / name, _renumber(config, new, rows))
        before = after = 0
        for at, file in enumerate(files):
            step(len(languages) + at)
            counts = _trim_weights(file, partial / file.name, list(new), rows)
            before, after = before + counts[0], after + counts[1]
        if before == after:
            raise ModelError("no embedding found among the weights", where=str(model))
        if (partial / INDEX).is_file():
            _rewrite_index(partial, files)
    step(len(languages) + len(files))
    unchanged = {lang.language: lang.covered_by(kept) for lang in words}
    return TrimReport(len(tokenizer.ids), len(kept), before, after, unchanged)


def choose_tokens(tokenizer: BpeTokenizer, start: set[int], words: Sequence[LanguageWords], size: int) -> set[int]:
    """`start` and the tokens that the languages use most, closed over their merges; exactly `size` where possible.

    Each time, of every language's most used missing token, the one comes next that lowers the sum of the squared
    missing shares most (with the pieces that build it). Equal numbers of tokens would serve a language with few
    (Arabic: 7,000) to its rarest and leave one with many (English: 80,000) short; equal missing shares would do
    the reverse. Tokens without letters, which word lists lack, come first with a small part of the room.
    """
    kept = set(start)
    punctuation = tokenizer.without_letters()
    limit = len(kept) + int(PUNCTUATION * (size - len(kept)))
    while len(kept) < limit and (added := _next_fitting(punctuation, tokenizer, kept, limit)):
        kept |= added
    use = [lang.use_of_tokens() for lang in words]
    missing = [sum(share for token, share in shares.items() if token not in kept) for shares in use]
    queues = [iter(shares) for shares in use]
    heads = [_next_missing(queue, kept) for queue in queues]
    while len(kept) < size and any(head is not None for head in heads):
        best = max(
            (head for head in heads if head is not None),
            key=lambda token: sum(gap * shares.get(token, 0.0) for gap, shares in zip(missing, use, strict=True)),
        )
        added = tokenizer.needed_by(best) - kept
        if len(kept) + len(added) <= size:
            kept |= added
            for at, shares in enumerate(use):
                missing[at] -= sum(shares.get(token, 0.0) for token in added)
        for at, head in enumerate(heads):
            if head is not None and (head == best or head in kept):
                heads[at] = _next_missing(queues[at], kept)
    lowest_first = iter(sorted(tokenizer.tokens))
    while len(kept) < size and (added := _next_fitting(lowest_first, tokenizer, kept, size)):
        kept |= added
    return kept


def _next_missing(queue: Iterator[int], kept: set[int]) -> int | None:
    return next((number for number in queue if number not in kept), None)


def _next_fitting(queue: Iterator[int], tokenizer: BpeTokenizer, kept: set[int], size: int) -> set[int]:
    """What the first token of `queue` that is new and fits adds to `kept`; empty once the queue has run out."""
    for number in queue:
        if number not in kept:
            added = tokenizer.needed_by(number) - kept
            if len(kept) + len(added) <= size:
                return added
    return set()


_CONFIGS = ("config.json", "generation_config.json")


def _vocabulary_size(config: Mapping[str, Any], where: str) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens (padding)."""
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    if not isinstance(size, int):
        raise ModelError("no vocab_size", where=where)
    return size


def _check_ids(tokenizer: BpeTokenizer, kept: set[int], rows: int, size: int, where: str) -> None:
    stray = sorted(kept - tokenizer.tokens.keys())
    if stray:
        what = f"config.json or generation_config.json names token ids that the tokenizer lacks: {stray}"
        raise ModelError(what, where=where, do="correct or remove them there")
    if max(tokenizer.tokens) >= rows:
        what = f"the tokenizer's ids reach {max(tokenizer.tokens)}, the model has {rows} rows"
        raise ModelError(what, where=where, do="check that model and tokenizer belong together")
    if size < len(kept):
        what = f"size {size} is too small: {len(kept)} special, byte and single-character tokens must stay"
        raise UserError(what, where=where, do=f"give a size of {len(kept)} or more")
    if size >= len(tokenizer.tokens):
        what = f"size {size} is not below the {len(tokenizer.tokens)} tokens there are"
        raise UserError(what, where=where, do="give a smaller size, or do not trim")


def _ids_in(value: Any, key: str = "") -> Iterator[int]:
    """Token ids that a configuration names; negative ones mean none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in UNKNOWN_IDS and inner:
                raise ModelError(f"{name} holds token ids that trimming does not renumber", do=f"remove {name}")
            yield from _ids_in(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _ids_in(inner, key)
    elif key.endswith(ID_KEYS) and isinstance(value, int) and value >= 0:
        yield value


def _renumber(value: Any, new: Mapping[int, int], rows: int, key: str = "") -> Any:
    """A configuration with the new ids and vocabulary size."""
    if isinstance(value, dict):
        return {name: _renumber(inner, new, rows, name) for name, inner in value.items()}
    if key in SUPPRESSED and isinstance(value, list):
        return [new[old] for old in value if old in new]
    if isinstance(value, list):
        return [_renumber(inner, new, rows, key) for inner in value]
    if key == "vocab_size" and value == rows:
        return len(new)
    if key.endswith(ID_KEYS) and isinstance(value, int) and value >= 0:
        return new[value]
    return value


def _trim_weights(file: Path, out: Path, kept_rows: list[int], rows: int) -> tuple[int, int]:
    """Write one weight file with only the kept rows (linked if it has none); gives parameters before and after."""
    import torch
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    before = 0
    try:
        with safe_open(file, framework="pt") as source:
            shapes = {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118 (no mapping)
            by_row = {name for name, shape in shapes.items() if _has_rows(name, shape, rows, file)}
            parameters = sum(_count(shape) for shape in shapes.values())
            if not by_row:
                link_or_copy(file, out)
                return parameters, parameters
            index = torch.tensor(kept_rows)
            # Tensors are views of the mapped file, so only the kept rows are ever in memory.
            for name in shapes:
                tensor = source.get_tensor(name)
                before += tensor.numel()
                tensors[name] = tensor.index_select(0, index) if name in by_row else tensor
            save_tensors(tensors, out)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read or write the weights: {error}", where=str(file)) from error
    return before, sum(tensor.numel() for tensor in tensors.values())


def _has_rows(name: str, shape: Sequence[int], rows: int, file: Path) -> bool:
    known = name.endswith(ROW_TENSORS)
    if not shape or shape[0] != rows:
        return False
    if not known:
        what = f"{name} has {rows} rows, as many as the vocabulary, but is no embedding that mixmerge knows"
        raise ModelError(what, where=str(file))
    return True


def _count(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _rewrite_index(folder: Path, files: Sequence[Path]) -> None:
    from safetensors import safe_open

    index = read_json(folder / INDEX)
    total = 0
    for file in files:
        with safe_open(folder / file.name, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 (no mapping)
                tensor = source.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    write_json(folder / INDEX, {**index, "metadata": {**index.get("metadata", {}), "total_size": total}})
