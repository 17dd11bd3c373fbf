"""Where the tensors of a pickled checkpoint lie in its file; read only where that is asked for.

The one idea: torch's unpickler, which takes nothing but tensors here, tells the place of each tensor's bytes without
reading them. So a pickle is one more file of tensors, and streams like any other.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

from mixmerge.errors import CheckpointError
from mixmerge.merge.checkpoint import AGAIN, Tensor, dtype_names

_AS_SAFETENSORS = "load it with transformers and save_pretrained it again: that writes safetensors"


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one file that torch.save wrote.

    Raises:
        CheckpointError: a damaged file, an old format, or anything but tensors by name.
    """
    _require_little_endian(file)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            held = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        what = "the pickle asks for more than tensors, which could run code"
        raise CheckpointError(what, where=str(file), do="take another checkpoint of it") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("the file is damaged, or no file of torch.save", where=str(file), do=AGAIN) from error
    names = dtype_names()
    tensors: dict[str, Tensor] = {}
    for name, tensor in held.items() if isinstance(held, dict) else [("", held)]:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"'{name}' is no tensor", where=str(file), do=_AS_SAFETENSORS)
        dense = tensor.layout is torch.strided and not tensor.is_quantized
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if dense else None
        if start is None or not tensor.is_contiguous() or tensor.dtype not in names:
            what = f"tensor '{name}' ({tensor.dtype}) does not lie in one piece"
            raise CheckpointError(what, where=str(file), do=_AS_SAFETENSORS)
        offset = start + tensor.storage_offset() * tensor.element_size()
        tensors[name] = Tensor(names[tensor.dtype], tuple(tensor.shape), file, offset)
    if any(tensor.offset + tensor.bytes > file.stat().st_size for tensor in tensors.values()):
        raise CheckpointError("the file is cut short", where=str(file), do=AGAIN)
    return tensors


def _require_little_endian(file: Path) -> None:
    """Refuse what torch itself would misread without its data, and what is no zip of torch.save at all."""
    try:
        with zipfile.ZipFile(file) as held:
            order = next((held.read(name) for name in held.namelist() if name.endswith("/byteorder")), b"little")
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        what = "the file is damaged, or no file of a newer torch.save"
        raise CheckpointError(what, where=str(file), do=AGAIN) from error
    if order != b"little":
        raise CheckpointError("its numbers are big-endian", where=str(file), do=_AS_SAFETENSORS)
