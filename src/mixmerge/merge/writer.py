"""Writing a model folder that appears whole or not at all, from stretches of tensors in any order.

The one idea: the layout (which tensors in which shard, at which offset) is known before the first tensor is, so shards
have their full size from the start and every stretch goes to its final place. A thread flushes what is finished to the
disk behind the work, then notes the tensor in a journal, with a digest of its bytes. Invariants: OUT appears by one rename,
complete; a tensor in the journal is on the disk, and one that has changed there since is made again; the partial folder says
which job it belongs to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.amounts import in_bytes
from mixmerge.errors import FULL, CheckpointError, FullDiskError, ModelError
from mixmerge.kept import LOST, mark_whole, sealed, stretch_digest, unsealed
from mixmerge.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE, Tensor
from mixmerge.merge.sources import Raw

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, its header, and its tensors with the offsets where they go, in order."""

    file: Path
    header: bytes
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors.values())


class CheckpointWriter:
    """A model folder that appears whole or not at all, and carries on after a kill. Use as a context manager.

    It grows in `.NAME.partial/model` beside OUT. `job` says what is being written: a partial folder with the same job
    keeps its `finished` tensors (known once entered, with their notes), any other is thrown away. An error of the kind
    `hopeless` leaves nothing behind: running again would end the same way.
    """

    def __init__(
        self,
        out: Path,
        tensors: Mapping[str, Tensor],
        *,
        job: str,
        shard_bytes: int,
        hopeless: type[Exception] = ModelError,
    ) -> None:
        refuse_existing(out)
        self.out, self.hopeless = (out.resolve() if out.is_symlink() else out), hopeless
        whole = self.out.absolute()
        self.partial = whole.parent / f".{whole.name}.partial"
        self.model = self.partial / "model"
        self.shards = _layout(self.model, tensors, shard_bytes)
        self.tensors = {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}
        self.bytes_written = 0
        self.job, self._journal, self._lock_path = (self.partial / name for name in ("job", "journal", "lock"))
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._behind: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._trouble: list[BaseException] = []
        self._lock_file = self._claim(job)
        self.finished: dict[str, Any] = {}
        self._flusher = threading.Thread(target=self._flush, daemon=True, name="flush")

    def __enter__(self) -> CheckpointWriter:
        try:
            for shard in self.shards:
                with _naming(shard.file):
                    self._size(shard)
            with _naming(self._journal):
                self.finished = self._unchanged(self._read_journal())
        except BaseException as error:  # this process may try again, once there is room
            self.__exit__(type(error))
            raise
        self._flusher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._flusher.is_alive():
            self._behind.put(None)
            self._flusher.join()
        while self._files:
            os.close(self._files.popitem()[1])
        os.close(self._lock_file)
        if kind is not None and issubclass(kind, self.hopeless):
            self._remove()

    def write(self, name: str, start: int, data: Raw) -> None:
        """Write raw elements of a tensor from flat index `start` on; from any thread."""
        tensor, view, at = self.tensors[name], data.data, 0
        place = tensor.offset + start * ITEM_BYTES[tensor.dtype]
        with _naming(tensor.file):
            while at < len(view):
                at += os.pwrite(self._files[tensor.file], view[at:], place + at)
        with self._lock:
            self.bytes_written += at

    def finish(self, name: str, note: Any) -> None:
        """All of a tensor is written: have it flushed, then journaled with its note; an earlier flush's error is raised here."""
        if self._trouble:
            raise self._trouble[0]
        self._behind.put((name, note))

    def _flush(self) -> None:
        """Flush and journal what is finished, a few tensors at a time: as many as finished during the last flush."""
        try:
            with _naming(self._journal), self._journal.open("ab") as journal:
                waiting = True
                while waiting:
                    batch = [self._behind.get()]
                    while not self._behind.empty():
                        batch.append(self._behind.get())
                    waiting = batch[-1] is not None
                    done = [entry for entry in batch if entry is not None]
                    for file in {self.tensors[name].file for name, _ in done}:
                        os.fsync(self._files[file])
                    lines = [sealed([name, note, self._digest(name)]) for name, note in done]
                    journal.write("".join(f"{line}\n" for line in lines).encode())
                    journal.flush()
                    os.fsync(journal.fileno())
        except BaseException as error:
            self._trouble.append(error)

    def _claim(self, job: str) -> int:
        """Make the partial folder ours, and its job this one; the descriptor of its lock, which a kill gives back."""
        found = list(self.partial.iterdir()) if self.partial.exists() else []
        if self.job not in found and not all(path.match("job.*.tmp") or path.name == "lock" for path in found):
            what = "this folder is in the way and is not ours"
            raise CheckpointError(what, where=str(self.partial), do="move it away")
        with _naming(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                what = "another process is writing this folder"
                raise CheckpointError(what, where=str(self.out), do="wait for it, or name another folder") from error
            except OSError:
                pass  # a shared folder without such locks: a study has its leases, and by hand nobody starts a merge twice
            if self.job.exists() and self.job.read_bytes() != job.encode():
                self._clear()
            for left_by_a_kill in self.partial.glob("*.tmp"):
                left_by_a_kill.unlink(missing_ok=True)
            self._write_small(self.job, job.encode())
            self.model.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.partial).free
        needed = sum(shard.bytes for shard in self.shards if not shard.file.exists())
        if needed > free:
            what = f"the merge needs {in_bytes(needed)} and {in_bytes(free)} are free"
            os.close(lock)
            raise CheckpointError(what, where=str(self.out), do="free space, or write somewhere else")
        return lock

    def _read_journal(self) -> dict[str, tuple[Any, str]]:
        """The notes and digests of the tensors that an earlier run finished; a torn last line is no line."""
        if not self._journal.exists():
            return {}
        data = self._journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self._write_small(self._journal, whole)
        found = [unsealed(line) for line in whole.splitlines()]
        if changed := found.count(None):
            told = "%s: %d of %d lines changed since they were written: not carried on from"
            log.warning(told, self._journal, changed, len(found))
        return {name: (note, digest) for name, note, digest in filter(None, found)}

    def _unchanged(self, journaled: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
        """The notes of those whose bytes are as they were written."""
        still, changed = {}, Counter[Path]()
        for name, (note, digest) in journaled.items():
            try:
                if self._digest(name) == digest:
                    still[name] = note
                    continue
            except OSError as error:
                if error.errno not in LOST:
                    raise
            changed[self.tensors[name].file] += 1
        for file, count in changed.items():
            told = (
                "%s: finished tensors that changed since they were written, or cannot be read, and are made again: %d"
            )
            log.warning(told, file, count)
        return still

    def _digest(self, name: str) -> str:
        tensor = self.tensors[name]
        return stretch_digest(self._files[tensor.file], tensor.offset, tensor.bytes)

    def _size(self, shard: Shard) -> None:
        """Open a shard at its full size, its header written."""
        descriptor = self._files[shard.file] = os.open(shard.file, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(descriptor).st_size != shard.bytes:
            os.ftruncate(descriptor, 0)
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(descriptor, 0, shard.bytes)  # a full disk shows now
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            os.ftruncate(descriptor, shard.bytes)
        os.pwrite(descriptor, shard.header, 0)

    def publish(self, files: Mapping[str, bytes | Path], *, mark: bool = False) -> None:
        """Once all is flushed, add the index and the given files (bytes, or a file to copy), and let the folder appear.

        `mark`: with a marker that tells later whether it is as it was written.
        """
        self._behind.put(None)
        self._flusher.join()
        if self._trouble:
            raise self._trouble[0]
        if len(self.shards) > 1:
            weight_map = {name: shard.file.name for shard in self.shards for name in shard.tensors}
            total = sum(tensor.bytes for shard in self.shards for tensor in shard.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            files = {**files, INDEX: json.dumps(index, indent=2).encode() + b"\n"}
        with _naming(self.out):
            for name, content in files.items():
                self._write_small(self.model / name, content if isinstance(content, bytes) else content.read_bytes())
            if mark:
                mark_whole(self.model, {})
            refuse_existing(self.out)
            self.model.rename(self.out)
            self._remove()

    def _remove(self) -> None:
        self._clear()
        self.job.unlink()
        self._lock_path.unlink()
        self.partial.rmdir()

    def _clear(self) -> None:
        """Remove all but the job: whatever kills this, the folder is still known as ours."""
        shutil.rmtree(self.model, ignore_errors=True)
        for path in self.partial.iterdir():
            if path not in (self.job, self.model, self._lock_path):
                path.unlink(missing_ok=True)

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
    if out.is_symlink() and not out.exists():
        what = f"the output folder is a link to {out.readlink()}, which is not there"
        raise ModelError(what, where=str(out), do="make that folder, or remove the link")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        do = "remove it, or name another folder"
        raise ModelError("the output folder is there already and not empty", where=str(out), do=do)
    if out.exists() and ((mount := out.resolve().is_mount()) or out.samefile(Path.cwd())):
        what = f"{'a mount point' if mount else 'the current folder'} cannot be replaced by the finished model"
        raise ModelError(what, where=str(out), do="name a new folder in it")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an operating system error into one that names the file and the trouble."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        what = f"cannot write: {error.strerror or error}"
        if error.errno in FULL:
            raise FullDiskError(what, where=str(path), do="free space and run it again: it carries on") from error
        raise CheckpointError(what, where=str(path)) from error


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
        shards.append(_shard(folder / name, {name: group[name] for name in order}))
    return tuple(shards)


def _shard(file: Path, tensors: Mapping[str, Tensor]) -> Shard:
    header = _header(tensors)
    placed, offset = {}, len(header)
    for name, tensor in tensors.items():
        placed[name] = Tensor(tensor.dtype, tensor.shape, file, offset)
        offset += tensor.bytes
    return Shard(file, header, placed)


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
