"""TRL's trainers as we use them: fixed order, whole checkpoints, a loss that is watched, nothing printed or sent.

One idea: `SFTTrainer` keeps the loop, the optimiser, autocast and resuming; this subclass replaces what is slow or
unsafe here. On CPU the loss is computed on answer positions only: off Triton, TRL's fused head projects every position
through the whole vocabulary and does it again in the backward pass. Same loss; forward and backward of 170 M parameters
(1,024 tokens, bf16) took TRL's head 1.0 to 2.4 times our CPU seconds, median 1.5, in six interleaved pairs on two busy
cores. On CUDA TRL's own head is used.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mixmerge.errors import StepError
from mixmerge.train import group
from mixmerge.train.adapter import adapter_config
from mixmerge.train.checkpoints import PREFIX, mark_whole
from mixmerge.train.extra import with_extra
from mixmerge.train.fit import Place
from mixmerge.train.heldout import PREFIX as HELD_OUT
from mixmerge.train.settings import OPTIMIZERS, SCHEDULES, SftSettings, TrainSettings
from mixmerge.train.tokens import BLANK, IGNORED, Tokenised

T = TypeVar("T", bound="Watched")


def build_trainer(
    model: Any,
    tokenizer: Any,
    tokens: Any,
    order: Sequence[int],
    settings: SftSettings,
    *,
    place: Place,
    training: str,
    held: Mapping[str, Tokenised] | None = None,
) -> CompletionTrainer:
    """A trainer over `Tokenised` rows in their training order; `training` is its identity, `held` its held-out rows."""
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "padding_free": settings.padding_free}
    blanks = blanks_of(order, settings)
    trainer = CompletionTrainer(
        model=model,
        args=trainer_arguments(SFTConfig, settings, len(order), place, own),
        train_dataset=tokens.dataset([*order, *[len(tokens.kept)] * blanks]),
        processing_class=tokenizer,
        # Given here, or TRL writes its own pad token into the model's configuration.
        data_collator=None if settings.padding_free else DataCollatorForLanguageModeling(padding(tokenizer)),
        callbacks=callbacks(place),
        peft_config=None if settings.adapter is None else adapter_config(settings.adapter),
    )
    return watch(trainer, training, held, place, blanks)


def forget_overrides() -> None:
    """Drop what bitsandbytes keeps of earlier trainings in this process.

    It knows embeddings, whose moments stay in 32 bits, by their address; other weights of a new training may have that one.
    """
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()


def trainer_arguments(
    kind: Callable[..., Any], settings: TrainSettings, rows: int, place: Place, own: Mapping[str, Any]
) -> Any:
    """The TRL arguments of a training over `rows` rows; `kind` is SFTConfig or DPOConfig, `own` what it adds."""
    forget_overrides()
    arguments = with_extra(
        kind,
        settings.extra,
        output_dir=str(place.work),
        per_device_train_batch_size=settings.batch_size // settings.gradient_accumulation // group.size(),
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=1,  # the dataset holds all epochs, in order
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.scheduler],
        warmup_steps=math.ceil(settings.warmup_ratio * math.ceil(rows / settings.batch_size)),
        weight_decay=settings.weight_decay,
        optim=OPTIMIZERS[settings.optimizer],
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        neftune_noise_alpha=settings.neftune_alpha,
        bf16=settings.precision == "bf16",
        use_cpu=place.device == "cpu" or not torch.cuda.is_available(),
        seed=settings.seed,
        max_length=None,
        gradient_checkpointing=place.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace a NaN loss by the mean of the losses before it
        save_strategy="steps",
        save_steps=place.checkpoint_every,
        save_total_limit=None,  # `mark_whole` removes the older ones, after the newer is safe
        dataloader_num_workers=0,
        report_to=list(place.report_to) or "none",
        run_name=place.work.parent.name,
        disable_tqdm=True,
        push_to_hub=False,
        **own,
    )
    # Several visible GPUs would mean nn.DataParallel, which TRL refuses: this trains on one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def blanks_of(order: Sequence[int], settings: TrainSettings) -> int:
    """How many blank rows fill up the last part of a batch, so that processes have equal shares of it.

    accelerate would fill it up with the first rows, and the model would learn these again.
    """
    part = settings.batch_size // settings.gradient_accumulation
    return -len(order) % part if group.size() > 1 else 0


def padding(tokenizer: Any) -> int:
    """The token that batches are filled up with; it is never read."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad if pad is not None else 0


def callbacks(place: Place) -> list[Any]:
    """What happens beside the steps of every training."""
    return [_NoLastCheckpoint(), *([_Progress(place.progress)] if place.progress is not None else [])]


def watch(trainer: T, training: str, held: Mapping[str, Any] | None, place: Place, blanks: int) -> T:
    """Name a new trainer's training, its held-out and its blank rows, and keep it from printing every step to stdout.

    What it trains is float32, also where TRL has made it bf16, beside a base in 4 bits: small updates would round away.
    """
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trainer.training = training
    trainer.blanks = blanks
    trainer.held = held or {}
    trainer.add_callback(_Readings(trainer, place.evaluate_every))
    trainer.remove_callback(PrinterCallback)
    return trainer


