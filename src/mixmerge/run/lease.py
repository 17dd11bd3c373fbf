"""Leases: a step has one runner at a time, on any folder that several machines share.

A lease is a file that says who holds it, put there by link(2), which is exclusive on NFS too, and touched every few seconds.
Whoever wants to replace or remove one, its holder included, first makes its claim: a file named after the lease's token,
exclusive likewise. So of two that find a dead lease one gets it, and nobody removes one that was put there meanwhile.

Dead is a lease whose process is seen to be gone, or, where that cannot be seen (another machine or container), one that was
watched and not touched: for a minute, or for three beats where its date is more than a minute off by the clock that dates the files.
No clock of this machine is asked: one that jumps neither takes a live lease nor keeps a dead one.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from mixmerge.errors import FULL
from mixmerge.run.processes import alive, this_process

HEARTBEAT_S = 5.0
EXPIRES_S = 60.0
LET_GO = "-let-go"
BEATS = 3  # to watch a lease for that is old
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # a file system without hard links


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that this process was given."""

    path: Path
    token: str

    def ours(self) -> bool:
        """Whether it has not been taken from us: a process that stood still for long is thought dead."""
        seen = _look(self.path)
        return seen is not None and seen.key == self.token


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lease or a claim at one look: `key` tells it from every other one, `beat` is its mtime in ns."""

    key: str
    owner: dict[str, Any]
    beat: int


@dataclass(slots=True)
class _Silence:
    """How many seconds a lease was watched without a beat, and when it was looked at last."""

    seen: _Seen
    seconds: float = 0.0
    at: float = field(default_factory=time.monotonic)


class Leases:
    """The leases in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._silent: dict[str, _Silence] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def names(self) -> set[str]:
        """The names of all that are held, also by dead ones."""
        return {path.stem for path in self.folder.glob("*.json")}

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who holds it, at one look; None for nobody or a dead one; empty where a young lease does not say who."""
        if not (chain := self._chain(name)):
            return None
        here = alive(chain[-1].owner)
        gone = self._old(chain[-1]) if here is None else not here
        return None if gone else chain[-1].owner

    def live(self) -> set[str]:
        """The names of all that live processes hold; one that looks dead is watched for a few beats."""
        names = self.names()
        found: set[str] = set()
        while names:
            for name in list(names):
                chain = self._chain(name)
                if not chain or self._dead(name, chain[-1]):
                    names.remove(name)
                elif alive(chain[-1].owner) or not self._old(chain[-1]):
                    names.remove(name)
                    found.add(name)
            if names:
                time.sleep(HEARTBEAT_S)
        return found

    @contextmanager
    def hold(
        self, name: str, lost: Callable[[], object] | None = None, *, roomless: bool = False
    ) -> Iterator[Lease | None]:
        """Hold it while the block runs; None where a live process has it. `lost` is called once if it is taken from us.

        `roomless`: on a full disk too, by an empty file.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lease = self._acquire(name, roomless)
        if lease is None:
            yield None
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(lease, stop, lost), daemon=True)
        beat.start()
        try:
            yield lease
        finally:
            stop.set()
            beat.join()
            _release(lease)

    def sweep(self) -> None:
        """Remove what killed processes left: their leases, claims, and files that were to become such.

        Of another machine or container it is what `live` has watched and found dead.
        """
        for file in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            with suppress(OSError):  # of a file that NFS keeps, since a process has it open
                self._sweep(file)

    def _sweep(self, file: Path) -> None:
        seen = _look(file)
        if seen is None:
            return
        gone, name = alive(seen.owner) is False, file.name.partition(".")[0]
        if file.name.startswith("."):
            if gone or (not seen.owner and self._old(seen)):
                file.unlink(missing_ok=True)
        elif gone or ((chain := self._chain(name)) and self._dead(name, chain[-1])):
            with self.hold(name) as lease:
                if lease is not None:
                    _clear_claims(lease)

    def _acquire(self, name: str, roomless: bool = False) -> Lease | None:
        path, token = self.path(name), uuid4().hex
        text = json.dumps({**this_process(), "at": time.time(), "token": token})
        while True:
            chain = self._chain(name)
            if not chain:
                key = _create(path, text, token, roomless)
                return None if key is None else Lease(path, key)
            if self._dead(name, chain[-1]):
                break
            if alive(chain[-1].owner) or not self._old(chain[-1]):
                return None
            time.sleep(HEARTBEAT_S)
        claim = _claim(path, chain[-1].key)
        key = _create(claim, text, token, roomless)
        if key is None:
            return None
        if [seen.key for seen in self._chain(name)] != [*(seen.key for seen in chain), key]:
            claim.unlink(missing_ok=True)  # it was let go of, or taken, before we had the claim
            return None
        claim.replace(path)
        lease = Lease(path, key)
        _clear_claims(lease)
        return lease

    def _chain(self, name: str) -> list[_Seen]:
        """A lease, and the claims that follow from it: who made the last one may act."""
        found: list[_Seen] = []
        file = self.path(name)
        while (seen := _look(file)) is not None:
            if found and seen.key == found[-1].key:  # its holder was about to let go of it, and may have died at that
                seen = replace(seen, key=f"{seen.key}{LET_GO}")
            if seen.key in {other.key for other in found}:
                break
            found.append(seen)
            file = _claim(self.path(name), seen.key)
        return found

    def _dead(self, name: str, seen: _Seen) -> bool:
        here = alive(seen.owner)
        if here is not None:
            return not here
        silence = self._silent.get(name)
        if silence is None or silence.seen != seen:
            silence = self._silent[name] = _Silence(seen)
        now = time.monotonic()
        # a watcher that stood still itself, as for a server that did not answer, has not watched
        silence.seconds += min(now - silence.at, 2 * HEARTBEAT_S)
        silence.at = now
        enough = BEATS * HEARTBEAT_S if self._old(seen) else EXPIRES_S
        return silence.seconds >= enough

    def _old(self, seen: _Seen) -> bool:
        """Whether its date is more than a minute off by the clock that dates the files here, which may be a server's.

        One that is dated in the future is no younger: a clock was put back since.
        """
        scratch = self.folder / f".{uuid4().hex}"
        try:
            scratch.touch(exist_ok=False)
            now = scratch.stat().st_mtime_ns
            scratch.unlink()
        except OSError:  # a store that is only read
            now = time.time_ns()
        return abs(now - seen.beat) > EXPIRES_S * 1e9


