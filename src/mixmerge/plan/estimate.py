"""What the steps to run will take: time, GPUs, disk, requests and tokens of judges, money; each with its range and its source.

Seconds are learnt from finished steps of the same kind on the same kind of machine, scaled by what drives them (plan/work.py),
else worked out by the rough rates of plan/rough.py. Bytes and tokens follow no machine, so any record tells them. What neither
can tell is named with its reason, and never counted as nothing.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from mixmerge.machine import Machine, this_machine
from mixmerge.plan.effect import ORDERS
from mixmerge.plan.graph import Plan, Step, longest_chains
from mixmerge.plan.learnt import Amount, from_records, from_rough, reaching
from mixmerge.plan.rough import SPREAD, gpus_of, rough_bytes, rough_seconds, rough_starting
from mixmerge.plan.size import base_size, record_parameters
from mixmerge.plan.work import PROMPT_TOKENS, Facts, Work, work_of
from mixmerge.terminal import visible

Record = dict[str, Any]
NAMES = {"train": "training", "generate": "generation", "fit-judge": "fitting", "judge": "judging", "score": "scoring"}
NAMES |= {"harness": "harness run", "adopt": "adoption"}
BROADER = ("train", "merge", "base")  # kinds whose other variants still tell something of the time
WIDER = 2.0
COSTS = ("disk_bytes", "requests", "money")
NAMED = 3  # sources of a sum, machines of a source
FEW = 3  # records that may all have loaded what a step beside them did not have to, or the other way round
LOADING = 20.0  # seconds of libraries, and of code that is compiled when it is first used
ROW_TOKENS = 200.0  # of a row, where no mixture was drawn from such data
RUBRIC_TOKENS, SAID_TOKENS = 600, 150  # of a judge's instructions and answer


class Past(Protocol):
    """What estimating needs to know of earlier runs."""

    def record(self, step_id: str) -> Record | None: ...
    def records(self, kind: str) -> list[Record]: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step; None where it is not known, which `unknown` names by field with the reason, or does not apply."""

    seconds: Amount | None = None
    gpus: int = 0
    disk_bytes: Amount | None = None
    requests: int | None = None
    tokens_in: Amount | None = None
    tokens_out: Amount | None = None
    money: Amount | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = {part: getattr(self, part) for part in self.__slots__}
        return {part: v.to_json() if isinstance(v, Amount) else v for part, v in values.items()}


def estimate(plan: Plan, left: Sequence[Step], past: Past, machine: Machine) -> dict[str, Estimate]:
    """The estimate of every step that is `left`, by id; `machine` is where they will run."""
    estimator = _Estimator(plan, past, machine)
    return {step.id: estimator.of(step) for step in left}


