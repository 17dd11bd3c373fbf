"""Which modules of a model an adapter can be trained on, told from the names in its files: no weight is read.

One idea: a tensor `x.weight` with more than one dimension is the weight of a module `x`, and a target names a module as PEFT
reads it: by its whole name, or by the last parts of it. Where transformers renames tensors while it loads them, or where the
files are not here, nothing is known, and training finds what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mixmerge.errors import did_you_mean
from mixmerge.merge.anatomy import place_of
from mixmerge.merge.checkpoint import open_checkpoint
from mixmerge.model.package import PACKAGES

_GEMMA3 = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def weighted_modules(folder: Path) -> frozenset[str] | None:
    """The modules of a model folder that have a matrix of weights, but for the output's, which no adapter can train.

    None where transformers may give them other names.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.get("model_type") in _renamed_types():
        return None
    found = (name.removesuffix(".weight") for name, t in checkpoint.tensors.items() if len(t.shape) > 1)
    return frozenset(name for name in found if place_of(name).kind != "head")


def packaged_modules(package: str) -> frozenset[str] | None:
    """As `weighted_modules`, of the model that a package carries; without its embeddings."""
    known = PACKAGES.get(package.lower().replace("_", "-"))
    if known is None:
        return None
    layers = range(known.config["num_hidden_layers"])
    return frozenset(f"model.layers.{layer}.{module}" for layer in layers for module in _GEMMA3)


def unmatched_target(targets: Iterable[str], modules: Iterable[str], *, restacked: bool = False) -> str | None:
    """The first of the targets that names none of the modules; with `restacked` layers may have other numbers.

    >>> unmatched_target(["q_proj", "p_proj"], ["model.layers.0.self_attn.q_proj"])
    'p_proj'
    """
    fold = (lambda name: re.sub(r"\d+", "0", name)) if restacked else str
    names = {fold(name) for name in modules}
    return next((target for target in targets if not any(_names(fold(target), name) for name in names)), None)


def nearest_target(target: str, modules: Iterable[str]) -> str:
    """Advice for a target that names no module: the linear layer that was probably meant, or all there are."""
    linear = {name.rpartition(".")[2] for name in modules if place_of(f"{name}.weight").kind != "embedding"}
    return did_you_mean(target.rpartition(".")[2], linear)


def _names(target: str, module: str) -> bool:
    # Some families' files leave out the first part of a module's name.
    return module == target or module.endswith(f".{target}") or target.endswith(f".{module}")


@cache
def _renamed_types() -> frozenset[str]:
    """The model types whose tensors transformers renames, read from its source, which takes seconds to import."""
    spec = find_spec("transformers")
    file = Path(spec.origin).parent / "conversion_mapping.py" if spec is not None and spec.origin else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return frozenset(re.findall(r'^\s+"([a-z0-9_]+)":', text, re.MULTILINE))
