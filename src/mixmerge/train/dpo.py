"""Direct preference optimisation of a model folder on the pairs of answers in a mixture, by TRL's DPOTrainer.

The loss of a pair is -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected)), a log-ratio being that of
the answer's probability under the model to that under the start (Rafailov et al. 2023, equation 7). One idea: the start's
log-probabilities are taken once, before the first step, and kept beside the checkpoints, so that one model is in memory
and a training that carries on asks for them no more. Light to import; torch comes with the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from mixmerge.train.fit import Measured, Place, fit
from mixmerge.train.settings import DpoSettings

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def train_dpo(
    model: Path,
    mixture: Path,
    out: Path,
    settings: DpoSettings,
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
    """Train `model` on the pairs in `mixture`, whose rows have `rejected`; the contract is that of `train_sft`.

    metrics.jsonl also has the rewards of a step (beta times the log-ratios, in nats): rewards/chosen, rewards/rejected,
    their difference rewards/margins, and rewards/accuracies, the share of pairs whose chosen answer has the larger one.
    `tokens` counts both sides of a pair, `truncated_rows` pairs of which a side was cut, `dropped_rows` those whose prompt
    fills max_length or whose sides are equal once cut. Held-out pairs give loss, margin and accuracy. `first_margin` and `last_margin` are means over a fifth of the steps.

    Raises:
        UserError, ModelError, DataError, StepError: as `train_sft`; DataError also for a row without `rejected`.
    """

    def prepare() -> tuple[Callable[..., object], Callable[..., object]]:
        from mixmerge.train.pairs import build_trainer
        from mixmerge.train.tokens import tokenise_pairs

        return tokenise_pairs, build_trainer

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
    return fit(model, mixture, out, settings, prepare, place, pairs=True, columns=REWARDS)
