"""Training a model folder on a mixture: all that SFT and DPO share.

One idea: the call is its own resumption: killed at any moment and called again, it carries on from the last whole
checkpoint in `work` and, on CPU, ends with the very same weights. Weights are trained in fp32 (bf16 by autocast only: in
pure bf16 an update of 1e-5 rounds away) and stored in the base's dtype. Light to import; torch comes with the call.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixmerge.errors import DataError, ModelError, UserError
from mixmerge.model.folder import TOKENIZER_FILES, context_of, copy_files, read_json
from mixmerge.model.loading import torch_device
from mixmerge.train import group
from mixmerge.train.extra import check_extra
from mixmerge.train.heldout import by_language, held_out_rows, languages_apart, nested
from mixmerge.train.memory import naming_lack_of_memory
from mixmerge.train.settings import TrainSettings

# of the base, that training leaves alone
KEPT_FILES = (*TOKENIZER_FILES, "chat_template", "generation_config")
COUNTS = ("tokens", "completion_tokens")

Measured = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how fast to train, and who is told: nothing here changes a weight.

    `checkpoint_every` and `evaluate_every` in steps; held-out rows are always read before the first step and after the last.
    """

    work: Path
    threads: int | None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = 25
    progress: Callable[[int, int], None] | None = None
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    report_to: Sequence[str] = ()
    cache: Path | None = None


def fit(
    model: Path,
    mixture: Path,
    out: Path,
    settings: TrainSettings,
    prepare: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]],
    place: Place,
    *,
    pairs: bool = False,
    columns: Sequence[str] = (),
) -> Measured:
    """Train as `train_sft` and `train_dpo` say.

    `prepare` imports and gives what turns rows into tokens and what builds the trainer; `columns` of the log go into
    metrics.jsonl beside step, loss, lr and the counts of tokens.
    """
    check_extra(settings.method, settings.extra)
    rows, digest = read_mixture(mixture, pairs=pairs)
    asked = place.gradient_checkpointing
    with naming_lack_of_memory(model, settings, checkpointing=asked, devices=group.devices()):
        return _fit(model, mixture, out, settings, prepare, place, rows, digest, pairs, columns)


def _fit(
    model: Path,
    mixture: Path,
    out: Path,
    settings: TrainSettings,
    prepare: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]],
    place: Place,
    rows: Sequence[Mapping[str, Any]],
    digest: str,
    pairs: bool,
    columns: Sequence[str],
) -> Measured:
    import torch

    from mixmerge.train.adapter import named_targets, require_library, save_folded
    from mixmerge.train.cache import kept_tokens
    from mixmerge.train.checkpoints import PREFIX, last_whole
    from mixmerge.train.schedule import training_order
    from mixmerge.train.tokens import Tokenised, TokenisedPairs, load_tokenizer

    tokenise, build_trainer = prepare()
    torch_device(place.device, place.threads)
    require_library(settings)
    if settings.extra.get("activation_offloading") and (place.device == "cpu" or not torch.cuda.is_available()):
        where = "training.extra.activation_offloading"
        raise UserError(
            "activations are offloaded from a CUDA device, and there is none", where=where, do="leave it out"
        )
    context = context_of(read_json(model / "config.json"))
    if context is not None and settings.max_length > context:
        what = f"rows of max_length {settings.max_length} are longer than the {context} tokens that the model can read"
        raise UserError(what, where="training.max_length", do=f"set it to {context} or less")
    tokenizer = load_tokenizer(model)
    held = held_out_rows(rows, settings.held_out, "training.held_out")
    learnt = [row for place, row in enumerate(rows) if place not in held]
    kind: Any = TokenisedPairs if pairs else Tokenised
    follow = [digest, sorted(held), settings.max_length, getattr(settings, "train_on", None)]
    tokens = kept_tokens(place.cache, model, follow, kind, lambda: tokenise(learnt, tokenizer, settings.max_length))
    shown = {lang: tokenise(own, tokenizer, settings.max_length) for lang, own in by_language(rows, held).items()}
    held_out = {lang: tokenised for lang, tokenised in shown.items() if tokenised.kept}
    if not tokens.kept:
        raise DataError(
            f"none of {len(rows)} rows has room for an answer within max_length {settings.max_length}",
            where="training.max_length",  # not the mixture, which is as it should be
            do="raise max_length",
        )
    order = training_order(tokens.lengths, epochs=settings.epochs, batch_size=settings.batch_size, seed=settings.seed)
    dtype = stored_dtype(model) if settings.save_dtype is None else settings.save_dtype
    told = [settings.method, digest, asdict(settings), _weights_digest(model)]
    training = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    place.work.mkdir(parents=True, exist_ok=True)
    with group.first_before_others():
        checkpoint = last_whole(place.work, training, fsdp=group.devices().fsdp, read=group.first())
    gc.collect()  # what an earlier training of this process left in cycles
    with _no_bars():
        with group.first_alone_loads():
            network = _load(model, settings)
        configs = _keep_configs(network)
        with named_targets(settings.adapter, network):
            trainer = build_trainer(
                network, tokenizer, tokens, order, settings, place=place, training=training, held=held_out
            )
        if group.size() > 1:
            torch.manual_seed(settings.seed + group.rank())  # or dropout would draw the same in each
        carries_on = checkpoint is not None and trainer.can_carry_on()
        if checkpoint is not None and not carries_on and group.first():
            log.warning("%s: the reference that it needs is not there: not carried on from", checkpoint)
            shutil.rmtree(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if carries_on else None)
        resumed = int(checkpoint.name.removeprefix(PREFIX)) if checkpoint is not None and carries_on else 0
        trainer.log_held_out()
        history = trainer.state.log_history
        weights = group.whole_weights(trainer.model)
        if not group.first():
            return {}
        out.mkdir(parents=True, exist_ok=True)
        if settings.adapter is None:
            stored = getattr(torch, dtype)
            _save(_whole(network, model, stored, weights), configs, stored, out)
        else:
            save_folded(trainer.model, weights, model, dtype, out, place.work, place.threads)
        copy_files(model, out, KEPT_FILES, over=True)
    _write_metrics(history, (*COUNTS, *columns), out / "metrics.jsonl")
    steps = [entry for entry in history if "loss" in entry]
    learning = _learning(history, len(held), languages_apart(rows, held, held_out))
    return _summary(steps, tokens, len(rows), resumed) | learning


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