class _Estimator:
    """One plan on one machine; what records tell is gathered once a kind."""

    def __init__(self, plan: Plan, past: Past, machine: Machine) -> None:
        self.plan, self.past, self.machine = plan, past, machine
        self.size = base_size(plan, past.record)
        self._gathered: dict[str, list[tuple[Work, Record]]] = {}
        self._known: dict[tuple[Any, ...], Amount | None] = {}  # of equal work, worked out once
        self._row_tokens: float | None = None
        self._spent: dict[tuple[str, ...], tuple[float, float, int] | None] = {}

    def of(self, step: Step) -> Estimate:
        spec = {"kind": step.kind, "what": step.what, "how": step.how, "inputs": step.inputs}
        work = work_of(spec, self._facts(step))
        unknown: dict[str, str] = {}
        seconds = self._seconds(step, work, unknown)
        disk = self._disk(step, work, unknown)
        gpus = gpus_of(step.how, work, self.machine)
        if step.kind != "judge" or "server" not in step.how:
            return Estimate(seconds, gpus, disk, unknown=unknown)
        return self._asked(step, work, Estimate(seconds, gpus, disk, unknown=unknown))

    # What a step's own settings do not tell

    def _facts(self, step: Step) -> Facts:
        parameters = None if self.size is None else self.size.parameters
        if step.kind in ("mixture", "train"):
            mixture = step if step.kind == "mixture" else self.plan.by_id[step.inputs["mixture"]]
            return Facts(parameters, self._tokens(mixture))
        return Facts(parameters)

    def _tokens(self, mixture: Step) -> float:
        if (made := self.past.record(mixture.id)) is not None and "tokens" in made["measurements"]:
            return float(made["measurements"]["tokens"])
        budget = float(mixture.what["budget"])
        if mixture.what["unit"] == "tokens":
            return budget
        if self._row_tokens is None:
            measured = [record["measurements"] for record in self.past.records("mixture")]
            shares = [m["tokens"] / m["rows"] for m in measured if m.get("rows") and m.get("tokens")]
            self._row_tokens = median(shares) if shares else ROW_TOKENS
        longest = mixture.what.get("max_length")
        return budget * (self._row_tokens if longest is None else min(self._row_tokens, float(longest)))

    def _record_facts(self, record: Record) -> Facts:
        parameters = record_parameters(record, self.past.record)
        tokens: float | None = None
        if record["kind"] in ("mixture", "train"):
            tokens = record["measurements"].get("tokens")
        if record["kind"] == "train" and tokens is not None:  # those of all epochs
            what = record["what"]
            tokens /= float(what.get("epochs", what.get("settings", {}).get("epochs", 1.0)))
        return Facts(parameters, tokens)

    # Time and disk

    def _gather(self, kind: str) -> list[tuple[Work, Record]]:
        if kind not in self._gathered:
            found = []
            for record in self.past.records(kind):
                try:
                    found.append((work_of(record, self._record_facts(record)), record))
                except (KeyError, TypeError, ValueError):
                    continue  # written by an earlier mixmerge, with other fields
            self._gathered[kind] = found
        return self._gathered[kind]

    def _seconds(self, step: Step, work: Work, unknown: dict[str, str]) -> Amount | None:
        if work.amount is not None:
            if (learnt := self._learnt(step, work, work.amount)) is not None:
                return learnt
            rough = rough_seconds(step.kind, step.what, step.how, work, self.size, self.machine)
            if rough is not None:
                return from_rough(rough, self._rough_source(step.kind), SPREAD)
        unknown["seconds"] = self._why_unknown(step, work)
        return None

    def _learnt(self, step: Step, work: Work, amount: float) -> Amount | None:
        key = ("seconds", step.kind, work, gpus_of(step.how, work, self.machine))
        if key not in self._known:
            source, alike, wider = self._alike(step, work)
            points = [(float(other.amount or 0), _took(record)) for other, record in alike]
            found = None
            if points:
                start, most = self._start(step.kind, [record for _, record in alike])
                found = from_records(points, amount, source, start=start, most=most, wider=wider)
            if found is not None and len(points) < FEW:
                rough = rough_seconds(step.kind, step.what, step.how, work, self.size, self.machine)
                found = found if rough is None else reaching(found, from_rough(rough, "", SPREAD), LOADING)
            self._known[key] = found
        return self._known[key]

    def _start(self, kind: str, alike: Sequence[Record]) -> tuple[float | None, float]:
        """What such a step takes however little it does, None where that was not measured, and the most it may be."""
        measured = [
            max(0.0, _took(record) - record["measurements"]["seconds"])
            for record in alike
            if kind == "train" and record["measurements"].get("seconds")
        ]
        if measured:
            return median(measured), max(measured)
        return None, LOADING

    def _alike(self, step: Step, work: Work) -> tuple[str, list[tuple[Work, Record]], float]:
        """Where the times come from, the records that are like the step, and how much wider a range is."""
        gpus = gpus_of(step.how, work, self.machine)
        near = [
            (other, record)
            for other, record in self._gather(step.kind)
            if other.amount and other.here == work.here and _timed(record) and self._same_machine(other, record, gpus)
        ]
        same = [(other, record) for other, record in near if other.like == work.like]
        chosen, settings, wider = same, "", 1.0
        if not same and step.kind in BROADER:
            chosen, settings, wider = near, " with other settings", WIDER
        where = _where(record for _, record in chosen) if work.here else "by this server"
        return f"{_count(len(chosen), NAMES.get(step.kind, step.kind))} {where}{settings}", chosen, wider

    def _same_machine(self, work: Work, record: Record, gpus: int) -> bool:
        if not work.here:
            return True
        other = Machine.of_record(record.get("provenance", {}))
        # a step may have had only some of the machine's GPUs
        alike = other is not None and other.of_kind(self.machine)
        return alike and gpus_of(record["how"], work, self.machine) == gpus

    def _disk(self, step: Step, work: Work, unknown: dict[str, str]) -> Amount | None:
        if work.bulk is not None and (learnt := self._written(step, work, work.bulk)) is not None:
            return learnt
        rough = rough_bytes(step.kind, step.what, step.how, work, self.size)
        if rough is None:
            unknown["disk_bytes"] = f"{work.lacking} is not known yet"
            return None
        models = step.kind in ("base", "adopt", "train", "merge")
        return from_rough(rough, self._rough_source(step.kind), 1.1 if models else SPREAD)

    def _written(self, step: Step, work: Work, bulk: float) -> Amount | None:
        key = ("bytes", step.kind, work)
        if key not in self._known:
            points = [
                (float(other.bulk), float(sum(record["files"].values())))
                for other, record in self._gather(step.kind)
                if other.bulk and record.get("files") and other.like == work.like
            ]
            source = _count(len(points), NAMES.get(step.kind, step.kind))
            self._known[key] = from_records(points, bulk, source) if points else None
        return self._known[key]

    def _rough_source(self, kind: str) -> str:
        if kind in ("base", "adopt", "train", "merge", "generate"):
            told = "the model's size" if self.size is None else f"the model's size by {self.size.told_by}"
            return f"rough, from {told}"
        by = {"mixture": "its budget", "fit-judge": "judges like it"}
        return f"rough, from {by.get(kind, 'the number of answers')}"

    def _why_unknown(self, step: Step, work: Work) -> str:
        if work.amount is None:
            return f"{work.lacking} is not known yet"
        if not work.here:
            return "how fast its server is shows once it was asked"
        if step.kind == "harness":
            return "how long its tasks take shows once they ran here"
        return "nothing tells how fast it is before it ran here"

    # Judges behind a server

    def _asked(self, step: Step, work: Work, found: Estimate) -> Estimate:
        """With the requests, tokens and money that the step costs where none of its answers is there already."""
        unknown = dict(found.unknown)
        if work.amount is None:
            unknown["requests"] = f"{work.lacking} is not known yet"
            return Estimate(found.seconds, found.gpus, found.disk_bytes, unknown=unknown)
        requests = int(work.amount) * ORDERS.get(step.what["question"], 1)
        told, cap = self._spent_by(work), step.what["fields"].get("max_tokens") or SAID_TOKENS
        if told is not None:
            read, wrote, records = told
            source = f"{_count(records, 'judging')} by this judge"
            each_in, each_out = from_rough(read, source, 1.2), from_rough(wrote, source, 1.2)
        else:
            answers = self.plan.by_id[step.inputs["responses"]].what["max_new_tokens"]
            sides = 2 if step.what["question"] == "quality" else 1
            source = "rough, from the longest answers"
            each_in = from_rough(RUBRIC_TOKENS + PROMPT_TOKENS + sides * answers, source, 2.0)
            each_out = from_rough(min(SAID_TOKENS, cap), source, 2.0)
        tokens_in, tokens_out = each_in.times(requests), each_out.times(requests)
        money, budget = None, step.how.get("budget") or {}
        prices = budget.get("price_in"), budget.get("price_out")
        if None not in prices:
            money = _money(tokens_in, tokens_out, prices)
        elif step.how["server"]["urls"]:
            unknown["money"] = "the recipe has no price_in and price_out of its judge"
        return Estimate(found.seconds, found.gpus, found.disk_bytes, requests, tokens_in, tokens_out, money, unknown)

    def _spent_by(self, work: Work) -> tuple[float, float, int] | None:
        """(tokens read, tokens written) a request, and the records that tell it."""
        if work.like not in self._spent:
            tallies = [
                record["measurements"]["server"]
                for other, record in self._gather("judge")
                if other.like == work.like and record["measurements"].get("server", {}).get("answered")
            ]
            answered = sum(tally["answered"] for tally in tallies)
            read, wrote = (
                sum(tally.get(key, 0) for tally in tallies) for key in ("prompt_tokens", "completion_tokens")
            )
            self._spent[work.like] = (read / answered, wrote / answered, len(tallies)) if answered else None
        return self._spent[work.like]


