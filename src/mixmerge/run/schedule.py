"""Which steps may start now, the most urgent first: no processes, no store and no clock in here.

The urgency of a step is the longest way from it to the end of the study, so that what much depends on is not left for last.
Steps of one group go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from mixmerge.errors import UserError, did_you_mean
from mixmerge.plan.graph import Plan, Step, longest_chains
from mixmerge.run.servers import servers_of

# Seconds of work that show whether base and recipe are sound: nothing else is started before they are done.
FIRST = ("base", "mixture")
# How long steps take beside each other, where nothing better is known
ROUGH = {"train": 100.0, "generate": 10.0, "harness": 20.0, "merge": 5.0, "base": 5.0, "mixture": 2.0}


def rough(step: Step) -> float:
    """A step's length, in no unit."""
    return ROUGH.get(step.kind, 1.0)


class Schedule:
    """The steps of a plan that are not done: waiting, running, done or failed.

    `families`: groups of one family (the first word) go together too, where one process runs at a time. `keep_going`: a
    base or a mixture for which the recipe has to change does not end the run.
    """

    def __init__(
        self,
        plan: Plan,
        todo: Iterable[Step],
        *,
        families: bool = False,
        keep_going: bool = False,
        length: Callable[[Step], float] = rough,
    ) -> None:
        self.steps = plan.by_id
        self.todo = {step.id: step for step in todo}
        self.running: set[str] = set()
        self.failed: set[str] = set()
        self._lost: set[str] = set()
        self.ended = False
        self._families, self._keep_going, self._length = families, keep_going, length
        self._place = {step.id: at for at, step in enumerate(plan.steps)}
        self._rank = longest_chains(self.todo.values(), length)

    def ready(self, room: int = 1) -> list[Sequence[Step]]:
        """Batches that may start, each for one process, the most urgent first.

        Where there is room for more processes than batches, groups that only save loading are shared out.
        """
        if self.ended:
            return []
        ready = [step for step in self.todo.values() if self._may_start(step)]
        if not self._keep_going and any(step.kind in FIRST and self._can_come(step) for step in self.todo.values()):
            ready = [step for step in ready if step.kind in FIRST]
        ready.sort(key=lambda step: (-self._rank[step.id], self._place[step.id]))
        batches: dict[str, list[Step]] = {}
        for step in ready:
            group = step.group.partition(" ")[0] if self._families else step.group
            batches.setdefault(f"group {group}" if group else step.id, []).append(step)
        return [_one_thing_at_a_time(batch) for batch in self._shared_out(list(batches.values()), room)]

    def _shared_out(self, batches: list[list[Step]], room: int) -> list[list[Step]]:
        while len(batches) < room:
            divisible = [batch for batch in batches if len(batch) > 1 and all(map(_only_saves_loading, batch))]
            if not divisible:
                break
            longest = max(divisible, key=lambda batch: sum(self._length(step) for step in batch))
            at = batches.index(longest)
            batches[at : at + 1] = [longest[::2], longest[1::2]]
        return batches

    def _may_start(self, step: Step) -> bool:
        if step.id in self.running or self._lost.intersection(servers_of(step)):
            return False
        return not any(i in self.todo or i in self.failed for i in step.inputs.values())

    def _can_come(self, step: Step) -> bool:
        """Whether no failure keeps it from starting ever."""
        inputs = step.inputs.values()
        return not any(i in self.failed or (i in self.todo and not self._can_come(self.todo[i])) for i in inputs)

    def start(self, batch: Iterable[Step]) -> None:
        """They have a process now."""
        self.running.update(step.id for step in batch)

    def done(self, step: Step) -> None:
        """It is in the store."""
        self.todo.pop(step.id, None)
        self.running.discard(step.id)

    def fail(self, step: Step, *, end: bool = False, recipe: bool = False) -> None:
        """What depends on it never starts; `end`: nothing else does either.

        `recipe`: what the user gave has to change. Where base or mixtures show so, nothing else starts unless it is to keep
        going: it would be work for a study that comes to no end.
        """
        self.todo.pop(step.id, None)
        self.running.discard(step.id)
        self.failed.add(step.id)
        self.ended |= end or (recipe and step.kind in FIRST and not self._keep_going)

    def lose(self, server: str, by: str) -> int:
        """A server (as in `servers_of`) was of no use to a step: how many others that ask it never start now."""
        self._lost.add(server)
        return sum(server in servers_of(step) for step in self.todo.values() if step.id != by)

    def let_go(self, steps: Iterable[Step]) -> None:
        """Their process is gone without having come to them."""
        self.running.difference_update(step.id for step in steps)

    @property
    def blocked(self) -> list[str]:
        """Ids that a failure keeps from starting, in the order of the plan."""
        return list(self.todo)


def _only_saves_loading(step: Step) -> bool:
    """Whether its group shares what each process can load for itself; a server and its client stay one."""
    return step.group in ("mixture", "judge") or (step.kind == "generate" and "server" not in step.how)


def _one_thing_at_a_time(batch: Sequence[Step]) -> Sequence[Step]:
    """A process holds one large thing (a model, a server): the steps that share it follow one another."""
    order = list(dict.fromkeys(step.group for step in batch))
    return sorted(batch, key=lambda step: order.index(step.group))


def chosen(plan: Plan, only: Sequence[str]) -> set[str]:
    """Ids of the steps whose `kind/name` one of the patterns matches (`train/*`), and of all that they need.

    Raises:
        UserError: a pattern that no step has.
    """
    for pattern in only:
        if not matching(plan, [pattern]):
            do = did_you_mean(pattern, [step.title for step in plan.steps])
            raise UserError(f"no step is called '{pattern}'", where="--only", do=do)
    wanted = {step.id for step in matching(plan, only)}
    for step in reversed(plan.steps):
        if step.id in wanted:
            wanted.update(step.inputs.values())
    return wanted


def matching(plan: Plan, only: Sequence[str]) -> list[Step]:
    """The steps whose `kind/name` one of the patterns matches."""
    return [step for step in plan.steps if any(fnmatchcase(step.title, pattern) for pattern in only)]
