"""The client of an OpenAI-compatible endpoint: bodies in, answers out, each paid for once and on disk before it is used.

Synchronous outside, asyncio inside. It speaks HTTP by the transport of the openai SDK and not by the SDK itself, which
reads whole bodies before one can bound them, takes keys and organisations from variables nobody named, and asks again on
its own terms. The key is read from the environment for the length of a call and is kept in no object. Proxies of the
environment are used, except for this machine's own addresses; redirects are not followed; cookies are not kept.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mixmerge.addresses import EXAMPLE, fault_of, secret_in, without_requests
from mixmerge.errors import CheckpointError, UserError
from mixmerge.evaluate.answers import Answers, Reply, request_key
from mixmerge.evaluate.capacity import Capacity
from mixmerge.evaluate.dispatch import Dispatch, Replica, Request, Tally, request_of
from mixmerge.evaluate.exchange import Answer, BlackOut, Line, read
from mixmerge.evaluate.limits import Budget, BudgetError, Limits, NoKeyError, ServerError

if TYPE_CHECKING:
    import httpx2

__all__ = ["Answer", "Budget", "BudgetError", "Client", "Limits", "ServerError", "read_key"]

CONNECT_S = 10.0


class Client:
    """One endpoint: a server, or several equal ones. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        answers: Path,
        scope: str | None = None,
        key_env: str | None = None,
        budget: Budget | None = None,
        limits: Limits = Limits(),  # noqa: B008 a frozen value
        gone: Callable[[], bool] | None = None,
        name: str | None = None,
    ) -> None:
        """Open the file of answers; nothing is sent.

        Args:
            urls: addresses up to `/v1`; requests go to the least busy one.
            scope: names the endpoint in the file of answers and in its budget; default: the addresses.
            key_env: the environment variable that holds the key; None: no key is sent.
            gone: asked where a connection fails; True ends the call at once, for the server will not come back.
            name: who is named where the endpoint as a whole is at fault or its budget is spent; default: the addresses.

        Raises:
            UserError: an address that is none.
            CheckpointError: the file of answers is damaged or cannot be opened.
        """
        addresses = sorted({_address(url) for url in urls})
        if not addresses:
            raise UserError("no address of a server", do=f"give one such as {EXAMPLE}")
        self.scope = ", ".join(addresses) if scope is None else scope
        self._key_env, self._limits, self._budget = key_env, limits, budget or Budget()
        self._replicas = [Replica(a, Capacity(limits.max_concurrency, limits.concurrency)) for a in addresses]
        self._tally, self._gone, self._name = Tally(), gone, name or ", ".join(addresses)
        self.tell: Callable[[str], None] | None = None  # told once, in words, of every silence of the servers
        self._answers = Answers(answers)

    def ask(
        self, bodies: Sequence[Mapping[str, Any]], progress: Callable[[int, int], None] | None = None
    ) -> list[Answer]:
        """The answers to bodies of `POST {url}/chat/completions`, in order; equal bodies are asked once.

        An answer that is on disk is not asked for again; every other one is committed before it is returned, and before
        `progress(answered, all)` counts it. For several samples of one prompt, give the bodies a `seed` each.

        Raises:
            NoKeyError: the environment variable of the key is not set. Nothing was sent.
            ServerError: a server that cannot be reached, keeps failing, or refuses everything.
            BudgetError: the budget is spent; says what is missing.
            CheckpointError: the file of answers cannot be read or written.
            ValueError, TypeError: a body that is not JSON, or that asks for a stream. Nothing was sent.
        """
        if any(body.get("stream") for body in bodies):
            raise ValueError("a body asks for a stream: answers are read whole")
        keys = [request_key(self.scope, body) for body in bodies]
        copies, wanted = Counter(keys), dict(zip(keys, bodies, strict=True))
        answers = {key: self._on_disk(key, reply) for key, reply in self._answers.find(list(copies)).items()}
        self._tally.cached += len(answers)
        done = sum(copies[key] for key in answers)

        def landed(key: bytes, answer: Answer) -> None:
            nonlocal done
            answers[key] = answer
            done += copies[key]
            if progress is not None:
                progress(done, len(keys))

        if progress is not None:
            progress(done, len(keys))
        missing = [request_of(key, body) for key, body in wanted.items() if key not in answers]
        if missing:
            secret = None if self._key_env is None else read_key(self._key_env)
            _run(self._ask(missing, secret, len(answers), landed))
        return [answers[key] for key in keys]

    def stats(self) -> dict[str, Any]:
        """What was done over the client's life, JSON-serialisable.

        `retried` counts failures by kind; `lost` those that the server may charge for; `uncounted` the answers whose
        tokens the server did not count (they are guessed, three characters a token); `waited_s` the seconds in which
        nothing was under way; `concurrency` the requests at once that each server was found to take; `spent` is the
        scope's over the life of the file of answers.
        """
        spent = self._answers.spent(self.scope)
        return {
            **asdict(self._tally),
            "retried": dict(sorted(self._tally.retried.items())),
            "waited_s": round(self._tally.waited_s, 3),
            "concurrency": {replica.url: replica.capacity.limit for replica in self._replicas},
            "spent": {**asdict(spent), "money": self._budget.price(spent) if self._budget.priced else None},
        }

    def close(self) -> None:
        """Close the file of answers."""
        self._answers.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.scope!r})"

    async def _ask(
        self, missing: Sequence[Request], secret: str | None, done: int, landed: Callable[[bytes, Answer], None]
    ) -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(BlackOut(secret))
            lines = {}
            for replica in self._replicas:
                http = await stack.enter_async_context(_transport(replica.url, self._limits))
                lines[replica.url] = Line(
                    replica.url, http, secret, self._limits.timeout_s, self._limits.max_reply_bytes
                )
                # what was known of a server that was down is old news in a new call
                replica.free_at, replica.strikes, replica.dead = 0.0, 0, None
            await Dispatch(
                missing,
                self._replicas,
                lines,
                answers=self._answers,
                scope=self.scope,
                budget=self._budget,
                limits=self._limits,
                tally=self._tally,
                done=done,
                landed=landed,
                gone=self._gone,
                name=self._name,
                tell=self.tell,
            ).run()

    def _on_disk(self, key: bytes, reply: Reply) -> Answer:
        answer = read(reply)
        if answer is None:
            raise CheckpointError(
                f"the answer {key.hex()[:12]} was damaged after it was written",
                where=str(self._answers.path),
                do="move the file away (with its -wal and -shm) to ask anew",
            )
        return replace(answer, cached=True)


