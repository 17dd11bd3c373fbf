"""How many requests a server takes at once, found by watching it: no clock and no network in here.

A server has one of two ways to be full. It refuses (429): then fewer than were in flight are its capacity, and the limit
goes there at once. Or it queues: then more requests bring no more answers a second, only longer waits. By Little's law the
rate is requests in flight / mean latency, so each window compares that at two limits and keeps the larger only where it
paid. Growth doubles until one of the two happens, then probes upwards, less often the less it finds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

START = 8
FULL = 0.6  # of the limit in use on average: below, a window says nothing about a larger one
WINDOW = 6  # fewest answers that a decision rests on
HEADROOM = 1.15  # over the knee, so that the server never runs dry between two requests
STEP = 1.25  # a probe above a knee found by latency
PAID = 0.4  # a larger limit must bring this share of the rate that it would bring a server with room
FIRST_PROBE, LAST_PROBE = 2, 32  # windows between two probes: doubled after one that found nothing


class Ticket(NamedTuple):
    """What was known when a request was sent: the window it counts for, and how many were in flight with it."""

    window: int
    among: int


class Capacity:
    """The limit for one server. Call `began`, then one of `answered`, `refused`, `overloaded`, `ended` for each request.

    `limit` is 1..most. With `fixed` it stays there.
    """

    def __init__(self, most: int, fixed: int | None = None) -> None:
        self.most = fixed or most
        self.limit = fixed or min(START, most)
        self.in_flight = 0
        self._fixed = fixed is not None
        self._doubling = True
        self._refuses = False  # how the knee was found: by refusals, or by latency
        self._held: int | None = None  # the limit to go back to, while a probe runs
        self._rate = 0.0  # answers a second at the limit before this window's
        self._previous = 0  # that limit
        self._probe_every, self._until_probe, self._step = FIRST_PROBE, FIRST_PROBE, 1
        self._window = 0  # requests carry it, so that a window counts only those sent under its limit
        self._open_window()

    def began(self) -> Ticket:
        """A request was sent; give the result back with its outcome."""
        self.in_flight += 1
        self._flying += self.in_flight
        self._sent += 1
        return Ticket(self._window, self.in_flight)

    def answered(self, ticket: Ticket, seconds: float) -> None:
        """The server did the work."""
        self.in_flight -= 1
        if self._fixed or ticket.window != self._window:
            return
        self._seconds += seconds
        self._answers += 1
        # half a round is enough to see whether doubling paid, and a ramp costs what it waits
        if self._answers >= max(WINDOW, self.limit // 2 if self._doubling else self.limit):
            self._decide()

    def ended(self) -> None:
        """The request came to nothing, and that says nothing about load."""
        self.in_flight -= 1

    def refused(self, ticket: Ticket) -> None:
        """The server refused the request because it has enough (429): it takes fewer than were in flight with it."""
        self.in_flight -= 1
        if self._fixed:
            return
        self._refuses = True
        # of replies on their way nothing is known here, so this is never below what the server takes
        takes = ticket.among - 1 if self.in_flight else self.limit // 2
        if takes < self.limit:
            self._settle(max(1, takes), found=None if self._held is None else False)

    def overloaded(self, ticket: Ticket) -> None:
        """The server broke under the load or timed out: half the limit, once for all that were sent under it."""
        self.in_flight -= 1
        if not self._fixed and ticket.window == self._window:
            self._settle(max(1, self.limit // 2), found=False)

    def _decide(self) -> None:
        """At the end of a window: grow, keep or go back."""
        at_once = self._flying / max(1, self._sent)
        full = at_once >= FULL * self.limit
        rate = at_once * self._answers / max(self._seconds, 1e-9)
        if not full:  # there was not enough to ask: the window says nothing about a larger limit
            self._open_window()
        elif self._doubling:
            self._double(rate)
        elif self._held is not None:
            self._judge_probe(rate)
        else:
            self._rate = rate if not self._rate or self._previous != self.limit else 0.7 * self._rate + 0.3 * rate
            self._previous = self.limit
            self._until_probe -= 1
            if self._until_probe <= 0 and self.limit < self.most:
                self._held = self.limit
                step = self._step if self._refuses else max(1, math.ceil(self.limit * (STEP - 1)))
                self.limit = min(self.most, self.limit + step)
            self._open_window()

    def _double(self, rate: float) -> None:
        if self._previous and not self._paid(rate):
            # what the server did at the smaller limit, had it been full: rate x latency without a queue
            knee = HEADROOM * self._previous * rate / self._rate
            self._settle(max(self._previous, min(self.limit, math.ceil(knee))), found=None)
            return
        if self.limit >= self.most:
            self._settle(self.most, found=None)
            return
        self._rate, self._previous = rate, self.limit
        self.limit = min(self.most, 2 * self.limit)
        self._open_window()

    def _judge_probe(self, rate: float) -> None:
        held = self._held or 1
        if self._refuses or self._paid(rate):
            self._step = min(2 * self._step, max(1, held // 4))
            self._rate, self._previous = rate, self.limit
            self._settle(self.limit, found=True)
        else:
            self._settle(held, found=False)

    def _paid(self, rate: float) -> bool:
        return rate / self._rate - 1 >= PAID * (self.limit / self._previous - 1)

    def _settle(self, limit: int, *, found: bool | None) -> None:
        """Stay at a limit until the next probe; `found` says what the last probe came to."""
        if found is not None:
            self._probe_every = FIRST_PROBE if found else min(LAST_PROBE, 2 * self._probe_every)
        if found is not True:
            self._step = 1
        self._until_probe = 1 if found else self._probe_every
        self._doubling, self._held, self.limit = False, None, limit
        self._open_window()

    def _open_window(self) -> None:
        self._window += 1
        self._answers = self._sent = self._flying = 0
        self._seconds = 0.0
