"""LoRA, DoRA and QLoRA: few weights trained beside a frozen base, then folded into it.

One idea: the adapter is kept as PEFT saves it, and the model folder is the merge of `base+adapter` with itself alone, by
mixmerge.merge: exact, and bit for bit the base's wherever the adapter does not reach. So a candidate is always a whole
model folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixmerge.errors import UserError, reason
from mixmerge.train.settings import GENERAL, Adapter, TrainSettings

FOLDER = "adapter"


def require_library(settings: TrainSettings) -> None:
    """Refuse 4-bit weights and 8-bit optimisers without the library that has them.

    Raises:
        UserError: says what to install.
    """
    if settings.needs_bitsandbytes and find_spec("bitsandbytes") is None:
        what = f"{settings.needs_bitsandbytes} needs the package bitsandbytes, which is not installed"
        raise UserError(what, where=GENERAL, do="install it: pip install 'mixmerge[qlora]'; or leave it out")


def adapter_config(adapter: Adapter) -> Any:
    """The PEFT configuration of an adapter."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.type == "dora",
    )


@contextmanager
def named_targets(adapter: Adapter | None, network: Any) -> Iterator[None]:
    """Let PEFT's refusal of the targets say which modules there are.

    Raises:
        UserError: no module of the model is called so.
    """
    try:
        yield
    except ValueError as error:
        if adapter is None or ("arget module" not in str(error) and "lm_head" not in str(error)):
            raise
        import torch

        kinds = {
            name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
        }
        known = ", ".join(sorted(kinds - {"lm_head", "default", "base_layer"}))
        raise UserError(
            f"{list(adapter.targets)}: {reason(error)}", where="training.adapter.targets", do=f"known: {known}"
        ) from error


def save_folded(
    network: Any,
    weights: Mapping[str, Any] | None,
    base: Path,
    dtype: str,
    out: Path,
    work: Path,
    threads: int | None,
) -> None:
    """Write the trained adapter into `out/adapter` and the base with the adapter folded in, in `dtype`, into `out`.

    `weights` where the network does not hold them whole.
    """
    from mixmerge.merge import merge
    from mixmerge.model.adopt import put_together

    kept = out / FOLDER
    shutil.rmtree(kept, ignore_errors=True)
    network.save_pretrained(kept, save_embedding_layers=False, state_dict=weights)
    (kept / "README.md").unlink(missing_ok=True)
    _tidy(kept / "adapter_config.json")
    place = work / "fold"
    shutil.rmtree(place, ignore_errors=True)
    with put_together(kept, base) as config:
        merge(replace(config, dtype=dtype), place, threads=threads)
    for file in sorted(place.iterdir()):
        if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json"):
            file.replace(out / file.name)
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    said = "torch_dtype" if "torch_dtype" in told else "dtype"
    text = json.dumps(told | {said: dtype}, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    shutil.rmtree(place)


def _tidy(file: Path) -> None:
    """Take out of an adapter's settings what differs from run to run: the base's path, and the order of a set."""
    settings = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def quantisation(adapter: Adapter | None) -> dict[str, Any]:
    """What to load the base with: QLoRA's 4-bit weights (Dettmers et al. 2023), computed in bf16."""
    if adapter is None or adapter.type != "qlora":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    }


def keep_trainable(network: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU when they are first read without gradients.

    It would train on with them, and the packed product passes no gradient to the layers below.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
