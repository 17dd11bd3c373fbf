"""What a study's prompts can show, and what its judges will be asked, said before any money is spent.

The least detectable difference follows from the parallel test prompts, the languages and assumptions on spread that stand in
`mixmerge.stats.power`; verdicts are counted from the judge steps that are still to run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from mixmerge.plan.graph import Plan, Step
from mixmerge.stats.power import POWER, Axis, detectable, rate_spread, win_spread

AXES = {
    "win rate": ("general", win_spread()),
    "harm": ("harmful", rate_spread()),
    "over-refusal": ("harmless", rate_spread()),
}
ORDERS = {"quality": 2}  # requests behind a verdict: a pair is asked in both orders


def effect_lines(plan: Plan, left: Collection[str]) -> Iterator[str]:
    """Lines for a person: what can be detected, and requests of each judge behind a server; `left`: steps to run."""
    for step in plan.steps:
        if step.kind == "score" and (line := _detectable(step)):
            yield line
    judges: dict[str, Step] = {}  # a step of each judge: where it is and what it may cost are the same in all
    asked: Counter[str] = Counter()
    for step in plan.steps:
        if step.kind == "judge" and step.id in left and "server" in step.how:
            judges[step.how["judge"]] = step
            asked[step.how["judge"]] += step.how["prompts"] * ORDERS.get(step.what["question"], 1)
    for judge, requests in asked.items():
        step = judges[judge]
        model = step.how.get("folder_of_model", step.what["model"])
        place = ", ".join(step.how["server"]["urls"]) or "a server that is started for it"
        budget = step.how.get("budget", {}).get("requests")
        more = f"; its budget is {budget:,} requests" if budget is not None and budget < requests else ""
        yield f"judge {judge}: up to {requests:,} requests to {model} at {place}{more}"


def _detectable(score: Step) -> str:
    """The least difference between two candidates on each axis and on their mean."""
    level, found, axes = score.what["statistics"]["level"], [], []
    languages = len(score.what["languages"])
    for name, (purpose, spread) in AXES.items():
        sets = [s for s, of in score.what["prompt_sets"].items() if of == purpose]
        prompts = sum(score.how["prompts"][s]["test"] for s in sets)
        if prompts:
            axes.append(Axis(prompts, languages, spread))
            found.append(f"{name} {_points([axes[-1]], level)} ({prompts} prompts)")
    if not axes:
        return ""
    if len(axes) > 1:
        found.append(f"balance {_points(axes, level)}")
    tongues = "1 language" if languages == 1 else f"{languages} languages"
    return (
        f"detectable between two candidates, in points, with {100 * POWER:.0f} % power at {100 * level:g} %: "
        f"{', '.join(found)}; parallel test prompts in {tongues}"
    )


def _points(axes: list[Axis], level: float) -> str:
    least = detectable(axes, level=level)
    return "nothing" if least >= 1 else f"{100 * least:.1f}"
