"""How much memory a training needs, before it runs: weights, gradients, optimiser, activations and logits, in bytes.

The one idea: all but the activations is arithmetic on the number of weights, and activations follow from the shape of the
model (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.1, without the attention matrix, which fused
attention never keeps, and with the gated feed-forward of today's models). An estimate, to choose a batch by: the libraries
themselves and the allocator come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import MixmergeError
from mixmerge.merge.checkpoint import open_checkpoint, read_json
from mixmerge.plan.graph import Plan, Step
from mixmerge.train.settings import Adapter

LINEAR = 7  # matrices of a layer, in most families: q, k, v, o, gate, up, down


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model: its number of weights, and the sizes of its configuration."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training, on the one device that trains."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits


def shape_of(folder: Path) -> Shape | None:
    """The shape of a model folder, from headers and config.json; None where these do not tell it."""
    try:
        tensors = open_checkpoint(folder).tensors
        config = read_json(folder / "config.json")
    except MixmergeError:
        return None
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    vocabulary = _first(config, "vocab_size")
    if hidden is None or layers is None or vocabulary is None:
        return None
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    return Shape(sum(tensor.size for tensor in tensors.values()), layers, hidden, inner, vocabulary)


def training_memory(
    shape: Shape,
    *,
    rows: int,
    length: int,
    half: bool,
    trained: int | None = None,
    checkpointing: bool = False,
) -> Memory:
    """What a step over `rows` sequences of `length` tokens holds at once, under AdamW.

    `half`: arithmetic in 16 bits; weights, gradients and moments are float32 in any case. `trained`: the number of weights
    that are trained, where it is not all of them (an adapter's come beside the model's). `checkpointing`: activations are
    kept at the layers' borders only, and computed again within one layer at a time.
    """
    own = shape.parameters if trained is None else trained
    frozen = 0 if trained is None else shape.parameters
    item, tokens = 2 if half else 4, rows * length
    # per token: attention and norms 15 h, feed-forward 2 h + 8 i, in 16 bits
    layer = tokens * (17 * shape.hidden + 8 * shape.inner) * item // 2
    border = tokens * shape.hidden * item
    activations = shape.layers * border + layer if checkpointing else shape.layers * layer
    # autocast keeps a 16-bit copy of the weights during a step
    weights = 4 * (own + frozen) + (2 * (own + frozen) if half else 0)
    return Memory(weights, 4 * own, 8 * own, activations, 2 * 4 * tokens * shape.vocabulary)


def plan_memory(plan: Plan, find: Callable[[str], Path | None]) -> dict[str, Memory]:
    """The estimate of every training of a plan, by step id; `find` gives the folder of a finished step.

    Empty where the base's shape is not known yet: a Hub id, a package or a trimmed vocabulary that was not brought in.
    """
    base = plan.by_id[plan.models["base"]]
    folder = find(base.id)
    if folder is None and "path" in base.how and base.what["trim"] is None:
        folder = Path(base.how["path"])
    shape = None if folder is None else shape_of(folder)
    if shape is None:
        return {}
    trainings = (step for step in plan.steps if step.kind == "train" and step.what.get("engine") != "command")
    return {step.id: _of_step(step, shape) for step in trainings}


def _of_step(step: Step, shape: Shape) -> Memory:
    what, adapter = step.what, step.what.get("adapter")
    rows = math.ceil(what["batch_size"] / what.get("gradient_accumulation", 1)) * (2 if what["method"] == "dpo" else 1)
    trained = None
    if adapter is not None:
        targets = adapter.get("targets", "all-linear")
        modules = LINEAR if isinstance(targets, str) else len(targets)
        trained = lora_weights(shape, adapter.get("r", Adapter().r), modules)
    return training_memory(
        shape,
        rows=rows,
        length=what["max_length"],
        half=what["precision"] == "bf16",
        trained=trained,
        checkpointing=bool(step.how.get("gradient_checkpointing")),
    )


def memory_lines(plan: Plan, found: Mapping[str, Memory]) -> Iterator[str]:
    """One line for each amount, with the trainings that need it."""
    alike: dict[Memory, list[str]] = {}
    for step in plan.steps:
        if step.id in found:
            alike.setdefault(found[step.id], []).append(step.name)
    for memory, names in alike.items():
        parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:.1f}" for name in memory.__slots__)
        yield f"memory to train {', '.join(names)}: about {memory.total / 1e9:.1f} GB ({parts})"


def lora_weights(shape: Shape, rank: int, modules: int) -> int:
    """About how many weights a LoRA of that rank has on `modules` matrices of every layer."""
    return shape.layers * modules * rank * (shape.hidden + math.ceil((shape.hidden + shape.inner) / 2))


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