def read_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        NoKeyError: it is not set, or holds what no header can carry. The message does not quote it.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise NoKeyError(f"the environment variable {variable} holds no key", do=f"run `export {variable}=...` before")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise NoKeyError(
            f"the environment variable {variable} holds what cannot be a key (a blank, a letter with accents)"
        )
    return key


def _address(url: str) -> str:
    """An address without the end that we add.

    Raises:
        UserError: not an HTTP address, or one that holds a secret or a query.
    """
    do = f"give one such as {EXAMPLE}"
    if secret_in(url):
        raise UserError(
            f"the address of {urlsplit(url).hostname} holds a name, a password or a query, which may be secret",
            do="put the key into an environment variable and name it under `key`",
        )
    if (fault := fault_of(url)) is not None:
        raise UserError(f"not the address of a server: {fault}", where=url, do=do)
    return without_requests(url).strip().rstrip("/")


def _transport(url: str, limits: Limits) -> httpx2.AsyncClient:
    import httpx2

    client = httpx2.AsyncClient(
        timeout=httpx2.Timeout(limits.timeout_s, connect=min(CONNECT_S, limits.timeout_s), pool=None),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=limits.max_concurrency),
        follow_redirects=False,
        trust_env=not _is_here(urlsplit(url).hostname or ""),
    )
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, in a thread of its own where this one has a loop already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
