"""Safetensors model folders: headers read and checked without torch, tensors read in stretches.

The one idea: a header already says everything that can make a merge impossible, so all of it is checked before any
tensor is read. Invariants: only safetensors (a pickle runs code); an error names its file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: its safetensors dtype, its shape, its file and the offset of its first byte there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose headers have been read and checked; `name` is what the user called it."""

    name: str
    folder: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it lies: what tells it from another model."""
        return (self.folder,)

    @property
    def files(self) -> list[Path]:
        """The files that its numbers are read from."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def fingerprint(self) -> str:
        """A hash of the headers and of each file's size and time: enough to know that nothing was exchanged."""
        state = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        layout = sorted((name, t.dtype, t.shape, t.offset) for name, t in self.tensors.items())
        return hashlib.sha256(json.dumps([state, layout, self.config], sort_keys=True).encode()).hexdigest()


def open_checkpoint(folder: Path, name: str | None = None, *, pickles: bool = False) -> Checkpoint:
    """Read and check the headers of a model folder: `model.safetensors`, or shards with their index.

    `pickles`: where there are none, `pytorch_model.bin` or its shards; nothing in them but tensors is ever loaded.

    Raises:
        ModelError: not a folder that can be used: no config.json, no safetensors, an adapter.
        CheckpointError: a missing, truncated or corrupt file, which is named.
    """
    name = name or str(folder)
    if not folder.is_dir():
        raise ModelError("no such folder", where=name)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        do = "loaders would disagree on which to take: remove the one that is stale"
        raise ModelError(f"both {SINGLE} and {INDEX} are there", where=str(folder), do=do)
    pickled = pickles and not single.exists() and not index.exists()
    if pickled:
        single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if not single.exists() and not index.exists():
        raise _nothing_to_read(folder)
    if not (folder / "config.json").exists():
        raise ModelError("config.json is missing", where=str(folder), do="copy it from where the model came from")
    read = _pickle_reader() if pickled else read_header
    tensors = read(single) if single.exists() else _read_shards(index, read)
    return Checkpoint(name, folder, tensors, read_json(folder / "config.json"))


def dtype_names() -> dict[torch.dtype, str]:
    """The names of safetensors for those of torch's dtypes that are read and copied."""
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }


def _pickle_reader() -> Callable[[Path], dict[str, Tensor]]:
    from mixmerge.merge.pickles import read_pickle

    return read_pickle


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; raises CheckpointError for a file that is damaged or cut short."""
    try:
        length = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            text = opened.read(size) if 8 + size <= length and size <= _MAX_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=str(file)) from error
    if length < 8 or not text:
        raise CheckpointError("the file is cut short or is no safetensors file", where=str(file), do=AGAIN)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        rows = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda row: row[3:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("the header is corrupt", where=str(file), do=AGAIN) from error
    tensors, end = {}, 0
    for name, dtype, shape, first, last in rows:
        if dtype not in ITEM_BYTES:
            raise CheckpointError(f"tensor '{name}' has the unknown dtype {dtype}", where=str(file))
        tensor = Tensor(dtype, shape, file, 8 + size + first)
        if first != end or last - first != tensor.bytes:
            raise CheckpointError(f"the header is corrupt at tensor '{name}'", where=str(file), do=AGAIN)
        tensors[name], end = tensor, last
    if length != 8 + size + end:
        what = f"the file has {length} bytes where its header promises {8 + size + end}"
        raise CheckpointError(what, where=str(file), do=AGAIN)
    return tensors


def locate_model(reference: str, relative_to: Path, *, pickles: bool = False) -> Path:
    """The folder of a model: a local one, relative to `relative_to`, or a Hub id (`org/name[@revision]`) downloaded.

    Only safetensors, JSON and tokenizer files are fetched, and with `pickles` the files of torch.save.

    Raises:
        ModelError: neither a folder nor a model that the Hub (or its local cache) can give.
    """
    local = relative_to / Path(reference).expanduser()
    if local.is_dir():
        return local
    repo, _, revision = reference.partition("@")
    if reference[0] in "./~" or repo.count("/") != 1:
        raise ModelError("no such model folder", where=reference, do=f"looked for {local}; a Hub id is org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", *COPIED, *(["*.bin"] if pickles else [])]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        do = f"there is no local folder {local} either; check the name and, for a closed model, your login"
        raise ModelError(f"the Hub did not give this model: {reason}", where=reference, do=do) from error


# what a tokenizer or processor needs, and nothing that belongs to a training or to other weights
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, shape, first and last byte of a header's entry; ValueError where a number is none."""
    first, last = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (first, last, *entry["shape"])):
        raise ValueError(name)
    return name, str(entry["dtype"]), tuple(entry["shape"]), first, last


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(str(file)).name == file for file in weight_map.values()):
        raise CheckpointError("the index is corrupt: its weight_map must name files of this folder", where=str(index))
    headers = {}
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).exists():
            raise CheckpointError(
                "the index names this file, and it is missing", where=str(index.parent / file), do=AGAIN
            )
        headers[file] = read(index.parent / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            what = f"the index promises tensor '{name}' in {file}, and it is not there"
            raise CheckpointError(what, where=str(index), do=AGAIN)
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not valid JSON", where=str(path), do=AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", where=str(path), do=AGAIN)
    return content


def config_says(config: Mapping[str, Any], key: str) -> Any:
    """What config.json says under a key, else what it says of the text part of a model of several; None: nothing."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def as_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file of a model folder, as transformers lays them out."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def files_like(folder: Path, patterns: Iterable[str]) -> dict[str, bytes | Path]:
    """The files of a folder that match one of these patterns, by their names."""
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()}


def _nothing_to_read(folder: Path) -> ModelError:
    if (folder / "adapter_config.json").exists():
        do = f"write it behind its model: MODEL+{folder}"
        return ModelError("this is a LoRA adapter, not a whole model", where=str(folder), do=do)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        do = "save it again with transformers, as safetensors; or have its tensors read, and nothing else, by --pickle"
        return ModelError("only pickled weights, which can run code when read", where=str(folder), do=do)
    return ModelError(f"neither {SINGLE} nor {INDEX} is there", where=str(folder))


AGAIN = "copy or download it again"
