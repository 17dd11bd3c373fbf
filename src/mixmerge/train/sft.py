"""Supervised fine-tuning of a model folder on a mixture: what it needs, and the one call that does it.

One idea: the call is its own resumption: killed at any moment and called again, it carries on from the last whole
checkpoint in `work` and, on CPU, ends with the very same weights. Weights are trained in fp32 (bf16 by autocast only: in
pure bf16 an update of 1e-5 rounds away) and stored in the base's dtype. Light to import; torch comes with the call.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixmerge.errors import DataError, ModelError, UserError

KEPT_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "vocab",
    "merges",
    "spiece",
    "generation_config",
)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class SftSettings:
    """How to train. `max_length` in tokens, `batch_size` in rows; `save_dtype` None keeps the dtype of the base.

    Raises:
        UserError: a value out of range, named with its key.
    """

    learning_rate: float = 2e-5
    epochs: float = 1.0
    batch_size: int = 8
    max_length: int = 512
    warmup_ratio: float = 0.1
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None

    def __post_init__(self) -> None:
        limits = {
            "learning_rate": 0 < self.learning_rate < math.inf,
            "epochs": 0 < self.epochs < math.inf,
            "batch_size": self.batch_size >= 1,
            "max_length": self.max_length >= 2,
            "warmup_ratio": 0 <= self.warmup_ratio <= 1,
            "scheduler": self.scheduler in ("cosine", "linear", "constant"),
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "precision": self.precision in ("bf16", "fp32"),
            "seed": 0 <= self.seed < 2**32,
            "save_dtype": self.save_dtype in (None, *DTYPES),
        }
        for name, holds in limits.items():
            if not holds:
                raise UserError(f"{name} cannot be {getattr(self, name)!r}", where="training settings")


def train_sft(
    model: Path,
    mixture: Path,
    out: Path,
    settings: SftSettings,
    *,
    work: Path,
    threads: int | None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpoint_every: int = 25,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | int]:
    """Train `model` on the answers in `mixture` (a folder with rows.jsonl); write a model folder into `out`.

    `out` gets weights, configuration, tokenizer and metrics.jsonl (step, loss, lr, tokens, completion_tokens). `work`
    holds the last checkpoint, written every `checkpoint_every` steps. `threads` None leaves torch's own choice; `device`
    auto is CUDA where there is one, else the CPU. Counted: `tokens` and `completion_tokens` that were read, `truncated_rows`
    cut at max_length, `dropped_rows` whose prompt fills it, `diverging_rows` whose template renders the prompt
    differently before an answer. `first_loss` and `last_loss` are means over a fifth of the steps: one batch's says little.

    Raises:
        UserError: `device` cuda where there is none.
        ModelError: a model folder that cannot be loaded or has no chat template.
        DataError: a mixture that is missing, broken, or of which no row fits.
        StepError: loss or gradient is not finite, or `work` belongs to another training.
    """
    rows, digest = _read_mixture(mixture)
    import torch

    from mixmerge.train.checkpoints import last_whole
    from mixmerge.train.schedule import training_order
    from mixmerge.train.tokens import load_tokenizer, tokenise
    from mixmerge.train.trainer import build_trainer

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here", where="how.device", do="set it to auto or cpu")
    tokenizer = load_tokenizer(model)
    tokens = tokenise(rows, tokenizer, settings.max_length)
    if not tokens.ids:
        raise DataError(
            f"none of {len(rows)} rows has room for an answer within max_length {settings.max_length}",
            where=str(mixture),
            do="raise max_length",
        )
    order = training_order(
        [len(ids) for ids in tokens.ids], epochs=settings.epochs, batch_size=settings.batch_size, seed=settings.seed
    )
    dtype = stored_dtype(model) if settings.save_dtype is None else settings.save_dtype
    training = hashlib.sha256(json.dumps([digest, asdict(settings), _weights_digest(model)]).encode()).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = last_whole(work, training)
    with _no_bars():
        network = _load(model)
        configs = _keep_configs(network)
        trainer = build_trainer(
            network,
            tokenizer,
            tokens.dataset(order),
            settings,
            work=work,
            training=training,
            on_cpu=device == "cpu" or not torch.cuda.is_available(),
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        _save(network, configs, getattr(torch, dtype), model, out)
    _write_metrics(history, out / "metrics.jsonl")
    return _summary(history, tokens, len(rows))


def stored_dtype(model: Path) -> str:
    """The torch name of the dtype that most weights of a model folder are stored in, from the safetensors headers.

    Raises:
        ModelError: no safetensors file, or mostly a dtype that cannot be trained and stored (quantised weights).
    """
    from safetensors import safe_open

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    counts: dict[str, int] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                header = tensors.get_slice(key)
                counts[header.get_dtype()] = counts.get(header.get_dtype(), 0) + math.prod(header.get_shape())
    if not counts:
        raise ModelError("no safetensors weights in the model folder", where=str(model))
    most = max(sorted(counts), key=lambda name: counts[name])
    if most not in names:
        raise ModelError(
            f"weights are stored as {most}", where=str(model), do="give 16 or 32 bit floating-point weights"
        )
    return names[most]


def _read_mixture(mixture: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of rows.jsonl and its sha256."""
    file = mixture / "rows.jsonl"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the mixture: {error.strerror}", where=str(file)) from error
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
            whole = all(turn["role"] and turn["content"] for turn in [*row["prompt"], *row["completion"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError("not a mixture row", where=f"{file}:{number}") from error
        if not (whole and row["prompt"] and row["completion"]):
            raise DataError("a mixture row without prompt or answer", where=f"{file}:{number}")
        rows.append(row)
    if not rows:
        raise DataError("the mixture has no rows", where=str(file))
    return rows, hashlib.sha256(data).hexdigest()


def _weights_digest(model: Path) -> list[str]:
    """Contents of the weight files: a checkpoint must not carry on over another base that has the same name."""
    digests = []
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests


def _load(model: Path) -> Any:
    """The model in fp32, with the attention that transformers picks for it (sdpa where it allows, else eager)."""
    import torch

    from mixmerge.model.loading import load_pretrained

    return load_pretrained("AutoModelForCausalLM", model, dtype=torch.float32)


def _keep_configs(network: Any) -> tuple[Any, Any]:
    from copy import deepcopy

    return deepcopy(network.config), deepcopy(network.generation_config)


def _save(network: Any, configs: tuple[Any, Any], dtype: Any, base: Path, out: Path) -> None:
    """Weights in `dtype` with the base's own configuration; its tokenizer files byte for byte."""
    # The trainer aligns special tokens in both configurations with the tokenizer; a trained model must not differ.
    network.config, network.generation_config = configs
    out.mkdir(parents=True, exist_ok=True)
    network.to(device="cpu", dtype=dtype).save_pretrained(out)
    for file in base.iterdir():
        if file.is_file() and file.name.startswith(KEPT_FILES):
            shutil.copyfile(file, out / file.name)


def _write_metrics(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for entry in history:
            line = {
                "step": entry["step"],
                "loss": entry["loss"],
                "lr": entry["learning_rate"],
                "tokens": entry["tokens"],
                "completion_tokens": entry["completion_tokens"],
            }
            stream.write(json.dumps(line) + "\n")


def _summary(history: Sequence[Mapping[str, Any]], tokens: Any, rows: int) -> dict[str, float | int]:
    import resource

    losses = [float(entry["loss"]) for entry in history]
    fifth = -(-len(losses) // 5)
    read = sum(int(entry["tokens"]) for entry in history)
    seconds = sum(float(entry["seconds"]) for entry in history)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "steps": len(losses),
        "rows": rows,
        "tokens": read,
        "completion_tokens": sum(int(entry["completion_tokens"]) for entry in history),
        "truncated_rows": tokens.truncated,
        "dropped_rows": tokens.dropped,
        "diverging_rows": tokens.diverging,
        "first_loss": sum(losses[:fifth]) / fifth,
        "last_loss": sum(losses[-fifth:]) / fifth,
        "seconds": seconds,
        "tokens_per_second": read / seconds if seconds else 0.0,
        "peak_rss_mb": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars beside the caller's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