def read_mixture(mixture: Path, *, pairs: bool = False) -> tuple[list[dict[str, Any]], str]:
    """The rows of rows.jsonl and its sha256; with `pairs` every row must have a rejected answer.

    Raises:
        DataError: the file cannot be read, or a row is broken; names file and row.
    """
    file = mixture / "rows.jsonl"
    parts = ("prompt", "completion", *(("rejected",) if pairs else ()))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the mixture: {error.strerror}", where=str(file)) from error
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
            if pairs and "rejected" not in row:
                raise DataError(
                    "the row has no rejected answer", where=f"{file}:{number}", do="train on it with method: sft"
                )
            whole = all(turn["role"] and turn["content"] for part in parts for turn in row[part])
        except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError("not a mixture row", where=f"{file}:{number}") from error
        if not whole or not all(row[part] for part in parts):
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


def _load(model: Path, settings: TrainSettings) -> Any:
    """The model in fp32, with the attention that transformers picks for it (sdpa where it allows, else eager).

    Under an adapter its weights never change, so bf16 ones stay as they are stored where the arithmetic is bf16 too.
    """
    import torch

    from mixmerge.model.loading import load_pretrained
    from mixmerge.train.adapter import keep_trainable, quantisation

    frozen = settings.adapter is not None and settings.precision == "bf16" and stored_dtype(model) == "bfloat16"
    dtype = torch.bfloat16 if frozen else torch.float32
    network = load_pretrained("AutoModelForCausalLM", model, dtype=dtype, **quantisation(settings.adapter))
    keep_trainable(network)
    return network


def _keep_configs(network: Any) -> tuple[Any, Any]:
    from copy import deepcopy

    return deepcopy(network.config), deepcopy(network.generation_config)


def _whole(network: Any, model: Path, dtype: Any, weights: Mapping[str, Any] | None) -> Any:
    """The network, or one that has the `weights`, where it does not hold them whole itself."""
    if weights is None:
        return network
    from mixmerge.model.loading import load_pretrained

    whole = load_pretrained("AutoModelForCausalLM", model, dtype=dtype)
    whole.load_state_dict(weights)
    return whole


def _save(network: Any, configs: tuple[Any, Any], dtype: Any, out: Path) -> None:
    """Weights in `dtype` with the base's own configuration."""
    # The trainer aligns special tokens in both configurations with the tokenizer; a trained model must not differ.
    network.config, network.generation_config = configs
    network.to(device="cpu", dtype=dtype).save_pretrained(out)


def _write_metrics(history: Sequence[Mapping[str, Any]], columns: Sequence[str], file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for entry in history:
            if "loss" in entry:
                line = {"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]}
                line |= {column: entry[column] for column in columns}
            elif shown := nested(entry):
                line = {"step": entry["step"], "held_out": shown}
            else:
                continue
            stream.write(json.dumps(line) + "\n")


def _learning(history: Sequence[Mapping[str, Any]], held: int, apart: Mapping[str, Any]) -> Measured:
    """What held-out rows said before the first step and after the last, if there are any; languages that are `apart`."""
    if not held:
        return {}
    shown = [found for entry in history if (found := nested(entry))]
    ends = {"before": shown[0], "after": shown[-1]} if shown else {}
    return {"held_out": {"rows": held, **ends, **apart}}


def _summary(history: Sequence[Mapping[str, Any]], tokens: Any, rows: int, resumed: int) -> Measured:
    """What came of the training; `resumed`: its steps that earlier processes took, which a kill ended."""
    import resource

    import torch

    fifth = -(-len(history) // 5)

    def ends(column: str) -> tuple[float, float]:
        """Means over the first and the last fifth of the steps."""
        values = [float(entry[column]) for entry in history]
        return sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth

    read = sum(int(entry["tokens"]) for entry in history)
    seconds = sum(float(entry["seconds"]) for entry in history)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, last = ends("loss")
    margins = dict(zip(("first_margin", "last_margin"), ends("rewards/margins"), strict=True)) if tokens.pairs else {}
    return {
        "steps": len(history),
        "rows": rows,
        "tokens": read,
        "completion_tokens": sum(int(entry["completion_tokens"]) for entry in history),
        "truncated_rows": tokens.truncated,
        "dropped_rows": tokens.dropped,
        "diverging_rows": tokens.diverging,
        "first_loss": first,
        "last_loss": last,
        **margins,
        "seconds": seconds,
        "tokens_per_second": read / seconds if seconds else 0.0,
        "steps_resumed": resumed,
        "seconds_resumed": sum(float(entry["seconds"]) for entry in history if entry["step"] <= resumed),
        "peak_rss_mb": peak / (2**20 if sys.platform == "darwin" else 2**10),
        **({"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}),
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
