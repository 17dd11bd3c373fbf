"""The answers that servers gave, on disk before anyone uses them: one SQLite file, raw bodies, and what was spent.

An answer is filed under the hash of the whole request, its body as the server sent it, so reading it again is free and a
request is paid for once. What a scope has spent is counted in the same transaction: a budget holds over the life of the
file, whoever writes to it. WAL with synchronous=FULL: a commit that returned survives a killed process and a lost power
supply; the price, a sync of the log, is shared by all answers that arrive while the last one is being written. WAL needs
shared memory: the processes that use a file must be of one machine. SQLite does not see that a byte of an answer has changed on
the disk since, so each has a digest: one that does not fit it is not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import CheckpointError, FullDiskError, reason
from mixmerge.kept import digest

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION = 0x6D786D67  # "mxmg": marks the file as ours
LAYOUT = 2  # 1: without digests
BUSY_S = 60.0  # how long another process may hold the file
ASKED_AT_ONCE = 500  # keys in one SELECT; SQLite takes at least 999 parameters

# as bytes: what has changed on the disk need not be text any more, nor a number
ROWS = "SELECT CAST(key AS BLOB), CAST(status AS INTEGER), CAST(body AS BLOB), CAST(xxh3 AS BLOB) FROM answers"
TABLES = """
CREATE TABLE IF NOT EXISTS answers (
  key BLOB PRIMARY KEY,              -- sha256 of the canonical JSON of [scope, body]
  scope TEXT NOT NULL,
  status INTEGER NOT NULL,           -- of HTTP
  body BLOB NOT NULL,                -- as sent, less our key where the server repeats it
  at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  xxh3 TEXT                          -- of key, status and body; NULL: kept by a version that had none
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (
  scope TEXT PRIMARY KEY,
  answered INTEGER NOT NULL DEFAULT 0,
  lost INTEGER NOT NULL DEFAULT 0,   -- sent whole, and no answer of use came back: the server may have charged for it
  tokens_in INTEGER NOT NULL DEFAULT 0,
  tokens_out INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply of a server: the HTTP status and the bytes of the body."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Spent:
    """What a scope has cost: `lost` are requests that were sent and brought nothing of use."""

    answered: int = 0
    lost: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.answered + other.answered,
            self.lost + other.lost,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def __mul__(self, times: int) -> Spent:
        return Spent(self.answered * times, self.lost * times, self.tokens_in * times, self.tokens_out * times)

    def __floordiv__(self, parts: int) -> Spent:
        return Spent(self.answered // parts, self.lost // parts, self.tokens_in // parts, self.tokens_out // parts)

    @property
    def requests(self) -> int:
        return self.answered + self.lost


def request_key(scope: str, body: Mapping[str, Any]) -> bytes:
    """The name of an answer: sha256 of the canonical JSON of scope and body.

    >>> request_key("s", {"a": 1, "b": 2}) == request_key("s", {"b": 2, "a": 1})
    True

    Raises:
        TypeError, ValueError: a body that is not JSON (NaN and infinities are not).
    """
    text = json.dumps([scope, body], sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).digest()


def changed_answers(connection: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
    """Keys and digests of answers that are not as they were kept; one without a digest is believed."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(answers)")}
    if "xxh3" not in columns:
        return []  # an older mixmerge kept none
    return [(row[0], row[3]) for row in connection.execute(ROWS) if not _as_kept(*row)]


def _as_kept(key: bytes, status: int, body: bytes, xxh3: bytes | None) -> bool:
    return xxh3 is None or xxh3 == _digest(key, status, body).encode()


def _digest(key: bytes, status: int, body: bytes) -> str:
    return digest(key + f" {status} ".encode() + body)


class Answers:
    """An open file of answers; made where it is missing. Usable from any thread."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            CheckpointError: a damaged file, one of another program, or one that cannot be opened.
        """
        self.path = path
        # readers have a connection of their own: a look-up never waits for the disk
        self._locks = (threading.Lock(), threading.Lock())
        with self._named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            try:
                self._prepare()
                self._reader = self._connect()
            except BaseException:
                self._writer.close()
                raise

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """The replies that are on disk, by key; those that have changed there since are told of in the log, and removed."""
        found: dict[bytes, Reply] = {}
        changed: list[tuple[bytes, bytes]] = []
        with self._named(), self._locks[0]:
            for start in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[start : start + ASKED_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._reader.execute(f"{ROWS} WHERE key IN ({marks})", some)
                for row in rows:
                    if _as_kept(*row):
                        found[row[0]] = Reply(row[1], row[2])
                    else:
                        changed.append((row[0], row[3]))
        if changed:
            told = "%s: answers that changed since they were kept, and are asked for again: %d"
            log.warning(told, self.path, len(changed))
            self._remove(changed)
        return found

    def remove_changed(self) -> None:
        """Remove all answers that have changed on the disk since they were kept."""
        with self._named(), self._locks[0]:
            changed = changed_answers(self._reader)
        self._remove(changed)

    def _remove(self, changed: Sequence[tuple[bytes, bytes]]) -> None:
        # by its digest too: another process may have kept a new one meanwhile
        with self._named(), self._locks[1], self._transaction():
            self._writer.executemany("DELETE FROM answers WHERE key = ? AND CAST(xxh3 AS BLOB) = ?", changed)

    def keep(self, scope: str, replies: Iterable[tuple[bytes, Reply]], spent: Spent) -> Spent:
        """Commit replies and what they cost, in one transaction; give what the scope has spent in all.

        A key that is on disk already keeps its first reply; the cost is counted all the same.
        """
        with self._named(), self._locks[1], self._transaction():
            self._writer.executemany(
                "INSERT OR IGNORE INTO answers (key, scope, status, body, xxh3) VALUES (?, ?, ?, ?, ?)",
                [
                    (key, scope, reply.status, reply.body, _digest(key, reply.status, reply.body))
                    for key, reply in replies
                ],
            )
            self._writer.execute(
                "INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT (scope) DO UPDATE SET"
                " answered = answered + excluded.answered, lost = lost + excluded.lost,"
                " tokens_in = tokens_in + excluded.tokens_in, tokens_out = tokens_out + excluded.tokens_out",
                (scope, spent.answered, spent.lost, spent.tokens_in, spent.tokens_out),
            )
            return self._spent(self._writer, scope)

    def spent(self, scope: str) -> Spent:
        """What the scope has spent, over the life of the file."""
        with self._named(), self._locks[0]:
            return self._spent(self._reader, scope)

    def close(self) -> None:
        """Close the file; what is in it is safe already."""
        self._reader.close()
        self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: transactions are ours to open, not the module's to guess
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _prepare(self) -> None:
        damage = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        self._writer.execute("PRAGMA journal_mode=WAL")
        with self._transaction():
            mark, layout = (
                self._writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            empty = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if (mark, layout) == (APPLICATION, 1):
                self._writer.execute("ALTER TABLE answers ADD COLUMN xxh3 TEXT")
                self._writer.execute(f"PRAGMA user_version={LAYOUT}")
            elif not (empty and mark == 0) and (mark, layout) != (APPLICATION, LAYOUT):
                raise CheckpointError(
                    f"not a file of answers that this version can read (mark {mark:#x}, layout {layout})",
                    where=str(self.path),
                    do="give another path",
                )
            if empty:
                self._writer.execute(f"PRAGMA application_id={APPLICATION}")
                self._writer.execute(f"PRAGMA user_version={LAYOUT}")
                for statement in TABLES.split(";\n"):
                    self._writer.execute(statement)

    @staticmethod
    def _spent(connection: sqlite3.Connection, scope: str) -> Spent:
        row = connection.execute(
            "SELECT CAST(answered AS INTEGER), CAST(lost AS INTEGER), CAST(tokens_in AS INTEGER),"
            " CAST(tokens_out AS INTEGER) FROM spent WHERE scope = ?",
            (scope,),
        ).fetchone()
        return Spent(*row) if row else Spent()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._writer.in_transaction:  # SQLite has rolled back by itself after a full disk
                self._writer.execute("ROLLBACK")
            raise
        self._writer.execute("COMMIT")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """SQLite's errors as ours: which file, what, what to do."""
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last where SQLite quotes what is damaged
            if isinstance(error, CheckpointError):
                raise
            name = getattr(error, "sqlite_errorname", "") or ""
            where, what = str(self.path), f"the answers cannot be read or written ({reason(error)})"
            if name.startswith("SQLITE_FULL"):
                raise FullDiskError(
                    what, where=where, do="free some space and run again: what was kept is safe"
                ) from None
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                do = f"another process has held the file for {BUSY_S:g} s; end it and run again"
            elif isinstance(error, OSError) or name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
                do = "check that its folder is there, on a local disk, and may be written to"
            else:
                what = f"the file of answers is damaged ({reason(error)})"
                do = "save what can be read with `sqlite3 FILE .recover` (or `.dump`), or move it away (with its -wal and -shm) to ask anew"
            raise CheckpointError(what, where=where, do=do) from None
