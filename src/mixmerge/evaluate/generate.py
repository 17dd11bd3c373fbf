"""Generation: prompts in, response rows out, in batches that are fixed for the prompt list.

An engine turns texts into completions; `generate` keeps the file. Prompts are sorted by length, so a batch pads little,
and rows are appended and synced a batch at a time: what is on disk is always whole batches of one fixed order plus at
most one torn batch, which is cut off and made again. So a killed run that is called again ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mixmerge.errors import CheckpointError, ModelError
from mixmerge.evaluate.prompts import Prompt

Progress = Callable[[int, int], None] | None
Finish = Literal["stop", "length", "too_long"]


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Greedy decoding, up to `max_new_tokens`, the end-of-sequence token among them."""

    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not positive")


@dataclass(frozen=True, slots=True)
class Completion:
    """A response; `tokens` are those generated, without the end-of-sequence token."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Text in, text out."""

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and response may have together; None: no limit known."""
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as the model reads it, chat template included."""
        ...

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        """One completion a prompt, in order; all of one batch."""
        ...


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    out: Path,
    settings: GenerationSettings,
    *,
    batch_size: int = 32,
    progress: Progress = None,
) -> dict[str, Any]:
    """Append a response row for every prompt to `out` (JSONL), carrying on where an earlier call was killed.

    Rows: the prompt's key, `text`, `tokens`, `finish`. A prompt that leaves no room for `max_new_tokens` in the model's
    context is not cut: its row is empty with finish `too_long`, and the result names it. Returns counts over the whole
    file: rows, tokens, truncated (finish `length`), empty, too_long, too_long_ids; and `resumed`, the rows found.

    Raises:
        CheckpointError: `out` holds rows of other prompts, or is damaged before its last line.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not positive")
    lengths = dict(zip((p.id for p in prompts), engine.lengths([p.text for p in prompts]), strict=True))
    if len(lengths) != len(prompts):
        raise ValueError("two prompts have one id")
    ordered = sorted(prompts, key=lambda p: (lengths[p.id], p.id))
    room = None if engine.context is None else engine.context - settings.max_new_tokens
    rows = _recover(out, ordered, batch_size)
    resumed = len(rows)
    with out.open("ab") as file:
        while len(rows) < len(ordered):
            if progress:
                progress(len(rows), len(ordered))
            batch = ordered[len(rows) : len(rows) + batch_size]
            fitting = [p for p in batch if room is None or lengths[p.id] <= room]
            completions = engine.complete([p.text for p in fitting], settings) if fitting else []
            made = dict(zip((p.id for p in fitting), completions, strict=True))
            fresh = [_row(p, made.get(p.id)) for p in batch]
            # one write, so that a kill leaves either no row of the batch or a stump that _recover cuts off
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh).encode())
            file.flush()
            os.fsync(file.fileno())
            rows += fresh
    if progress:
        progress(len(rows), len(ordered))
    too_long = [row["prompt_id"] for row in rows if row["finish"] == "too_long"]
    return {
        "rows": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "truncated": sum(row["finish"] == "length" for row in rows),
        "empty": sum(not row["text"].strip() for row in rows),
        "too_long": len(too_long),
        "too_long_ids": too_long,
        "resumed": resumed,
    }


def read_responses(path: Path) -> list[dict[str, Any]]:
    """The response rows of a finished file.

    Raises:
        CheckpointError: a line that is not a whole row; names file and row.
    """
    rows, whole, size = _scan(path)
    if whole != size:
        raise CheckpointError("a torn row", where=f"{path}:{len(rows) + 1}", do="generate again to carry on")
    return rows


def _row(prompt: Prompt, made: Completion | None) -> dict[str, Any]:
    if made is None:
        return {**prompt.key(), "text": "", "tokens": 0, "finish": "too_long"}
    return {**prompt.key(), "text": made.text, "tokens": made.tokens, "finish": made.finish}


def _recover(out: Path, ordered: Sequence[Prompt], batch_size: int) -> list[dict[str, Any]]:
    """The rows of whole batches already in `out`; whatever follows them is cut off the file."""
    if not out.exists():
        return []
    rows, _, size = _scan(out)
    for number, (row, prompt) in enumerate(zip(rows, ordered, strict=False), 1):
        if row["prompt_id"] != prompt.id:
            where = f"{out}:{number}"
            raise CheckpointError(
                f"row of {row['prompt_id']!r}, expected {prompt.id!r}", where=where, do="delete it to generate afresh"
            )
    if len(rows) > len(ordered):
        raise CheckpointError(
            f"{len(rows)} rows for {len(ordered)} prompts", where=str(out), do="delete it to generate afresh"
        )
    if len(rows) < len(ordered):
        rows = rows[: len(rows) - len(rows) % batch_size]
    keep = sum(len(line) + 1 for line in out.read_bytes().split(b"\n")[: len(rows)])
    if keep != size:
        with out.open("r+b") as file:
            file.truncate(keep)
            os.fsync(file.fileno())
    return rows


def _scan(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Whole rows, the bytes that they take, and the file's size: they differ by a torn last line."""
    data = path.read_bytes()
    lines = data.split(b"\n")
    torn = len(lines.pop())
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["prompt_id"], row["text"], row["tokens"], row["finish"]
        except (ValueError, KeyError, TypeError):
            # a crash of the machine (not only of the process) can leave zeros or a hole at the end
            if number == len(lines) and not torn:
                return rows, len(data) - len(line) - 1, len(data)
            raise CheckpointError(
                "not a response row", where=f"{path}:{number}", do="delete it to start afresh"
            ) from None
        rows.append(row)
    return rows, len(data) - torn, len(data)


