"""Supervised fine-tuning of a model folder on the answers in a mixture.

One idea: the call is its own resumption (see fit.py). Light to import; torch comes with the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mixmerge.train.fit import Measured, Place, fit
from mixmerge.train.settings import SftSettings


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
    gradient_checkpointing: bool = False,
    evaluate_every: int | None = None,
    report_to: Sequence[str] = (),
    cache: Path | None = None,
) -> Measured:
    """Train `model` on the answers in `mixture` (a folder with rows.jsonl); write a model folder into `out`.

    `out` gets weights, configuration, tokenizer and metrics.jsonl (step, loss, lr, tokens, completion_tokens). `work`
    holds the last checkpoint, written every `checkpoint_every` steps. `threads` None leaves torch's own choice; `device`
    auto is CUDA where there is one, else the CPU; `gradient_checkpointing` computes the forward pass twice to keep less of
    it in memory, and changes no weight. Counted: `tokens` and `completion_tokens` that were read, `truncated_rows`
    cut at max_length, `dropped_rows` whose prompt fills it, `diverging_rows` whose template renders the prompt
    differently before an answer. Rows held out are read before, after and every `evaluate_every` steps: lines of metrics.jsonl
    with `held_out`, per language the loss in nats a token. `report_to` names loggers of transformers. `cache` is a folder that
    keeps tokenised rows for other trainings on them. `first_loss` and `last_loss` are means over a fifth of the steps: one batch's says little.

    Raises:
        UserError: `device` cuda where there is none.
        ModelError: a model folder that cannot be loaded or has no chat template.
        DataError: a mixture that is missing, broken, or of which no row fits.
        StepError: loss or gradient is not finite, memory ran out, or `work` belongs to another training.
    """

    def prepare() -> tuple[Callable[..., object], Callable[..., object]]:
        from mixmerge.train.tokens import tokenise
        from mixmerge.train.trainer import build_trainer

        return partial(tokenise, all_turns=settings.train_on == "all"), build_trainer

    place = Place(
        work,
        threads,
        device,
        checkpoint_every=checkpoint_every,
        progress=progress,
        gradient_checkpointing=gradient_checkpointing,
        evaluate_every=evaluate_every,
        report_to=report_to,
        cache=cache,
    )
    return fit(model, mixture, out, settings, prepare, place)
