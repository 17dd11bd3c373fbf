"""Loading a model folder through transformers, whose many errors become one line that names the folder.

Nothing is fetched and no code that comes with a model is run. Whatever the library raises while it reads a folder is the
folder's fault (or memory's), not a bug of ours; the traceback stays the cause.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, ModelError, UserError, reason

_WHAT = {
    "AutoTokenizer": "the tokenizer",
    "AutoModelForCausalLM": "the model",
    "AutoModelForSequenceClassification": "the classifier",
}
# Stored by old versions of transformers, and computed by every version.
_BUFFERS = ("inv_freq", "attn.bias", "attn.masked_bias", "position_ids")


def check_loadable(folder: Path) -> None:
    """Refuse a folder that is no model in safetensors; reads names only.

    Raises:
        ModelError: no config.json, or no weights.
    """
    unweighted = "" if any(folder.glob("*.safetensors")) else "no *.safetensors file"
    if not (folder / "config.json").is_file():
        lacking = ", ".join(filter(None, ("no config.json", unweighted)))
        raise ModelError(f"not a model folder: {lacking}", where=str(folder))
    if unweighted:
        raise ModelError(unweighted, where=str(folder), do="save the model as safetensors")


def torch_device(device: str, threads: int | None) -> Any:
    """The `torch.device` of a name (auto: the first GPU, where there is one), and torch told its threads (None: as they are).

    Raises:
        UserError: cuda where there is none.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here", where="how.device", do="set it to auto or cpu")
    return torch.device(device)


def load_pretrained(loader: str, model: Path, **options: Any) -> Any:
    """`transformers.<loader>.from_pretrained(model)`: AutoTokenizer, AutoModelForCausalLM or
    AutoModelForSequenceClassification.

    Raises:
        ModelError: it cannot be loaded, or its weights are not those that its configuration describes (transformers
            would draw what is missing at random and go on); says why in one line.
        CheckpointError: a weight file is damaged.
    """
    import transformers
    from safetensors import SafetensorError

    load = getattr(transformers, loader).from_pretrained
    if loader != "AutoTokenizer":
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below, with names
    try:
        loaded = load(model, local_files_only=True, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise CheckpointError(f"a weight file cannot be read: {reason(error)}", where=str(model)) from error
    except Exception as error:
        raise ModelError(f"cannot load {_WHAT[loader]}: {reason(error)}", where=str(model)) from error
    if loader == "AutoTokenizer":
        return loaded
    network, found = loaded
    do = "config.json and weights must belong together: copy both again"
    for name, stored, described in sorted(found["mismatched_keys"])[:1]:
        what = f"weight '{name}' has shape {list(stored)} where config.json describes {list(described)}"
        raise ModelError(what, where=str(model), do=do)
    if missing := sorted(found["missing_keys"]):
        what = f"weights that config.json describes are missing: {len(missing)}, '{missing[0]}' among them"
        raise ModelError(what, where=str(model), do=do)
    dropped = sorted(name for name in found["unexpected_keys"] if not name.endswith(_BUFFERS))
    if dropped:
        what = f"weights that config.json does not describe: {len(dropped)}, '{dropped[0]}' among them"
        raise ModelError(f"{what}: they would be lost", where=str(model), do=do)
    return network