class Watched:
    """Put before a TRL trainer: rows are tokenised and ordered already, checkpoints whole, losses finite."""

    training = ""
    blanks = 0
    blank_tokens = BLANK
    args: Any
    state: Any
    train_dataset: Any
    held: Mapping[str, Any]
    model: Any
    data_collator: Callable[[Any], Any]
    add_callback: Callable[[Any], None]
    remove_callback: Callable[[Any], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counts: Counter[str] = Counter()
        super().__init__(*args, **kwargs)
        group.share_weights(self)
        self._since = time.perf_counter()

    def count(self, inputs: Any) -> Mapping[str, int]:
        """The `tokens` and `completion_tokens` of a batch."""
        raise TypeError(f"{type(self).__name__} does not say what it counts")

    def measure(self, lang: str, rows: Any) -> dict[str, float]:
        """What held-out rows of a language say of the model now, by measure."""
        raise TypeError(f"{type(self).__name__} does not say what it measures")

    def can_carry_on(self) -> bool:
        """Whether there is what a checkpoint needs beside itself."""
        return True

    def read_start(self) -> None:
        """Take what has to be known of the model before its first step."""

    def log_held_out(self) -> None:
        """Log what the held-out rows say, language by language, as `held_out/<language>/<measure>`."""
        if not self.held:
            return
        began, training = time.perf_counter(), self.model.training
        self.model.eval()
        found: dict[str, float] = {}
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            for lang, rows in self.held.items():
                found |= {f"{HELD_OUT}{lang}/{name}": value for name, value in self.measure(lang, rows).items()}
        self._metrics["eval"].clear()  # type: ignore[attr-defined]  # TRL's own, over all languages
        self.log(found)
        self.model.train(training)
        self._since += time.perf_counter() - began

    def batches(self, dataset: Any) -> Iterator[tuple[range, Any]]:
        """This process's share of a dataset's batches, on its device, with the rows that each holds.

        All processes get equally many, for where weights are shared out they have to ask together: where the batches do not
        come out even, some get the first one once more, with no rows to count.
        """
        size, whole = self.args.per_device_train_batch_size, len(dataset)
        begins = range(0, whole, size)
        for turn in range(group.rank(), -(-len(begins) // group.size()) * group.size(), group.size()):
            own = range(begins[turn], min(begins[turn] + size, whole)) if turn < len(begins) else range(0)
            rows = [dataset[at] for at in own or range(min(size, whole))]
            yield own, self._prepare_inputs(self.data_collator(rows))  # type: ignore[attr-defined]

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Leave a model that is to be shared out where it is: no device has to hold the whole of it."""
        if not group.devices().fsdp:
            super()._move_model_to_device(model, device)  # type: ignore[misc]

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
            logs.update(zip(self._counts, group.total(list(self._counts.values())), strict=True))
            if self.state.global_step == self.state.max_steps:
                logs["tokens"] -= self.blanks * self.blank_tokens
            logs["seconds"] = now - self._since
            self._since = now
            self._counts.clear()
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        group.total([0])  # every process has written its own random state there
        if group.first():
            checkpoint = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
            mark_whole(checkpoint, self.training, fsdp=group.devices().fsdp)

    def _refuse_nonfinite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise StepError(
                f"the {what} is {value} at step {step} of {self.state.max_steps}",
                do="lower the learning rate, lengthen the warmup, or look for damaged weights in the model",
            )


class CompletionTrainer(Watched, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` over rows that are tokenised, labelled and ordered already."""

    def count(self, inputs: Any) -> Mapping[str, int]:
        mask = inputs.get("attention_mask")
        return {
            "tokens": inputs["input_ids"].numel() if mask is None else int(mask.sum()),
            "completion_tokens": int((inputs["labels"] != IGNORED).sum()),
        }

    def measure(self, lang: str, rows: Tokenised) -> dict[str, float]:
        """Mean negative log-likelihood of an answer's token, in nats, over all tokens of the rows."""
        total = tokens = 0.0
        learnt, self.args.loss_type = self.args.loss_type, "nll"
        for own, batch in self.batches(rows.dataset(by_length(rows))):
            # As if each process had rows of its own, the loss is given times their number.
            loss = float(self.compute_loss(self.model, batch, num_items_in_batch=torch.tensor(1))) / group.size()
            if own:
                total += loss
                tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        self.args.loss_type = learnt
        total, tokens = group.total_of_floats([total, tokens])
        return {"loss": float(total / max(tokens, 1))}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss of the batch's answer tokens: their negative log-likelihood; with dft each times its probability.

        DFT: Wu et al. 2025, https://arxiv.org/abs/2508.05629.
        """
        if self.args.device.type == "cuda" or self.aux_loss_enabled:
            loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss
        answers = inputs["labels"][:, 1:]
        learned = answers != IGNORED
        # The model's own forward with a narrower head keeps every architecture's scaling and soft-capping of logits.
        layout = {key: inputs[key] for key in ("attention_mask", "position_ids") if key in inputs}
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][learned],))
        try:
            logits = model(input_ids=inputs["input_ids"], **layout, use_cache=False).logits
        finally:
            hook.remove()
        losses = torch.nn.functional.cross_entropy(logits.float(), answers[learned], reduction="none")
        if self.args.loss_type == "dft":
            losses = losses * (-losses).exp().detach()
        # What is given counts the tokens of all processes, whose gradients DDP averages.
        tokens = learned.sum() if num_items_in_batch is None else num_items_in_batch / group.size()
        mean: torch.Tensor = losses.sum() / tokens
        return mean


def by_length(rows: Any) -> list[int]:
    """The rows with like lengths beside each other."""
    lengths = rows.lengths
    return sorted(range(len(lengths)), key=lambda row: lengths[row])


class _Readings(TrainerCallback):  # type: ignore[misc]
    """Reads the start and the held-out rows before the first step, and these between; one that carries on has done so."""

    def __init__(self, trainer: Watched, every: int | None) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.read_start()
            self.trainer.log_held_out()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.trainer.log_held_out()
            control.should_log = True  # that log took the place of the step's own


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
