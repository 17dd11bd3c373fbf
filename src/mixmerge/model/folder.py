"""Model folders: what is accepted, how one is copied, and how a new one appears whole or not at all.

The one idea: a folder is built under a hidden name beside its place and renamed when it is finished, so a
killed run leaves nothing that looks like a model. Weights are linked where the disk allows, and so are never
written in place; small files are copied. Code and pickles in a model folder are never used nor copied.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import FREE_SOME, FULL, CheckpointError, FullDiskError, MixmergeError, ModelError, UserError
from mixmerge.linking import link_or_copy

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Other weight formats would repeat the weights (and disagree with them after a change); code is never carried.
LEFT_BEHIND = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".py", ".pyc", ".so", ".safetensors")
# what the names of a tokenizer's files begin with
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece")
RECORDS = ("record.json",)  # what a step of a study says of the folder that it made: no part of the model


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        UserError: `out` is already there and is not an empty folder.
        CheckpointError: the disk refused a write.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError("already there", where=str(out), do="name a new folder or remove this one")
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        if isinstance(error, MixmergeError):
            raise
        if error.errno in FULL:  # a copy that fails names the file that it reads
            raise FullDiskError("no space left on the disk", where=str(out), do=FREE_SOME) from error
        what = f"cannot write the folder: {error}" if error.strerror is None else f"{error.strerror}: {error.filename}"
        raise CheckpointError(what, where=str(out)) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(partial)


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model folder, in order of name.

    Raises:
        ModelError: not a model folder, weights in another format, a shard that is missing, or a model that
            needs code of its own.
    """
    where = str(model)
    if not model.is_dir():
        raise ModelError("no such folder", where=where, do="give a folder with config.json and safetensors weights")
    if not (model / "config.json").is_file():
        if (model / "adapter_config.json").is_file():
            raise ModelError("an adapter, not a whole model", where=where, do="fold it into its base first")
        raise ModelError("no config.json", where=where, do="give a folder with config.json and safetensors weights")
    if (model / INDEX).is_file():
        listed = sorted(set(read_json(model / INDEX).get("weight_map", {}).values()))
        files = [model / name for name in listed]
        lost = [file.name for file in files if not file.is_file()]
        if lost or not files:
            raise ModelError(f"{INDEX} lists files that are missing: {', '.join(lost) or 'none listed'}", where=where)
    else:
        files = sorted(model.glob("*.safetensors"))
    if not files:
        if any(file.suffix in PICKLES for file in model.iterdir()):
            advice = "load it where you trust it and save it again with save_pretrained, which writes safetensors"
            raise ModelError("the weights are pickles, which can run code when read", where=where, do=advice)
        raise ModelError("no safetensors weights", where=where, do="convert the model to safetensors first")
    _refuse_remote_code(model)
    return files


def copy_files(model: Path, out: Path, names: tuple[str, ...], *, over: bool) -> None:
    """Copy the files of `model` whose names begin so, byte for byte; `over` those that `out` has, or beside them."""
    for file in model.iterdir():
        if file.is_file() and file.name.startswith(names) and (over or not (out / file.name).exists()):
            shutil.copyfile(file, out / file.name)


def copy_model(model: Path, out: Path, *, weights: bool = True) -> None:
    """Copy a model folder into the existing folder `out`, weights linked where the disk allows.

    Subfolders, hidden files, code and weights in other formats stay behind.

    Raises:
        ModelError: as `weight_files`.
    """
    files = weight_files(model)
    for file in sorted(model.iterdir()):
        ours = file.name in RECORDS
        if file.is_file() and not ours and not file.name.startswith(".") and file.suffix not in LEFT_BEHIND:
            shutil.copyfile(file, out / file.name)
    for name in ("config.json", "tokenizer_config.json"):
        if (out / name).is_file() and "auto_map" in (settings := read_json(out / name)):
            write_json(out / name, {key: value for key, value in settings.items() if key != "auto_map"})
    for file in files if weights else ():
        link_or_copy(file, out / file.name)


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write one safetensors file, readable by whoever may read the folder's other files."""
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)  # safetensors 0.8 makes files that only their owner can read


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is a mapping.

    Raises:
        ModelError: unreadable, not JSON, or not a mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"expected a mapping, got a {type(value).__name__}", where=str(path))
    return value


def write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write JSON so that the file is old or new, never half; a hard link's other name keeps the old bytes."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is old or new, never half."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_remote_code(model: Path) -> None:
    config = read_json(model / "config.json")
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        what = f"model type {kind!r} needs Python code that comes with the model, and mixmerge never runs such code"
        raise ModelError(what, where=str(model), do="choose a model that transformers supports by itself")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a config.json what is said of the language model, which may be one part of several."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def first_number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a whole number: families call the same thing by different names."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def context_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model was made to read at most, by its config.json; None where that says nothing.

    What stretches rotary positions (linear, yarn and the like) counts with its factor.
    """
    config = text_part(config)
    found = first_number(config, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("factor")
    if found is None or not isinstance(factor, int | float):
        return found
    before = rope.get("original_max_position_embeddings")
    return max(found, int(factor * (before if isinstance(before, int) else found)))
