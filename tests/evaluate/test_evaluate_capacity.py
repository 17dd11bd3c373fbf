"""The search for a server's capacity, against a simulated server: its clock is ours, so nothing depends on this machine."""

from __future__ import annotations

import heapq
import random

import pytest

from mixmerge.evaluate.capacity import Capacity


def simulate(capacity: Capacity, requests: int, slots: int, style: str, spread: float) -> tuple[float, int]:
    """Answers a second where the server's own limit is `slots` a second, and the requests that it refused."""
    draw = random.Random(7)
    now, busy, answered, refused, order = 0.0, 0, 0, 0, 0
    queue: list = []
    events: list = []

    def work(ticket, sent: float) -> None:
        nonlocal busy, order
        busy, order = busy + 1, order + 1
        heapq.heappush(events, (now + 1 + draw.uniform(-spread, spread), order, ticket, sent))

    while answered < requests:
        while capacity.in_flight < min(capacity.limit, requests - answered):
            ticket = capacity.began()
            if busy < slots:
                work(ticket, now)
            elif style == "refuse":
                refused += 1
                capacity.refused(ticket)
            else:
                queue.append((ticket, now))
        now, _, ticket, sent = heapq.heappop(events)
        busy, answered = busy - 1, answered + 1
        capacity.answered(ticket, now - sent)
        if queue:
            work(*queue.pop(0))
    return answered / now, refused


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("style", ["queue", "refuse"])
@pytest.mark.parametrize("slots", [1, 2, 5, 12, 48, 100])
def test_most_of_the_capacity_is_used_from_a_cold_start(slots, style, spread):
    capacity = Capacity(most=256)
    rate, refused = simulate(capacity, 50 * slots + 50, slots, style, spread)
    assert rate >= 0.85 * slots
    if style == "queue":
        assert slots <= capacity.limit <= max(10, 4 * slots), "no deep queue"
    else:
        assert refused <= slots + 40


@pytest.mark.parametrize("style", ["queue", "refuse"])
def test_the_ceiling_is_respected(style):
    capacity = Capacity(most=20)
    simulate(capacity, 2000, 100, style, 0.2)
    assert capacity.limit == 20


def test_a_fixed_number_never_moves():
    capacity = Capacity(most=256, fixed=30)
    simulate(capacity, 500, 10, "queue", 0.2)
    ticket = capacity.began()
    capacity.overloaded(ticket)
    assert capacity.limit == 30


def test_a_server_that_breaks_under_load_is_given_half_once_for_all_that_were_sent():
    capacity = Capacity(most=256, fixed=None)
    tickets = [capacity.began() for _ in range(8)]
    for ticket in tickets:
        capacity.overloaded(ticket)
    assert capacity.limit == 4
    assert capacity.in_flight == 0


def test_a_server_that_takes_nothing_is_asked_less_each_time():
    capacity = Capacity(most=256)
    for _ in range(6):
        capacity.refused(capacity.began())
    assert capacity.limit == 1


def test_a_capacity_that_grows_is_found_again():
    capacity = Capacity(most=256)
    simulate(capacity, 400, 10, "refuse", 0.2)
    before = capacity.limit
    simulate(capacity, 6000, 40, "refuse", 0.2)
    assert before <= 12
    assert capacity.limit >= 36
