"""Loading a model folder through transformers, whose many errors become one line that names the folder.

Nothing is fetched and no code that comes with a model is run. Whatever the library raises while it reads a folder is the
folder's fault (or memory's), not a bug of ours; the traceback stays the cause.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, ModelError, reason

_WHAT = {"AutoTokenizer": "the tokenizer", "AutoModelForCausalLM": "the model"}


def load_pretrained(loader: str, model: Path, **options: Any) -> Any:
    """`transformers.<loader>.from_pretrained(model)`: AutoTokenizer or AutoModelForCausalLM.

    Raises:
        ModelError: it cannot be loaded; says why in one line.
        CheckpointError: a weight file is damaged.
    """
    import transformers
    from safetensors import SafetensorError

    load = getattr(transformers, loader).from_pretrained
    try:
        return load(model, local_files_only=True, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise CheckpointError(f"a weight file cannot be read: {reason(error)}", where=str(model)) from error
    except Exception as error:
        raise ModelError(f"cannot load {_WHAT[loader]}: {reason(error)}", where=str(model)) from error
