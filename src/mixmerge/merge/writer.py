"""Writing a model folder that appears whole or not at all.

The one idea: the layout (which tensors in which shard, at which offset) is known before the first tensor is, so shards
are written straight through. Invariants: OUT appears by one rename, complete; a shard in the partial folder beside it is
whole, or it is not there, and the job it belongs to is written down.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, ModelError
from mixmerge.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE, Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output and the tensors in it, in order."""

    file: Path
    tensors: Mapping[str, Tensor]


class CheckpointWriter:
    """A model folder that appears whole or not at all, and carries on after a kill.

    It grows in `.NAME.partial/model` beside OUT. `job` says what is being written: a partial folder with the same job
    keeps its whole shards, any other is thrown away.
    """

    def __init__(self, out: Path, tensors: Mapping[str, Tensor], *, job: str, shard_bytes: int) -> None:
        refuse_existing(out)
        self.out = out
        self.partial = out.absolute().parent / f".{out.absolute().name}.partial"
        self.model = self.partial / "model"
        self.shards = _layout(self.model, tensors, shard_bytes)
        self.bytes_written = 0
        self.job = self.partial / "job"
        found = list(self.partial.iterdir()) if self.partial.exists() else []
        if self.job not in found and not all(path.match("job.*.tmp") for path in found):
            what = "this folder is in the way and is not ours"
            raise CheckpointError(what, where=str(self.partial), do="move it away")
        with _naming(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            if self.job.exists() and self.job.read_text() != job:
                self._clear()
            for left_by_a_kill in self.partial.glob("*.tmp"):
                left_by_a_kill.unlink(missing_ok=True)
            self._write_small(self.job, job.encode())
            self.model.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.partial).free
        needed = sum(t.bytes for shard in self.shards if not shard.file.exists() for t in shard.tensors.values())
        if needed > free:
            what = f"the merge needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
            raise CheckpointError(what, where=str(out), do="free space, or write somewhere else")

    def finished(self, shard: Shard) -> Any | None:
        """The note left with a shard that an earlier run wrote whole; None where it has to be written."""
        return json.loads(self._note(shard).read_text()) if shard.file.exists() else None

    def write(self, shard: Shard, data: Iterable[bytes], note: Any) -> None:
        """Write a shard from the stretches of its tensors, in order; `note` is read when the last was written."""
        header = _header(shard.tensors)
        growing = self._growing(shard.file)
        with _naming(shard.file), growing.open("wb") as file:
            file.write(header)
            for piece in data:
                file.write(piece)
                self.bytes_written += len(piece)
            expected = len(header) + sum(tensor.bytes for tensor in shard.tensors.values())
            assert file.tell() == expected, f"{shard.file.name}: {file.tell()} bytes, not {expected}"
            file.flush()
            os.fsync(file.fileno())
        with _naming(shard.file):
            self._write_small(self._note(shard), json.dumps(note).encode())
            growing.rename(shard.file)

    def publish(self, files: Mapping[str, bytes | Path]) -> None:
        """Add the index and the given files (bytes, or a file to copy), then let the folder appear."""
        if len(self.shards) > 1:
            weight_map = {name: shard.file.name for shard in self.shards for name in shard.tensors}
            total = sum(tensor.bytes for shard in self.shards for tensor in shard.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            files = {**files, INDEX: json.dumps(index, indent=2).encode() + b"\n"}
        with _naming(self.out):
            for name, content in files.items():
                self._write_small(self.model / name, content if isinstance(content, bytes) else content.read_bytes())
            refuse_existing(self.out)
            self.model.rename(self.out)
            self._remove()

    @contextmanager
    def discarding(self, kind: type[Exception]) -> Iterator[None]:
        """Leave nothing behind when this kind of error ends the work: running again would end the same way."""
        try:
            yield
        except kind:
            self._remove()
            raise

    def _remove(self) -> None:
        self._clear()
        self.job.unlink()
        self.partial.rmdir()

    def _clear(self) -> None:
        """Remove all but the job: whatever kills this, the folder is still known as ours."""
        shutil.rmtree(self.model, ignore_errors=True)
        for path in self.partial.iterdir():
            if path != self.job and path != self.model:
                path.unlink(missing_ok=True)

    def _note(self, shard: Shard) -> Path:
        return self.partial / f"{shard.file.stem}.json"

    def _growing(self, path: Path) -> Path:
        # outside of the model, and of this process alone: two runs at once then cannot mix their bytes
        return self.partial / f"{path.name}.{os.getpid()}.tmp"

    def _write_small(self, path: Path, content: bytes) -> None:
        growing = self._growing(path)
        with growing.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        growing.replace(path)


def refuse_existing(out: Path) -> None:
    """Refuse an output place that holds anything: old shards beside new ones are what loaders trip over."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        do = "remove it, or name another folder"
        raise ModelError("the output folder is there already and not empty", where=str(out), do=do)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an operating system error into one that names the file and the trouble."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        do = "free space and run it again: it carries on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise CheckpointError(f"cannot write: {error.strerror or error}", where=str(path), do=do) from error


def _layout(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> tuple[Shard, ...]:
    """Tensors by name, cut into files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        if groups[-1] and filled + tensors[name].bytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensors[name]
        filled += tensors[name].bytes
    shards = []
    for i, group in enumerate(groups, start=1):
        # wide items first: then every tensor of a file is aligned
        order = sorted(group, key=lambda name: (-ITEM_BYTES[group[name].dtype], name))
        name = SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(folder / name, {name: group[name] for name in order}))
    return tuple(shards)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
