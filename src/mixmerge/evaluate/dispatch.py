"""One call's requests over the servers of an endpoint: which goes where and when, and what is done about its outcome.

Requests wait in a queue or, after a failure, in a heap by the time of their next try; a slot on a server is never held by
one that waits. Each server has its own capacity and its own pauses. Replies go to disk in groups: a result exists only
after its commit. The call ends when all have results, when the budget holds no more, or when patience does.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.answers import Answers, Reply, Spent
from mixmerge.evaluate.capacity import Capacity, Ticket
from mixmerge.evaluate.exchange import GIVEN_UP, Again, Answer, Answered, Hopeless, Line, Outcome, read
from mixmerge.evaluate.limits import Budget, BudgetError, Limits, ServerError, Shortage

STRIKES = 3  # failures in a row after which a server is tried with one request at a time
ALL_REFUSED = 20  # refusals, and not one answer ever: the request's form is at fault, not its content
CHARACTERS_A_TOKEN = 3  # a guess, where a server does not count
USUAL_COMPLETION = 256  # tokens, where a request names no limit and nothing is known yet
SLOW = 6  # so many times longer is a server that only does not answer, and fails nothing, let be
# Failures of a server that is up and works for others: the request itself is at fault
OWN_FAULTS = {"server_error", "bad_reply"}


@dataclass(slots=True)
class Replica:
    """A server of the endpoint, as this client knows it; kept from call to call."""

    url: str
    capacity: Capacity
    free_at: float = 0.0
    strikes: int = 0
    struck_at: float = 0.0
    dead: Hopeless | None = None
    answered: bool = False

    def room(self, now: float) -> bool:
        most = 1 if self.strikes >= STRIKES else self.capacity.limit
        return self.dead is None and now >= self.free_at and self.capacity.in_flight < most


@dataclass(slots=True)
class Request:
    """A body on its way to an answer."""

    key: bytes
    body: bytes
    guess: Spent
    tries: int = 0
    faults: int = 0
    first_sent: float | None = None
    first_failed: float | None = None


@dataclass(slots=True)
class Tally:
    """What a client did, over its life."""

    sent: int = 0
    answered: int = 0
    errors: int = 0
    cached: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    waited_s: float = 0.0


def request_of(key: bytes, body: Mapping[str, Any]) -> Request:
    """A request and what it may cost, by its length and its own limit of tokens."""
    # escapes only: a body may hold unpaired surrogates, which UTF-8 cannot carry
    text = json.dumps(body, ensure_ascii=True, allow_nan=False)
    characters = len(json.dumps(body, ensure_ascii=False))
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    most = most if isinstance(most, int) else USUAL_COMPLETION
    return Request(key, text.encode("ascii"), Spent(1, 0, characters // CHARACTERS_A_TOKEN, most))


class Dispatch:
    """One call; `run` once."""

    def __init__(
        self,
        requests: Sequence[Request],
        replicas: Sequence[Replica],
        lines: Mapping[str, Line],
        *,
        answers: Answers,
        scope: str,
        budget: Budget,
        limits: Limits,
        tally: Tally,
        done: int,
        landed: Callable[[bytes, Answer], None],
        gone: Callable[[], bool] | None = None,
        name: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._ready = deque(requests)
        self._waiting: list[tuple[float, int, Request]] = []
        self._open = len(requests)
        self._asked = done + len(requests)
        self._replicas, self._lines = replicas, lines
        self._answers, self._scope, self._budget, self._limits = answers, scope, budget, limits
        self._tally, self._landed, self._gone = tally, landed, gone
        self._name, self._tell = name or scope, tell
        self._random = random.Random()  # two processes must not wait alike; no result depends on it
        self._order = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flying: dict[bytes, Spent] = {}
        self._uncommitted: list[tuple[Request, Answered]] = []
        self._owed = Spent()  # spent, and not yet committed as such
        self._held: list[tuple[Request, Answered]] = []
        self._spent = answers.spent(scope)
        self._news, self._paid = asyncio.Event(), asyncio.Event()
        self._last_good = time.monotonic()
        self._last_bad, self._last_why = 0.0, "nothing was sent"
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """Get an answer for every request; `landed` is called with each after its commit.

        Raises:
            ServerError, BudgetError: the call cannot go on; what was answered is kept.
            CheckpointError: the file of answers cannot be written.
        """
        committer = asyncio.create_task(self._commit_always())
        committer.add_done_callback(lambda _: self._news.set())
        watch = asyncio.create_task(self._watch())
        try:
            while self._open and not committer.done():
                self._news.clear()
                until = self._fill()
                if self._flying or self._uncommitted:
                    await self._wait(until)
                elif self._failure is not None:
                    raise self._failure
                elif self._open:
                    await self._idle(until)
        finally:
            for task in [*self._tasks, watch, committer]:
                task.cancel()
            ends = await asyncio.gather(committer, watch, *self._tasks, return_exceptions=True)
            if isinstance(ends[0], CheckpointError):
                raise ends[0]
            batch, owed = self._uncommitted, self._owed
            spent = self._answers.keep(self._scope, self._rows(), owed)
            if isinstance(ends[0], Exception):  # the caller's progress broke off: what came in since is safe now
                raise ends[0]
            self._done(batch, owed, spent)

    def _fill(self) -> float | None:
        """Send what can be sent now; give the moment at which time alone lets more be sent, None where it will not."""
        now = time.monotonic()
        if self._held and len(self._held) == self._open:
            self._land_held()
        while self._waiting and self._waiting[0][0] <= now:
            self._ready.appendleft(heapq.heappop(self._waiting)[2])
        while self._ready:
            if self._failure is not None or now > self._last_good + self._limits.patience_s:
                return None
            if found := self._answers.find([self._ready[0].key]):  # another process was faster
                request = self._ready.popleft()
                if answer := read(found[request.key]):
                    self._land(request, replace(answer, cached=True))
                    continue
                self._ready.appendleft(request)
            if self._over(self._ready[0]):
                return None
            # what is in flight or not yet on disk is what a kill would cost: never more than the concurrency
            if len(self._flying) + len(self._uncommitted) >= sum(r.capacity.limit for r in self._replicas):
                return None
            roomy = [r for r in self._replicas if r.room(now)]
            if not roomy:
                return min((r.free_at for r in self._replicas if r.dead is None and r.free_at > now), default=None)
            replica = min(roomy, key=lambda r: (r.capacity.in_flight + 1) / r.capacity.limit)
            self._send(self._ready.popleft(), replica, now)
        return self._waiting[0][0] if self._waiting else None

    def _send(self, request: Request, replica: Replica, now: float) -> None:
        request.first_sent = request.first_sent or now
        ticket = replica.capacity.began()
        self._flying[request.key] = request.guess
        self._tally.sent += 1
        task = asyncio.create_task(self._carry(request, replica, ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, request: Request, replica: Replica, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            outcome = await self._lines[replica.url].ask(request.body)
        except BaseException as error:
            replica.capacity.ended()
            if isinstance(error, Exception):
                self._failure = self._failure or error
            raise
        finally:
            self._flying.pop(request.key, None)
            self._news.set()
        self._take_in(request, replica, ticket, outcome, began)

    def _take_in(self, request: Request, replica: Replica, ticket: Ticket, outcome: Outcome, began: float) -> None:
        now = time.monotonic()
        if isinstance(outcome, Answered):
            replica.capacity.answered(ticket, now - began)
            replica.strikes, replica.free_at, replica.answered, self._last_good = 0, 0.0, True, now
            if outcome.answer.finish == "error" and not self._ever_answered():
                self._hold(request, outcome)
            else:
                self._queue(request, outcome)
        elif isinstance(outcome, Again) and outcome.nowhere and not replica.answered:
            self._take_death(request, replica, Hopeless(f"its host is not found ({outcome.why})", "check the address"))
        elif isinstance(outcome, Hopeless):
            self._take_death(request, replica, outcome)
        else:
            self._take_failure(request, replica, ticket, outcome, began)

    def _take_death(self, request: Request, replica: Replica, death: Hopeless) -> None:
        replica.capacity.ended()
        replica.dead = death
        self._ready.appendleft(request)
        if all(r.dead for r in self._replicas):
            self._fail(death.why, death.do, replica.url, of_model=death.of_model)

    def _take_failure(self, request: Request, replica: Replica, ticket: Ticket, outcome: Again, began: float) -> None:
        now = time.monotonic()
        self._last_bad, self._last_why = now, outcome.why
        self._tally.retried[outcome.kind] += 1
        request.tries += 1
        if outcome.charged:
            self._tally.lost += 1
            self._owe(Spent(0, 1, request.guess.tokens_in, 0))
        if outcome.kind == "rate_limit":
            replica.capacity.refused(ticket)
            # while it works on others, it is only full; when it works on none, it wants to be left alone
            strike = pause = replica.capacity.in_flight == 0
        else:
            if outcome.kind in ("overload", "timeout"):
                replica.capacity.overloaded(ticket)
            else:
                replica.capacity.ended()
            strike = True
            pause = outcome.wait_s is not None or outcome.kind == "connection" or replica.strikes + 1 >= STRIKES
            request.faults += outcome.kind != "connection" or outcome.charged  # else it was never sent
        request.first_failed = request.first_failed or now
        if outcome.kind == "connection" and self._gone is not None and self._gone():
            self._fail(outcome.why, "see the server's log and run again to carry on", replica.url)
        if strike and began >= replica.struck_at:  # requests that fail together are one strike
            replica.strikes, replica.struck_at = replica.strikes + 1, now
        if pause:
            wait = self._backoff(replica.strikes) if outcome.wait_s is None else outcome.wait_s
            replica.free_at = max(replica.free_at, now + wait)
        if request.faults >= self._limits.attempts and outcome.kind != "rate_limit":
            since = request.first_sent if outcome.kind in OWN_FAULTS else request.first_failed
            if self._answered_since(since or now):
                self._give_up(request, outcome)
                return
            if outcome.kind == "bad_reply":
                do = "check the address (it ends in /v1 as a rule) and that an OpenAI-compatible server is there"
                self._fail(f"{outcome.why}, {request.faults} times in a row", do, replica.url)
        wait = self._backoff(request.tries)
        if outcome.wait_s is not None:
            wait = max(wait, outcome.wait_s * self._random.uniform(1, 1.1))
        heapq.heappush(self._waiting, (now + wait, next(self._order), request))

    def _answered_since(self, moment: float) -> bool:
        return self._last_good > moment

    def _give_up(self, request: Request, outcome: Again) -> None:
        """File a request that fails by itself under its reason, so that nobody pays for it again."""
        reply = Reply(GIVEN_UP, f"{outcome.why}, the last of {request.faults} failures".encode())
        answer = read(reply)
        assert answer is not None
        self._queue(request, Answered(reply, answer))

    def _backoff(self, failures: int) -> float:
        # several tries fit into any patience
        most = min(self._limits.backoff_most_s, self._limits.patience_s / 8)
        return min(most, self._limits.backoff_s * 2.0 ** min(max(failures, 1) - 1, 30)) * self._random.uniform(0.5, 1)

    def _fail(self, why: str, do: str, where: str, *, of_model: bool = False) -> None:
        kept = f"{self._asked - self._open} of {self._asked} requests are answered and kept"
        self._failure = self._failure or ServerError(f"{why}; {kept}", where=where, do=do, of_model=of_model)

    async def _watch(self) -> None:
        """Tell of every silence once: soon where requests fail, later where the server may only be slow."""
        told: tuple[float, bool] | None = None
        while self._tell is not None:
            await asyncio.sleep(min(1.0, self._limits.silent_s / 4))
            silence, failing = time.monotonic() - self._last_good, self._last_bad >= self._last_good
            long = self._limits.silent_s * (1 if failing else SLOW)
            if silence < long or told == (self._last_good, failing) or not self._open:
                continue
            told = self._last_good, failing
            rest = f"{len(self._flying)} requests are under way"
            if failing:
                rest = f"{self._last_why}; it is tried for up to {_period(self._limits.patience_s - silence)} more"
            self._tell(f"{self._urls}: no answer for {silence:.0f} s: {rest}")

    @property
    def _urls(self) -> str:
        return ", ".join(replica.url for replica in self._replicas)

    async def _idle(self, until: float | None) -> None:
        """Nothing is under way: wait for the next try, where there will be one."""
        now, end = time.monotonic(), self._last_good + self._limits.patience_s
        if self._ready and now <= end and (over := self._over(self._ready[0])):
            raise self._out_of_budget(over)
        if now <= end and until is not None and until <= end:
            await self._wait(until)
            self._tally.waited_s += time.monotonic() - now
        else:
            what = f"no answer for {now - self._last_good:.3g} s ({self._last_why})"
            if until is not None and now <= end:
                what = f"no answer, and none to be had for another {until - now:.0f} s ({self._last_why})"
            self._fail(what, "see that the server is up and run again to carry on", self._urls)

    async def _wait(self, until: float | None) -> None:
        """Wait for news, at the longest until the given moment."""
        alarm = (
            asyncio.get_running_loop().call_later(max(0.0, until - time.monotonic()), self._news.set) if until else None
        )
        await self._news.wait()
        if alarm is not None:
            alarm.cancel()

    def _over(self, request: Request) -> str | None:
        """The bound of the budget that one more request would exceed."""
        known, flying = self._spent.answered, len(self._flying)
        if known:
            ahead = replace(self._spent // known, answered=1, lost=0) * (flying + 1)
        else:
            ahead = sum(self._flying.values(), request.guess)
        return self._budget.over(self._spent + self._owed + ahead)

    def _out_of_budget(self, over: str) -> BudgetError:
        missing, known = self._open, self._spent.answered
        tokens = money = None
        if known:
            rest = self._spent * missing // known
            tokens = rest.tokens_in + rest.tokens_out
            money = self._budget.price(rest) if self._budget.priced else None
        return BudgetError(Shortage(over, self._asked - missing, missing, tokens, money), where=self._name)

    def _ever_answered(self) -> bool:
        return self._spent.answered > 0 or any(a.answer.error is None for _, a in self._uncommitted)

    def _hold(self, request: Request, answered: Answered) -> None:
        """Keep a refusal off the disk until the endpoint has shown that it answers at all."""
        self._held.append((request, answered))
        if len(self._held) >= ALL_REFUSED:
            self._fail(
                f"every request so far was refused: {answered.answer.error}",
                "mend the request (model, response format, parameters) or the server",
                self._name,
                of_model=True,
            )

    def _land_held(self) -> None:
        """All that is left was refused by an endpoint that never answered: the refusals count, and are not kept."""
        for request, refused in self._held:
            self._land(request, refused.answer)
        self._held.clear()

    def _queue(self, request: Request, answered: Answered) -> None:
        answer = answered.answer
        tokens_in, tokens_out = answer.prompt_tokens, answer.completion_tokens
        if answered.reply.status == 200 and (tokens_in is None or tokens_out is None):
            self._tally.uncounted += 1
            tokens_in = request.guess.tokens_in if tokens_in is None else tokens_in
            tokens_out = len(answer.text) // CHARACTERS_A_TOKEN if tokens_out is None else tokens_out
        self._owe(Spent(1 if answered.reply.status else 0, 0, tokens_in or 0, tokens_out or 0))
        self._tally.prompt_tokens += tokens_in or 0
        self._tally.completion_tokens += tokens_out or 0
        self._uncommitted.append((request, answered))
        if answer.error is None and self._held:
            held, self._held = self._held, []
            for one in held:
                self._queue(*one)
        self._paid.set()

    def _owe(self, spent: Spent) -> None:
        self._owed = self._owed + spent
        self._paid.set()

    async def _commit_always(self) -> None:
        while True:
            await self._paid.wait()
            self._paid.clear()
            batch, owed = list(self._uncommitted), self._owed
            commit = asyncio.ensure_future(asyncio.to_thread(self._answers.keep, self._scope, self._rows(), owed))
            try:
                spent = await asyncio.shield(commit)
            except asyncio.CancelledError:  # the thread goes on: what it commits must not be counted twice
                self._done(batch, owed, await commit)
                raise
            self._done(batch, owed, spent)
            self._news.set()

    def _rows(self) -> list[tuple[bytes, Reply]]:
        return [(request.key, answered.reply) for request, answered in self._uncommitted]

    def _done(self, batch: Sequence[tuple[Request, Answered]], owed: Spent, spent: Spent) -> None:
        """Hand out what is on disk now."""
        batch = list(batch)
        self._uncommitted = self._uncommitted[len(batch) :]
        self._owed, self._spent = self._owed + owed * -1, spent
        for request, answered in batch:
            self._land(request, answered.answer)

    def _land(self, request: Request, answer: Answer) -> None:
        self._open -= 1
        self._tally.cached += answer.cached
        self._tally.answered += not answer.cached and answer.error is None
        self._tally.errors += not answer.cached and answer.error is not None
        self._landed(request.key, answer)


def _period(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{max(0.0, seconds):.0f} s"