def _beat(lease: Lease, stop: threading.Event, lost: Callable[[], object] | None) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            if lease.ours():
                os.utime(lease.path)
            elif not stop.is_set():
                if lost is not None:
                    lost()
                return
        except OSError:
            continue  # the disk or its server may be back for the next beat


def _release(lease: Lease) -> None:
    claim = _claim(lease.path, lease.token)
    with suppress(OSError):  # where nothing may be written any more, it is dead once this process is
        try:
            os.link(lease.path, claim)  # this takes no room on a disk that is full
        except OSError as error:
            if error.errno in NO_LINKS and lease.ours():
                lease.path.unlink()
            elif not lease.ours() or _key_of(claim) != lease.token:
                return  # it was taken, or is being taken now
        if lease.ours():
            lease.path.unlink()
        claim.unlink(missing_ok=True)


def _claim(path: Path, key: str) -> Path:
    return path.with_name(f"{path.stem}.{key}.claim")


def _clear_claims(lease: Lease) -> None:
    """Remove the claims to leases that ours has replaced: nobody can act by them any more."""
    for claim in lease.path.parent.glob(f"{lease.path.stem}.*.claim"):
        if claim != _claim(lease.path, lease.token):
            claim.unlink(missing_ok=True)


def _create(path: Path, text: str, token: str, roomless: bool) -> str | None:
    """Make a file with this text, and give the key that it is known by; None if it is there.

    Exclusive on NFS too, where an answer that was lost is asked again.
    """
    scratch = path.with_name(f".{uuid4().hex}")
    try:
        key = _fill(scratch, text, token, roomless)
        try:
            os.link(scratch, path)
        except FileExistsError:
            return key if scratch.stat().st_nlink == 2 else None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create_without_links(path, text, token, roomless)
        return key
    finally:
        with suppress(OSError):
            scratch.unlink()


def _create_without_links(path: Path, text: str, token: str, roomless: bool) -> str | None:
    try:
        return _fill(path, text, token, roomless)
    except FileExistsError:
        return None


def _fill(path: Path, text: str, token: str, roomless: bool) -> str:
    """Make a new file with this text, or, if `roomless`, an empty one where there is no room for it; gives its key.

    An empty one takes no room. It says nothing of its holder, so that every other process takes it for one of another machine,
    and is known by its inode.
    """
    with path.open("xb", buffering=0) as file:
        try:
            file.write(text.encode())
        except OSError as error:
            if not roomless or error.errno not in FULL:
                raise
            file.truncate(0)
            return _inode(os.fstat(file.fileno()))
    return token


def _look(path: Path) -> _Seen | None:
    """A lease or claim as it is now; None where there is none."""
    try:
        try:
            with path.open("rb") as file:
                data, stat = file.read(), os.fstat(file.fileno())
        except PermissionError:  # another user's
            data, stat = b"", path.stat()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed on the server
            return None
        raise
    try:
        owner = dict(json.loads(data))
    except (ValueError, TypeError):
        owner = {}
    token = str(owner.get("token", ""))
    return _Seen(token if token.isalnum() else _inode(stat), owner, stat.st_mtime_ns)


def _inode(stat: os.stat_result) -> str:
    return f"inode{stat.st_ino}"


def _key_of(path: Path) -> str | None:
    seen = _look(path)
    return None if seen is None else seen.key
