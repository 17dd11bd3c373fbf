"""Supervised fine-tuning of a model folder on the answers in a mixture.

One idea: the call is its own resumption (see fit.py). Light to import; torch comes with the call.
"""

from __future__ import annotations

from collections.abc import Callable
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
) -> Measured:
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

    def prepare() -> tuple[Callable[..., object], Callable[..., object]]:
        from mixmerge.train.tokens import tokenise
        from mixmerge.train.trainer import build_trainer

        return tokenise, build_trainer

    place = Place(work, threads, device, checkpoint_every, progress)
    return fit(model, mixture, out, settings, prepare, place)
