"""How to train, as values that are checked when they are made: what SFT and DPO share, and what each adds.

One idea: whatever can change a trained weight is a field here and nothing else is, so a checkpoint or a step is known by
its settings. A field's default is what a recipe means that does not name it. Light to import: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from mixmerge.errors import UserError

GENERAL = "training settings"  # where an error stands that a recipe can place better
DTYPES = ("bfloat16", "float16", "float32")
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
OPTIMIZERS = {  # ours -> TRL's
    "adamw": "adamw_torch_fused",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
    "adamw_8bit": "adamw_bnb_8bit",
    "lion": "lion_32bit",
}
BITSANDBYTES = ("adamw_8bit", "lion")  # optimisers of that package
SCHEDULES = {  # ours -> TRL's
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_min_lr": "cosine_with_min_lr",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "warmup_stable_decay",
}
# A schedule that asks for more than a peak and a warmup: one of these has to be among extra's lr_scheduler_kwargs.
ASKED = {"cosine_with_min_lr": ("min_lr", "min_lr_rate"), "warmup_stable_decay": ("num_decay_steps",)}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's other losses do not read label_smoothing


@dataclass(frozen=True, slots=True)
class Devices:
    """What a training is spread over: `processes` on each of `nodes`, a device each. No weight depends on it.

    With `fsdp` they share out weights, gradients and moments too (FSDP2; Zhao et al. 2023), and not the rows alone.
    """

    processes: int = 1
    nodes: int = 1
    fsdp: bool = False

    @property
    def size(self) -> int:
        """How many processes train together."""
        return self.processes * self.nodes

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Devices:
        """The devices that the `how` of a train step names."""
        return cls(**{part.name: how[part.name] for part in fields(cls) if part.name in how})


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank matrices trained in place of the weights (Hu et al. 2021; dora: Liu et al. 2024).

    Their product is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023). `targets` are module
    names, or all-linear: every linear layer but the output's. qlora is lora on a base held in 4 bits while training.
    """

    type: Literal["lora", "dora", "qlora"] = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        limits = {
            "type": self.type in ("lora", "dora", "qlora"),
            "r": self.r >= 1,
            "alpha": 0 < self.alpha < math.inf,
            "dropout": 0 <= self.dropout < 1,
            "targets": self.targets == "all-linear" or (not isinstance(self.targets, str) and len(self.targets) > 0),
        }
        _refuse((name for name, holds in limits.items() if not holds), self, "adapter.")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What every training has. `max_length` in tokens; `save_dtype` None keeps the dtype of the base.

    `batch_size` rows make an optimiser step, computed in `gradient_accumulation` equal parts. A gradient whose norm is above
    `max_grad_norm` is scaled down to it (0: never). `neftune_alpha` adds noise to the embeddings (Jain et al. 2023).
    `held_out` is the share of the prompts that are never trained on and show the learning.
    `extra` holds other fields of TRL's SFTConfig or DPOConfig.

    Raises:
        UserError: a value out of range, named with its key.
    """

    method: ClassVar[str] = ""

    learning_rate: float = 2e-5
    epochs: float = 1.0
    batch_size: int = 8
    max_length: int = 512
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    adapter: Adapter | None = None
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    neftune_alpha: float | None = None
    held_out: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse((name for name, holds in self._limits() if not holds), self)
        asked, told = ASKED.get(self.scheduler, ()), self.extra.get("lr_scheduler_kwargs")
        if asked and not (isinstance(told, Mapping) and any(name in told for name in asked)):
            what = f"scheduler {self.scheduler} needs {' or '.join(asked)}"
            do = f"set extra: {{lr_scheduler_kwargs: {{{asked[0]}: ...}}}}"
            raise UserError(what, where="training.scheduler", do=do)

    @property
    def needs_bitsandbytes(self) -> str | None:
        """What of these settings needs that package, if anything does."""
        if self.adapter is not None and self.adapter.type == "qlora":
            return "qlora"
        return f"optimizer {self.optimizer}" if self.optimizer in BITSANDBYTES else None

    def _limits(self) -> Iterator[tuple[str, bool]]:
        """Each field with whether its value can be."""
        yield "learning_rate", 0 < self.learning_rate < math.inf
        yield "epochs", 0 < self.epochs < math.inf
        yield "batch_size", self.batch_size >= 1
        yield "max_length", self.max_length >= 2
        yield "warmup_ratio", 0 <= self.warmup_ratio <= 1
        yield "scheduler", self.scheduler in SCHEDULES
        yield "weight_decay", 0 <= self.weight_decay < math.inf
        yield "precision", self.precision in ("bf16", "fp32")
        yield "seed", 0 <= self.seed < 2**32
        yield "save_dtype", self.save_dtype in (None, *DTYPES)
        parts = self.gradient_accumulation
        yield "gradient_accumulation", parts >= 1 and self.batch_size % parts == 0
        yield "optimizer", self.optimizer in OPTIMIZERS
        yield "adam_betas", len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas)
        yield "adam_epsilon", 0 < self.adam_epsilon < 1
        yield "max_grad_norm", 0 <= self.max_grad_norm < math.inf
        yield "held_out", 0 <= self.held_out < 1
        yield "neftune_alpha", self.neftune_alpha is None or 0 < self.neftune_alpha < math.inf


@dataclass(frozen=True, slots=True)
class SftSettings(TrainSettings):
    """Supervised fine-tuning on answers: the last of a conversation, or `train_on` all of them.

    `padding_free` puts the rows of a batch one after another in place of padding them to the longest.
    """

    method: ClassVar[str] = "sft"

    train_on: Literal["last", "all"] = "last"
    padding_free: bool = False

    def _limits(self) -> Iterator[tuple[str, bool]]:
        yield from TrainSettings._limits(self)
        yield "train_on", self.train_on in ("last", "all")


@dataclass(frozen=True, slots=True)
class DpoSettings(TrainSettings):
    """Direct preference optimisation (Rafailov et al. 2023) on pairs of answers.

    `beta` scales the rewards: larger stays nearer to the start. `loss` is one of TRL's; `label_smoothing` is the share of
    pairs taken to be labelled the wrong way round, for the losses in SMOOTHED alone.
    """

    method: ClassVar[str] = "dpo"

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0

    def _limits(self) -> Iterator[tuple[str, bool]]:
        yield from TrainSettings._limits(self)
        yield "beta", 0 < self.beta < math.inf
        yield "loss", self.loss in LOSSES
        smooth = self.label_smoothing
        yield "label_smoothing", 0 <= smooth < 0.5 and (smooth == 0 or self.loss in SMOOTHED)
        yield "label_smoothing", smooth > 0 or self.loss != "exo_pair"

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        if self.adapter is not None and self.adapter.dropout > 0:
            raise UserError(
                "adapter.dropout has no effect with method: dpo, which compares log-probabilities without dropout",
                where=GENERAL,
                do="set it to 0",
            )


METHODS: Mapping[str, type[SftSettings | DpoSettings]] = {"sft": SftSettings, "dpo": DpoSettings}


def settings_from(what: Mapping[str, Any]) -> SftSettings | DpoSettings:
    """The settings that a train step's `what` stands for; keys that it leaves out have their defaults."""
    values = {key: value for key, value in what.items() if key != "method"}
    if "adam_betas" in values:
        values["adam_betas"] = tuple(values["adam_betas"])
    if values.get("adapter") is not None:
        told = dict(values["adapter"])
        if not isinstance(told.get("targets", ""), str):
            told["targets"] = tuple(told["targets"])
        values["adapter"] = Adapter(**told)
    return METHODS[what["method"]](**values)


def _refuse(wrong: Iterator[str], settings: Any, within: str = "") -> None:
    for name in wrong:
        raise UserError(f"{within}{name} cannot be {getattr(settings, name)!r}", where=GENERAL)
