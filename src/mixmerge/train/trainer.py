"""The TRL trainer as we use it: fixed order, whole checkpoints, a loss that is watched, nothing printed or sent.

One idea: `SFTTrainer` keeps the loop, the optimiser, autocast and resuming; this subclass replaces what is slow or
unsafe here. On CPU the loss is computed on answer positions only: off Triton, TRL's fused head projects every position
through the whole vocabulary and does it again in the backward pass. Same loss; forward and backward of 170 M parameters
(1,024 tokens, bf16) took TRL's head 1.0 to 2.4 times our CPU seconds, median 1.5, in six interleaved pairs on two busy
cores. On CUDA TRL's own head is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mixmerge.errors import StepError
from mixmerge.train.checkpoints import PREFIX, mark_whole
from mixmerge.train.tokens import IGNORED

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def build_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    settings: Any,
    *,
    work: Path,
    training: str,
    on_cpu: bool,
    checkpoint_every: int,
    progress: Callable[[int, int], None] | None,
) -> CompletionTrainer:
    """A trainer over tokenised rows in their training order; `settings` is an `SftSettings`, `training` its identity."""
    arguments = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,  # the dataset holds all epochs, in order
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.scheduler],
        warmup_steps=math.ceil(settings.warmup_ratio * math.ceil(len(dataset) / settings.batch_size)),
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16",
        use_cpu=on_cpu,
        seed=settings.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace a NaN loss by the mean of the losses before it
        save_strategy="steps",
        save_steps=checkpoint_every,
        save_total_limit=None,  # `mark_whole` removes the older ones, after the newer is safe
        dataloader_num_workers=0,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )
    # Several visible GPUs would mean nn.DataParallel, which TRL refuses: this trains on one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        # Given here, or TRL writes its own pad token into the model's configuration.
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad if pad is not None else 0),
        callbacks=[_NoLastCheckpoint(), *([_Progress(progress)] if progress is not None else [])],
    )
    trainer.training = training
    trainer.remove_callback(PrinterCallback)  # it prints every step to stdout
    return trainer


class CompletionTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` over rows that are tokenised, labelled and ordered already."""

    training = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: dict[str, int] = {}
        self._since = time.perf_counter()

    def _send_telemetry(self) -> None:
        """Send nothing, whatever the environment says."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no README into checkpoints."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._counts = {
            "tokens": int(inputs["attention_mask"].sum()),
            "completion_tokens": int((inputs["labels"] != IGNORED).sum()),
        }
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_nonfinite("loss", float(loss), self.state.global_step + 1)
        return loss

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._refuse_nonfinite("gradient norm", float(logs.get("grad_norm", 0.0)), self.state.global_step)
            now = time.perf_counter()
            logs.update(self._counts, seconds=now - self._since)
            self._since = now
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        mark_whole(Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}", self.training)

    def _refuse_nonfinite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise StepError(
                f"the {what} is {value} at step {step} of {self.state.max_steps}",
                do="lower the learning rate, lengthen the warmup, or look for damaged weights in the model",
            )


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
