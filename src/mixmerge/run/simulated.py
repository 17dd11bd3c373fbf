"""A backend on paper: the real plan and the real runner's decisions, on machines that need not exist, in no time.

Steps last as long as a model of them says, and take what a model says; a clock of its own jumps from event to event.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmerge.plan.graph import Plan, Step, longest_chains
from mixmerge.run.backend import Event
from mixmerge.run.resources import Demand, Pool, Resources, Share, demand_of_all, usual_jobs
from mixmerge.run.runner import drive
from mixmerge.run.schedule import Schedule

Length = Callable[[Step, int], float]


@dataclass(frozen=True, slots=True)
class Simulation:
    """How a study would go: seconds, GPU seconds at work, and the seconds that no schedule could beat."""

    makespan: float
    gpu_seconds: float
    gpus: int
    critical_path: float
    work: float

    @property
    def bound(self) -> float:
        """The longest way through the plan, or all work shared out evenly, whichever is longer."""
        return max(self.critical_path, self.work)

    @property
    def utilisation(self) -> float:
        """Share (0..1) of the GPUs' time that steps had them."""
        return self.gpu_seconds / (self.makespan * self.gpus) if self.gpus and self.makespan else 0.0


class SimulatedBackend:
    """`jobs` processes at once at most; `length(step, gpus)` is in seconds, `demand(step)` what a step takes."""

    def __init__(self, machine: Resources, length: Length, demand: Callable[[Step], Demand], *, jobs: int) -> None:
        self.now = self.gpu_seconds = 0.0
        self._pool, self._length, self._demand = Pool(machine), length, demand
        self._jobs, self._running = jobs, 0
        self._events: list[tuple[float, int, Event, Share | None]] = []
        self._order = itertools.count()

    def start(self, batch: Sequence[Step]) -> bool:
        if not self.room:
            return False
        share = self._pool.take(demand_of_all(batch, self._demand))
        if share is None:
            return False
        self._running += 1
        at = self.now
        for step in batch:
            at += self._length(step, len(share.gpus))
            self._say(at, {"event": "done", "step": step.id})
        self._say(at, {"event": "exit", "steps": tuple(batch), "code": 0}, share)
        self.gpu_seconds += (at - self.now) * len(share.gpus)
        return True

    def _say(self, at: float, event: Event, share: Share | None = None) -> None:
        heapq.heappush(self._events, (at, next(self._order), event, share))

    def next(self) -> Event:
        self.now, _, event, share = heapq.heappop(self._events)
        if share is not None:
            self._pool.give(share)
            self._running -= 1
        return event

    @property
    def room(self) -> int:
        return self._jobs - self._running

    @property
    def busy(self) -> bool:
        return bool(self._events)

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._events.clear()

    def close(self) -> None:
        pass


def simulate(
    plan: Plan,
    machine: Resources,
    length: Length,
    demand: Callable[[Step], Demand],
    *,
    expected: Callable[[Step], float] | None = None,
) -> Simulation:
    """Drive a whole plan through the real schedule on a machine of the mind.

    `expected`: how long the schedule takes a step to be, where it knows no better, as in a run; else it knows the truth.
    """
    backend = SimulatedBackend(machine, length, demand, jobs=usual_jobs(machine))
    gpus = len(machine.gpus)

    def alone(step: Step) -> float:
        return length(step, min(demand(step).gpus, gpus))

    schedule = Schedule(plan, plan.steps, length=expected or alone)
    done = sum(event["event"] == "done" for event in drive(schedule, backend))
    assert done == len(plan.steps), f"{len(plan.steps) - done} steps never started"
    work = sum(alone(step) * min(demand(step).gpus, gpus) for step in plan.steps)
    longest = max(longest_chains(plan.steps, alone).values(), default=0.0)
    return Simulation(backend.now, backend.gpu_seconds, gpus, longest, work / max(1, gpus))