def _took(record: Record) -> float:
    """Seconds of a step: of the process that ended it, and of the steps of its training that others had taken before a kill."""
    return float(record["provenance"]["seconds"]) + float(record["measurements"].get("seconds_resumed", 0.0))


def _timed(record: Record) -> bool:
    """Whether a record tells how long all its work took: not of a part that was left after a kill, or answered already."""
    measured = record["measurements"]
    begun = any(measured.get(key) for key in ("resumed", "tensors_resumed"))
    asked = measured.get("server", {"answered": 1}).get("answered")
    return bool(record.get("provenance", {}).get("seconds")) and not begun and bool(asked)


def _money(read: Amount, wrote: Amount, prices: tuple[Any, Any]) -> Amount:
    parts = [read.times(float(prices[0]) / 1e6), wrote.times(float(prices[1]) / 1e6)]
    value, low, high = (sum(getattr(part, name) for part in parts) for name in ("value", "low", "high"))
    return Amount(value, low, high, read.source)


def _where(records: Iterable[Record]) -> str:
    """On which machines the records were made, all of them of this kind."""
    hosts = dict.fromkeys(visible(str(record["provenance"].get("host", "?"))) for record in records)
    others = [host for host in hosts if host != platform.node()]
    if not others:
        return "here"
    told = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    kind = f"on {'a machine' if len(others) == 1 else 'machines'} of this kind ({told})"
    return kind if len(others) == len(hosts) else f"here and {kind}"


