"""TRL's trainers as we use them: fixed order, whole checkpoints, a loss that is watched, nothing printed or sent.

One idea: `SFTTrainer` keeps the loop, the optimiser, autocast and resuming; this subclass replaces what is slow or
unsafe here. On CPU the loss is computed on answer positions only: off Triton, TRL's fused head projects every position
through the whole vocabulary and does it again in the backward pass. Same loss; forward and backward of 170 M parameters
(1,024 tokens, bf16) took TRL's head 1.0 to 2.4 times our CPU seconds, median 1.5, in six interleaved pairs on two busy
cores. On CUDA TRL's own head is used.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mixmerge.errors import StepError
from mixmerge.train.adapter import adapter_config
from mixmerge.train.checkpoints import PREFIX, mark_whole
from mixmerge.train.fit import Place
from mixmerge.train.settings import SftSettings, TrainSettings
from mixmerge.train.tokens import IGNORED

T = TypeVar("T", bound="Watched")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def build_trainer(
    model: Any,
    tokenizer: Any,
    tokens: Any,
    order: Sequence[int],
    settings: SftSettings,
    *,
    place: Place,
    training: str,
) -> CompletionTrainer:
    """A trainer over `Tokenised` rows in their training order; `training` is its identity."""
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = CompletionTrainer(
        model=model,
        args=trainer_arguments(SFTConfig, settings, len(order), place, own),
        train_dataset=tokens.dataset(order),
        processing_class=tokenizer,
        # Given here, or TRL writes its own pad token into the model's configuration.
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding(tokenizer)),
        callbacks=callbacks(place),
        peft_config=None if settings.adapter is None else adapter_config(settings.adapter),
    )
    return watch(trainer, training)


def trainer_arguments(
    kind: Callable[..., Any], settings: TrainSettings, rows: int, place: Place, own: Mapping[str, Any]
) -> Any:
    """The TRL arguments of a training over `rows` rows; `kind` is SFTConfig or DPOConfig, `own` what it adds."""
    arguments = kind(
        output_dir=str(place.work),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,  # the dataset holds all epochs, in order
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.scheduler],
        warmup_steps=math.ceil(settings.warmup_ratio * math.ceil(rows / settings.batch_size)),
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16",
        use_cpu=place.device == "cpu" or not torch.cuda.is_available(),
        seed=settings.seed,
        max_length=None,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace a NaN loss by the mean of the losses before it
        save_strategy="steps",
        save_steps=place.checkpoint_every,
        save_total_limit=None,  # `mark_whole` removes the older ones, after the newer is safe
        dataloader_num_workers=0,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
        **own,
    )
    # Several visible GPUs would mean nn.DataParallel, which TRL refuses: this trains on one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def padding(tokenizer: Any) -> int:
    """The token that batches are filled up with; it is never read."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad if pad is not None else 0


def callbacks(place: Place) -> list[Any]:
    """What happens beside the steps of every training."""
    return [_NoLastCheckpoint(), *([_Progress(place.progress)] if place.progress is not None else [])]


def watch(trainer: T, training: str) -> T:
    """Name a new trainer's training, and keep it from printing every step to stdout."""
    trainer.training = training
    trainer.remove_callback(PrinterCallback)
    return trainer


class Watched:
    """Put before a TRL trainer: rows are tokenised and ordered already, checkpoints whole, losses finite."""

    training = ""
    args: Any
    state: Any
    train_dataset: Any
    remove_callback: Callable[[Any], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counts: Counter[str] = Counter()
        super().__init__(*args, **kwargs)
        self._since = time.perf_counter()

    def count(self, inputs: Any) -> Mapping[str, int]:
        """The `tokens` and `completion_tokens` of a batch."""
        raise TypeError(f"{type(self).__name__} does not say what it counts")

    def _send_telemetry(self) -> None:
        """Send nothing, whatever the environment says."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no README into checkpoints."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._counts.update(self.count(inputs))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._refuse_nonfinite("loss", float(loss), self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._refuse_nonfinite("gradient norm", float(logs.get("grad_norm", 0.0)), self.state.global_step)
            now = time.perf_counter()
            logs.update(self._counts, seconds=now - self._since)
            self._since = now
            self._counts.clear()
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        mark_whole(Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}", self.training)

    def _refuse_nonfinite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise StepError(
                f"the {what} is {value} at step {step} of {self.state.max_steps}",
                do="lower the learning rate, lengthen the warmup, or look for damaged weights in the model",
            )


class CompletionTrainer(Watched, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` over rows that are tokenised, labelled and ordered already."""

    def count(self, inputs: Any) -> Mapping[str, int]:
        return {
            "tokens": int(inputs["attention_mask"].sum()),
            "completion_tokens": int((inputs["labels"] != IGNORED).sum()),
        }

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the batch's answer tokens."""
        if self.args.device.type == "cuda":
            loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss
        answers = inputs["labels"][:, 1:]
        learned = answers != IGNORED
        # The model's own forward with a narrower head keeps every architecture's scaling and soft-capping of logits.
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][learned],))
        try:
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        finally:
            hook.remove()
        total = torch.nn.functional.cross_entropy(logits.float(), answers[learned], reduction="sum")
        mean: torch.Tensor = total / (learned.sum() if num_items_in_batch is None else num_items_in_batch)
        return mean


class _NoLastCheckpoint(TrainerCallback):  # type: ignore[misc]
    """The model is written right after the last step: a checkpoint of it, twelve bytes a weight, would be for nothing."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
