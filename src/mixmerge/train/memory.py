"""How much memory a training needs: weights, gradients, optimiser, activations and logits, in bytes; and what to change.

The one idea: all but the activations is arithmetic on the number of weights, and activations follow from the shape of the
model (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.1, without the attention matrix, which fused
attention never keeps, and with the gated feed-forward of today's models). An estimate, to choose a batch by: the libraries
themselves and the allocator come on top. So advice is the same arithmetic over again, with one setting changed.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mixmerge.errors import MixmergeError, StepError, reason
from mixmerge.merge.checkpoint import open_checkpoint, read_json
from mixmerge.model.folder import first_number, text_part
from mixmerge.train.settings import Adapter, Devices, DpoSettings, TrainSettings

ALONE = Devices()
LINEAR = 7  # matrices of a layer, in most families: q, k, v, o, gate, up, down
# bytes that an optimiser keeps a weight; adafactor's are few
MOMENTS = {"adamw": 8, "adafactor": 0, "sgd": 0, "rmsprop": 4, "adagrad": 4}
MOMENTS |= {"adamw_8bit": 2, "lion": 4}
SAID = ("out of memory", "allocate memory", "bad_alloc", "bad allocation")  # torch on CUDA; torch, Linux; C++


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
    """Bytes of one training, on each of its devices."""

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
        config = text_part(read_json(folder / "config.json"))
    except MixmergeError:
        return None
    hidden = first_number(config, "hidden_size", "n_embd", "d_model")
    layers = first_number(config, "num_hidden_layers", "n_layer", "num_layers")
    vocabulary = first_number(config, "vocab_size")
    if hidden is None or layers is None or vocabulary is None:
        return None
    inner = first_number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    return Shape(sum(tensor.size for tensor in tensors.values()), layers, hidden, inner, vocabulary)


def training_memory(
    shape: Shape,
    *,
    rows: int,
    length: int,
    half: bool,
    trained: int | None = None,
    four_bits: bool = False,
    moments: int = 8,
    checkpointing: bool = False,
) -> Memory:
    """What a step over `rows` sequences of `length` tokens holds at once, under an optimiser whose `moments` are so many bytes a weight.

    `half`: arithmetic in 16 bits; what is trained, its gradients and moments are float32 in any case. `trained`: the number
    of weights that are trained, where it is not all of them (an adapter's come beside the model's, which stay in 16 bits
    where the arithmetic is, and with `four_bits` are held in 4, but for the embeddings). `checkpointing`: activations are
    kept at the layers' borders only, and computed again within one layer at a time.
    """
    own = shape.parameters if trained is None else trained
    frozen = 0 if trained is None else shape.parameters
    item, tokens = 2 if half else 4, rows * length
    # per token: attention and norms 15 h, feed-forward 2 h + 8 i, in 16 bits
    layer = tokens * (17 * shape.hidden + 8 * shape.inner) * item // 2
    border = tokens * shape.hidden * item
    activations = shape.layers * border + layer if checkpointing else shape.layers * layer
    embedded = min(frozen, shape.vocabulary * shape.hidden)
    held = item * embedded + (frozen - embedded) // 2 if four_bits else item * frozen
    # autocast keeps a 16-bit copy of what is trained during a step
    weights = held + (6 if half else 4) * own
    return Memory(weights, 4 * own, moments * own, activations, 2 * 4 * tokens * shape.vocabulary)


def settings_memory(
    shape: Shape, settings: TrainSettings, *, checkpointing: bool = False, devices: Devices = ALONE
) -> Memory:
    """What a training with these settings holds at once, in each of its processes."""
    parts = settings.gradient_accumulation * devices.size
    rows = math.ceil(settings.batch_size / parts) * (2 if isinstance(settings, DpoSettings) else 1)
    trained = None
    if settings.adapter is not None:
        targets = settings.adapter.targets
        trained = lora_weights(shape, settings.adapter.r, LINEAR if isinstance(targets, str) else len(targets))
    needed = training_memory(
        shape,
        rows=rows,
        length=settings.max_length,
        half=settings.precision == "bf16",
        trained=trained,
        four_bits=settings.adapter is not None and settings.adapter.type == "qlora",
        moments=MOMENTS[settings.optimizer],
        checkpointing=checkpointing,
    )
    if not devices.fsdp:
        return needed
    shared = {part: getattr(needed, part) // devices.size for part in ("weights", "gradients", "optimiser")}
    return replace(needed, **shared)


def memory_advice(
    model: Path, settings: TrainSettings, *, checkpointing: bool = False, devices: Devices = ALONE
) -> str:
    """What to change for a training to need less, the most effective first, with the estimate of each, in GB.

    What is set already is left out. Without the model's shape, the same without figures.
    """
    shape = shape_of(model)
    changes: dict[str, tuple[TrainSettings, bool, Devices]] = {}
    rows = settings.batch_size // devices.size
    if settings.gradient_accumulation < rows:
        parts = f"training.gradient_accumulation: {rows} (the rows of a step stay the same)"
        changes[parts] = replace(settings, gradient_accumulation=rows), checkpointing, devices
    if not checkpointing:
        changes["how.gradient_checkpointing: true"] = settings, True, devices
    if devices.size > 1 and not devices.fsdp:
        changes["how.fsdp: true"] = settings, checkpointing, replace(devices, fsdp=True)
    if settings.adapter is None:
        changes["training.adapter: {type: lora}"] = replace(settings, adapter=Adapter()), checkpointing, devices
    if settings.max_length > 2:
        half = settings.max_length // 2
        shorter = replace(settings, max_length=half)
        changes[f"training.max_length: {half} (longer rows are cut)"] = shorter, checkpointing, devices
    if shape is None:
        return f"set {' or '.join(changes)}" if changes else "train a smaller model"
    needs = {
        text: settings_memory(shape, changed, checkpointing=asked, devices=others).total
        for text, (changed, asked, others) in changes.items()
    }
    now = settings_memory(shape, settings, checkpointing=checkpointing, devices=devices).total
    told = [f"{text}: {_gb(needs[text])}" for text in sorted(needs, key=lambda text: needs[text])]
    return f"it needs {_gb(now)} by estimate; set {', or '.join(told)}" if told else f"it needs {_gb(now)} by estimate"


@contextmanager
def naming_lack_of_memory(
    model: Path, settings: TrainSettings, *, checkpointing: bool = False, devices: Devices = ALONE
) -> Iterator[None]:
    """Turn whatever torch, Python or the system says of missing memory into a StepError with `memory_advice`.

    Raises:
        StepError: memory ran out within.
    """
    try:
        yield
    except Exception as error:
        lack = _lack(error)
        if lack is None:
            raise
        do = memory_advice(model, settings, checkpointing=checkpointing, devices=devices)
        raise StepError(f"the training ran out of memory ({reason(lack)})", do=do) from error


def _lack(error: BaseException) -> BaseException | None:
    """The error, or its cause, that says that memory ran out; None where none does."""
    at: BaseException | None = error
    while at is not None:
        said = str(at).lower()
        if (
            isinstance(at, MemoryError)
            or (isinstance(at, OSError) and at.errno == errno.ENOMEM)
            or (isinstance(at, RuntimeError) and any(words in said for words in SAID))
        ):
            return at
        at = at.__cause__
    return None


def _gb(amount: int) -> str:
    return f"about {amount / 1e9:.1f} GB"


def lora_weights(shape: Shape, rank: int, modules: int) -> int:
    """About how many weights a LoRA of that rank has on `modules` matrices of every layer."""
    return shape.layers * modules * rank * (shape.hidden + math.ceil((shape.hidden + shape.inner) / 2))
