"""The engine in this process: a model folder through transformers, in batches that fit into memory.

What makes it quick: prompts are read without padding and answered side by side, as many as memory allows (decoding.py),
rows that have ended leave, only the last position's logits are computed, and weights are in the dtype and the order that
this machine multiplies fastest (packed.py). What makes it exact: greedy decoding gives what `model.generate` gives, prompt by prompt, up to the rounding of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mixmerge.errors import ModelError
from mixmerge.evaluate.engine import Completion, GenerationSettings

Dtype = Literal["auto", "float32", "bfloat16"]
# Tokens of one batch, prompt and response: beyond, products are as quick as they get
BATCH_TOKENS = {"cpu": 32_768, "cuda": 262_144}
# Of one pass over prompts: what it costs beside its tokens (Python, and reading the weights), and its most tokens
PASS_COST = {"cpu": 64, "cuda": 4096}
PASS_TOKENS = {"cpu": 2048, "cuda": 32_768}
# What a step of decoding takes whatever the number of rows (reading the weights), in rows: measured on a CPU as the time of
# a 640 x 2048 product for 1 and for 128 rows; of a GPU, the rows at which its arithmetic takes as long as its memory
STEP_ROWS = {"cpu": 14, "cuda": 256}
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of what is free when the model is loaded


class TransformersEngine:
    """A model folder (safetensors, tokenizer, chat template) in this process, through transformers.

    Prompts go through the chat template with a generation prompt and are padded on the left. Nothing of the folder's
    generation_config is used but its end-of-sequence ids. Rows that have ended leave the batch, so its tail costs less;
    the shapes depend on the batch alone, so the same batch gives the same texts. A batch that does not fit into memory
    after all is halved, and `halved` counts how often.

    Args:
        threads: of torch, in this process; None: as they are.
        device: "cpu", "cuda", ...; auto: the first GPU, where there is one.
        dtype: of the weights; auto: the checkpoint's, but float32 on a CPU that does not multiply 16 bits by instructions
            of its own (there it is several times slower), and bfloat16 for any checkpoint on a GPU.
        batch_tokens: the most tokens of a batch, prompts and responses, padding among them; None: as fits the device.
        memory: bytes for the cache, the logits and what a batch computes in between; None: a share of what is free.
        beside: other engines that are to share the memory of this machine's cores.

    Raises:
        ModelError: no chat template, no end-of-sequence token, no safetensors, missing weights, or weights that give NaN.
        CheckpointError: a weight file that is damaged.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        batch_tokens: int | None = None,
        memory: int | None = None,
        beside: int = 0,
    ) -> None:

        from mixmerge.evaluate.decoding import reads_apart
        from mixmerge.evaluate.packed import pack_linears
        from mixmerge.model.loading import check_loadable, load_pretrained, torch_device

        self.folder, self.device = model, torch_device(device, threads)
        check_loadable(model)
        self.tokenizer: Any = load_pretrained("AutoTokenizer", model, padding_side="left")
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", where=str(model), do="set `chat_template:` for the base"
            )
        self.model: Any = load_pretrained("AutoModelForCausalLM", model, dtype="auto", use_safetensors=True)
        self.model.to(self.device, self._dtype(dtype)).eval()
        self.eos = self._eos_ids()
        self._weights = sum(weight.numel() for weight in self.model.parameters())
        pack_linears(self.model)
        self._apart = reads_apart(self.model, min(self.eos))
        text_config = self.model.config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.halved = 0
        self._batch_tokens = BATCH_TOKENS.get(self.device.type, 8192) if batch_tokens is None else batch_tokens
        self._memory = self._free(beside) if memory is None else memory

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._encode(texts)]

    def fits(self, rows: int, length: int, settings: GenerationSettings) -> bool:
        tokens = rows * (length + settings.max_new_tokens)
        return tokens <= self._batch_tokens and self.batch_bytes(rows, length, settings) <= self._memory

    def batch_cost(self, settings: GenerationSettings) -> int:
        """In a padded token's cost: where prompts are read apart, padding only makes the steps' attention longer.

        A batch more is then the weights read once more a step, and a padded token its keys and values read once a step.
        """
        if self._apart:
            return max(1, int(self._weights) // self._cached_numbers())
        return STEP_ROWS.get(self.device.type, 14) * settings.max_new_tokens

    def _cached_numbers(self) -> int:
        """Numbers that the cache holds of one token."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width)

    def batch_bytes(self, rows: int, length: int, settings: GenerationSettings) -> int:
        """An estimate of what a batch takes beside the weights: the cache, one step's logits, and the prompt's pass.

        The cache is reckoned as if every layer kept every token (a window keeps fewer), and once more for the layer
        that is being grown. A step's logits are there in the weights' dtype and in float32, twice where they are sorted.
        """
        config, item = self.model.config.get_text_config(), self.model.dtype.itemsize
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers, groups = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads
        cache = 2 * (layers + 1) * groups * width * (length + settings.max_new_tokens) * item
        logits = config.vocab_size * (item + (16 if settings.temperature else 4))
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        hidden = length * (6 * config.hidden_size + 3 * inner + 3 * heads * width) * max(item, 4)
        mask = 2 * length * length * item
        return rows * int(cache + logits + hidden + mask)

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        done = []
        seeds = [settings.seed_of(text) for text in texts]
        for ids in self._bounded(self._encode(texts), seeds, settings):
            ended = ids[-1] in self.eos
            ids = ids[:-1] if ended else ids
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            done.append(Completion(text, len(ids), "stop" if ended else "length"))
        return done

    def _bounded(self, prompts: list[list[int]], seeds: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
        """New ids of each prompt; in halves where memory ends.

        Raises:
            ModelError: one prompt alone does not fit.
        """
        try:
            return self._decode(prompts, settings.max_new_tokens, settings, seeds)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(prompts) == 1:
                what = f"no memory for one prompt of {len(prompts[0])} tokens"
                raise ModelError(what, where=str(self.folder), do="free some, or lower max_new_tokens") from error
        # outside of the handler, whose error holds the frames and with them the tensors of the attempt
        self._forget()
        self.halved += 1
        half = len(prompts) // 2
        return [
            ids
            for part in (slice(None, half), slice(half, None))
            for ids in self._bounded(prompts[part], seeds[part], settings)
        ]

    def _forget(self) -> None:
        import gc

        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _free(self, beside: int) -> int:
        """Bytes for batches: a share of what is free now, with the weights in place."""
        import psutil
        import torch

        if self.device.type == "cuda":
            return int(MEMORY_SHARE["cuda"] * torch.cuda.mem_get_info(self.device)[0])
        return int(MEMORY_SHARE["cpu"] * psutil.virtual_memory().available) // (beside + 1)

    def _dtype(self, asked: Dtype) -> Any:
        import torch

        if asked != "auto":
            return getattr(torch, asked)
        stored = self.model.dtype
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32 if stored == torch.float16 or not _quick_bfloat16() else stored

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt as one user turn; the template writes the special tokens."""
        rendered = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]

    def _decode(
        self,
        prompts: list[list[int]],
        budget: int,
        settings: GenerationSettings | None = None,
        seeds: Sequence[int] = (),
    ) -> list[list[int]]:
        """New ids of each prompt, up to and with an end-of-sequence id, `budget` of them at most; greedy by default."""
        from mixmerge.evaluate.decoding import decode

        passes = PASS_COST.get(self.device.type, 64), PASS_TOKENS.get(self.device.type, 2048)
        sampled = settings if settings is not None and settings.temperature else None
        new = decode(self.model, prompts, self.eos, budget, passes if self._apart else None, sampled, seeds)
        if new is None:
            raise ModelError("the model's logits are NaN", where=str(self.folder), do="check its weights")
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


def _out_of_memory(error: RuntimeError) -> bool:
    """A GPU's own error, or the words that torch and oneDNN have for an allocation that the system refuses."""
    import torch

    words = ("DefaultCPUAllocator", "could not create a primitive", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _quick_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own: 1.8 times the speed of float32 on an EPYC 9004."""
    import torch

    found = False
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # not public, so they may go
        with suppress(AttributeError):
            found = found or bool(getattr(torch.cpu, name)())
    return found
