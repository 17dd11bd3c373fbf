"""What a study's prompts can show, and what its judges will be asked, said before any money is spent.

The least detectable difference follows from the parallel test prompts of each axis, the languages that these stand in, and
assumptions on spread in `mixmerge.stats.power`; verdicts are counted from the judge steps that are still to run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from mixmerge.plan.graph import Plan, Step
from mixmerge.stats.power import POWER, MixedAxis, detectable, rate_spread, win_spread

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
    for name, (purpose, spread) in AXES.items():
        groups: Counter[tuple[str, ...]] = Counter()
        for prompt_set, of in score.what["prompt_sets"].items():
            for group in score.how["prompts"][prompt_set]["test"] if of == purpose else ():
                groups[tuple(group["languages"])] += group["prompts"]
        if groups:
            axes.append(MixedAxis(groups, spread))
            found.append(f"{name} {_points([axes[-1]], level)} ({_prompts(groups, score.what['languages'])})")
    if not axes:
        return ""
    if len(axes) > 1:
        found.append(f"balance {_points(axes, level)}")
    return (
        f"detectable between two candidates, in points, with {100 * POWER:.0f} % power at {100 * level:g} %: "
        f"{', '.join(found)}; translations of one prompt count as one"
    )


def _prompts(groups: Mapping[tuple[str, ...], int], languages: Sequence[str]) -> str:
    """How many prompts, and in how many of the recipe's languages.

    >>> _prompts({("en", "fr"): 40}, ["en", "fr"]), _prompts({("en",): 1}, ["en", "fr"])
    ('40 prompts in 2 languages', '1 prompt in en alone')
    >>> _prompts({("en", "fr"): 40, ("en",): 12}, ["en", "fr", "hi"])
    '52 prompts in 2 of 3 languages, 12 of them not in each'
    """
    there, count = {code for group in groups for code in group}, sum(groups.values())
    few = sum(prompts for group, prompts in groups.items() if len(group) < len(there))
    said = f"{count} prompt{'s' * (count > 1)} in "
    if len(there) == len(languages):
        said += f"{len(there)} language{'s' * (len(there) > 1)}"
    else:
        said += f"{len(there)} of {len(languages)} languages" if len(there) > 1 else f"{min(there)} alone"
    return f"{said}, {few} of them not in each" if few else said


def _points(axes: Sequence[MixedAxis], level: float) -> str:
    least = detectable(axes, level=level)
    return "nothing" if least >= 1 else f"{100 * least:.1f}"