class TransformersEngine:
    """A model folder (safetensors, tokenizer, chat template) in this process, through transformers.

    Weights stay in the checkpoint's dtype (float16 becomes float32 on a CPU, which has no fast float16). Prompts go
    through the chat template with a generation prompt and are padded on the left. Decoding is greedy with a key-value
    cache; nothing else of the folder's generation_config is used but its end-of-sequence ids. Rows that have ended leave
    the batch, so its tail costs less; the shapes depend on the batch alone, so the same batch gives the same texts.

    Raises:
        ModelError: no chat template, no end-of-sequence token, no safetensors, missing weights, or weights that give NaN.
        CheckpointError: a weight file that is damaged.
    """

    def __init__(self, model: Path, *, threads: int | None = None, device: str = "auto") -> None:
        import torch

        from mixmerge.model.loading import load_pretrained

        if threads is not None:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.folder, self.device = model, torch.device(device)
        if not (model / "config.json").is_file():
            raise ModelError("not a model folder: no config.json", where=str(model))
        if not any(model.glob("*.safetensors")):
            raise ModelError("no *.safetensors file", where=str(model), do="save the model as safetensors")
        self.tokenizer: Any = load_pretrained("AutoTokenizer", model, padding_side="left")
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", where=str(model), do="set `chat_template:` for the base"
            )
        self.model: Any = load_pretrained("AutoModelForCausalLM", model, dtype="auto", use_safetensors=True)
        if self.device.type == "cpu" and self.model.dtype == torch.float16:
            self.model = self.model.float()
        self.model.to(self.device).eval()
        self.eos = self._eos_ids()
        text_config = self.model.config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._encode(texts)]

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        done = []
        for ids in self._decode(self._encode(texts), settings.max_new_tokens):
            ended = ids[-1] in self.eos
            ids = ids[:-1] if ended else ids
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            done.append(Completion(text, len(ids), "stop" if ended else "length"))
        return done

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt as one user turn; the template writes the special tokens."""
        rendered = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]

    def _decode(self, prompts: list[list[int]], budget: int) -> list[list[int]]:
        """New ids of each prompt, greedily, up to and with an end-of-sequence id, `budget` of them at most."""
        import torch

        width = max(map(len, prompts))
        pad = next(iter(sorted(self.eos)))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ends = torch.tensor(sorted(self.eos), device=self.device)
        new: list[list[int]] = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=self.device)
        cache: Any = None
        with torch.inference_mode():
            for step in range(budget):
                output = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                best, ids = output.logits[:, -1].max(-1)
                if bool(best.isnan().any()):
                    raise ModelError("the model's logits are NaN", where=str(self.folder), do="check its weights")
                ended = torch.isin(ids, ends)
                for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
                    new[row].append(token)
                going = (~ended).nonzero()[:, 0]
                if len(going) == 0 or step + 1 == budget:
                    break
                if len(going) < len(rows):
                    rows, ids, mask, positions = rows[going], ids[going], mask[going], positions[going]
                    cache.batch_select_indices(going)
                ids = ids[:, None]
                positions = positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return new

    def _eos_ids(self) -> frozenset[int]:
        """Where a response ends: generation_config's and the tokenizer's ids, and what the template puts after an answer.

        A base model that was given a chat template names only its end of text; the end of a turn is read off the template.
        """
        named = self.model.generation_config.eos_token_id
        found = {named} if isinstance(named, int) else set(named or ())
        found.add(self.tokenizer.eos_token_id)
        marker = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
        tail = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2]
        # not every added token is special: Gemma adds runs of line breaks
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        special.update(self.tokenizer.all_special_ids)
        after = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        found.update([token for token in after if token in special][:1])
        found.discard(None)
        if not found:
            raise ModelError(
                "no end-of-sequence token", where=str(self.folder), do="name eos_token_id in generation_config"
            )
        return frozenset(found)
