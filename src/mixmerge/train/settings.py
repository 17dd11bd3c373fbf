"""How to train, as values that are checked when they are made: what SFT and DPO share, and what each adds.

One idea: whatever can change a trained weight is a field here and nothing else is, so a checkpoint or a step is known by
its settings. A field's default is what a recipe means that does not name it. Light to import: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mixmerge.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's other losses do not read label_smoothing


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

    Raises:
        UserError: a value out of range, named with its key.
    """

    method: ClassVar[str] = ""

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
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        _refuse((name for name, holds in self._limits() if not holds), self)

    def _limits(self) -> Iterator[tuple[str, bool]]:
        """Each field with whether its value can be."""
        yield "learning_rate", 0 < self.learning_rate < math.inf
        yield "epochs", 0 < self.epochs < math.inf
        yield "batch_size", self.batch_size >= 1
        yield "max_length", self.max_length >= 2
        yield "warmup_ratio", 0 <= self.warmup_ratio <= 1
        yield "scheduler", self.scheduler in ("cosine", "linear", "constant")
        yield "weight_decay", 0 <= self.weight_decay < math.inf
        yield "precision", self.precision in ("bf16", "fp32")
        yield "seed", 0 <= self.seed < 2**32
        yield "save_dtype", self.save_dtype in (None, *DTYPES)


@dataclass(frozen=True, slots=True)
class SftSettings(TrainSettings):
    """Supervised fine-tuning on answers."""

    method: ClassVar[str] = "sft"


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
                where="training settings",
                do="set it to 0",
            )


METHODS: Mapping[str, type[SftSettings | DpoSettings]] = {"sft": SftSettings, "dpo": DpoSettings}


def settings_from(what: Mapping[str, Any]) -> SftSettings | DpoSettings:
    """The settings that a train step's `what` stands for; keys that it leaves out have their defaults."""
    values = {key: value for key, value in what.items() if key != "method"}
    if values.get("adapter") is not None:
        told = dict(values["adapter"])
        if not isinstance(told.get("targets", ""), str):
            told["targets"] = tuple(told["targets"])
        values["adapter"] = Adapter(**told)
    return METHODS[what["method"]](**values)


def _refuse(wrong: Iterator[str], settings: Any, within: str = "") -> None:
    for name in wrong:
        raise UserError(f"{within}{name} cannot be {getattr(settings, name)!r}", where="training settings")
