"""How far a client may go: in money and tokens, in time and in requests at once; and the errors that say it went so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from mixmerge.errors import MixmergeError, UserError
from mixmerge.evaluate.answers import Spent

MILLION = 1_000_000


class ServerError(MixmergeError, ConnectionError):
    """A server that cannot be used: out of reach, failing for longer than our patience, or refusing everything.

    `of_model`: it may serve other models all the same.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None, of_model: bool = False) -> None:
        super().__init__(what, where=where, do=do)
        self.of_model = of_model

    def again(self, *, what: str | None = None, where: str | None = None, do: str | None = None) -> Self:
        error = super().again(what=what, where=where, do=do)
        error.of_model = self.of_model
        return error


class NoKeyError(UserError):
    """The environment variable that is to hold a server's key holds none."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """What a spent budget leaves open: `over` is its bound in words, `tokens` and `money` what the rest may take."""

    over: str
    done: int
    missing: int
    tokens: int | None = None
    money: float | None = None

    def with_more(self, requests: int) -> Shortage:
        """So many more requests that were not even tried."""
        missing = self.missing + requests
        tokens = None if self.tokens is None else self.tokens * missing // self.missing
        money = None if self.money is None else self.money * missing / self.missing
        return replace(self, missing=missing, tokens=tokens, money=money)

    @property
    def cost(self) -> str:
        """What the rest may take, as the end of a sentence; empty where it is not known."""
        tokens = "" if self.tokens is None else f", about {self.tokens} tokens"
        return tokens + ("" if self.money is None else f" or {self.money:.2g} in money")

    def __str__(self) -> str:
        asked = self.done + self.missing
        kept = f"{self.done} of {asked} requests are answered and kept, {self.missing} are missing"
        return f"{self.over} is spent: {kept}{self.cost}"


class BudgetError(MixmergeError, RuntimeError):
    """The budget is spent; `done` requests of this call are answered and kept, `missing` are not."""

    def __init__(self, shortage: Shortage, *, where: str | None = None, do: str | None = None) -> None:
        super().__init__(str(shortage), where=where, do=do or "raise the budget and run again to carry on")
        self.shortage = shortage

    @property
    def done(self) -> int:
        return self.shortage.done

    @property
    def missing(self) -> int:
        return self.shortage.missing

    def again(self, *, what: str | None = None, where: str | None = None, do: str | None = None) -> Self:
        return type(self)(self.shortage, where=where or self.where, do=do or self.do)

    def with_more(self, requests: int) -> Self:
        """The same of a call that would have gone on to ask so many more."""
        return type(self)(self.shortage.with_more(requests), where=self.where, do=self.do)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a scope may spend over the life of its file of answers; None: no bound.

    `requests` counts those answered and those lost (sent whole, nothing usable came back: they may be charged); `tokens`
    counts prompts and completions; `money` is in the unit of `price_in` and `price_out`, per million tokens. Requests are
    never exceeded. Tokens and money are known when the answer is there: what is in flight is reckoned at the mean so far
    (the first ones at their `max_tokens`), so they can be exceeded by the amount by which the last ones cost more than that.
    Answers that are on disk cost nothing.
    """

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "money", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} {value} is not a number from 0")
        if self.money is not None and self.price_in is None and self.price_out is None:
            raise ValueError("a budget in money needs price_in and price_out, per million tokens")

    @property
    def priced(self) -> bool:
        return self.price_in is not None or self.price_out is not None

    def price(self, spent: Spent) -> float:
        """What it costs, as far as prices are given."""
        return (spent.tokens_in * (self.price_in or 0) + spent.tokens_out * (self.price_out or 0)) / MILLION

    def over(self, spent: Spent) -> str | None:
        """The bound that would be exceeded, in words; None where the budget holds."""
        if self.requests is not None and spent.requests > self.requests:
            return f"the budget of {self.requests} requests"
        if self.tokens is not None and spent.tokens_in + spent.tokens_out > self.tokens:
            return f"the budget of {self.tokens} tokens"
        if self.money is not None and self.price(spent) > self.money:
            return f"the budget of {self.money:g} in money"
        return None


@dataclass(frozen=True, slots=True)
class Limits:
    """How a client behaves towards one server; none of it changes an answer.

    `timeout_s`: for one request, from sending to its last byte. `patience_s`: how long the servers may go without a single
    answer before the call gives up; `silent_s`: how long before somebody is told. `attempts`: how often one request may fail by itself while others are answered.
    `max_concurrency`: the most requests at once on one server, of which it finds the best number; `concurrency` fixes it.
    `backoff_s` doubles from one failure to the next, up to `backoff_most_s`, less a random part of up to a half.
    """

    timeout_s: float = 300.0
    patience_s: float = 900.0
    silent_s: float = 10.0
    attempts: int = 6
    max_concurrency: int = 128
    concurrency: int | None = None
    backoff_s: float = 0.5
    backoff_most_s: float = 30.0
    max_reply_bytes: int = 8 * 2**20

    def __post_init__(self) -> None:
        for name in (
            "timeout_s",
            "patience_s",
            "silent_s",
            "attempts",
            "max_concurrency",
            "concurrency",
            "max_reply_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} is not positive")
        if not 0 <= self.backoff_s <= self.backoff_most_s:
            raise ValueError(f"backoff_s {self.backoff_s} is not between 0 and backoff_most_s {self.backoff_most_s}")