def _count(number: int, name: str) -> str:
    return f"{number} earlier {name}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Total:
    """Of all steps left. Times are one step after another, but for `longest`: of the longest chain of steps that need each other.

    `starting`: the time until so many `processes` have their libraries, which no step's time has in it. `sources`: source of
    the time -> steps, seconds. `unknown`: field -> reason -> titles. `missing`: field of this -> steps that its sum has not in
    it, since nobody knows theirs.
    """

    seconds: Amount
    starting: Amount
    processes: int
    longest: float
    gpu_seconds: Amount
    disk_bytes: Amount
    requests: int
    tokens_in: Amount
    tokens_out: Amount
    money: Amount | None
    sources: Mapping[str, tuple[int, float]]
    unknown: Mapping[str, Mapping[str, Sequence[str]]]
    missing: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def total(plan: Plan, estimates: Mapping[str, Estimate], on: Machine | None = None) -> Total:
    """The sum of the estimates; what is unknown is no part of it and is named. `on`: where they will run, else here."""
    sources: dict[str, tuple[int, float]] = {}
    unknown: dict[str, dict[str, list[str]]] = {}
    for step in plan.steps:
        if (found := estimates.get(step.id)) is None:
            continue
        own = seconds_of(found) or 0.0
        if found.seconds is not None:
            count, seconds = sources.get(found.seconds.source, (0, 0.0))
            sources[found.seconds.source] = count + 1, seconds + own
        for name, reason in found.unknown.items():
            unknown.setdefault(name, {}).setdefault(reason, []).append(step.title)
    left = [step for step in plan.steps if step.id in estimates]
    chains = longest_chains(left, lambda step: seconds_of(estimates[step.id]) or 0.0)
    all_ = list(estimates.values())
    money = [found.money for found in all_ if found.money is not None]
    processes = len({step.group or step.id for step in left})
    return Total(
        _sum(found.seconds for found in all_),
        from_rough(rough_starting(processes, on or this_machine()), "rough, from the number of processes", SPREAD),
        processes,
        max(chains.values(), default=0.0),
        _sum(None if found.seconds is None else found.seconds.times(found.gpus) for found in all_),
        _sum(found.disk_bytes for found in all_),
        sum(found.requests or 0 for found in all_),
        _sum(found.tokens_in for found in all_),
        _sum(found.tokens_out for found in all_),
        _sum(money) if money else None,
        dict(sorted(sources.items(), key=lambda item: -item[1][1])),
        unknown,
        _missing(all_),
    )


def _missing(estimates: Sequence[Estimate]) -> dict[str, int]:
    counts = {name: sum(name in found.unknown for found in estimates) for name in ("seconds", *COSTS)}
    counts["gpu_seconds"] = sum(found.seconds is None and found.gpus > 0 for found in estimates)
    return {name: count for name, count in counts.items() if count}


def seconds_of(found: Estimate) -> float | None:
    """The time of a step where it is known."""
    return None if found.seconds is None else found.seconds.value


def _sum(amounts: Any) -> Amount:
    known = [amount for amount in amounts if amount is not None]
    sources = list(dict.fromkeys(amount.source for amount in known))
    source = (
        "; ".join(sources) if len(sources) <= NAMED else f"{'; '.join(sources[:NAMED])}; {len(sources) - NAMED} more"
    )
    value, low, high = (sum(getattr(amount, name) for amount in known) for name in ("value", "low", "high"))
    return Amount(value, low, high, source)


def free_bytes(folder: Path) -> int | None:
    """The bytes that are free where a folder is or will be; None where nobody tells."""
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    try:
        return None if nearest is None else shutil.disk_usage(nearest).free
    except OSError:
        return None
