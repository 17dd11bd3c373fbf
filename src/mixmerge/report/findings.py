"""What the report says in sentences: who is in the best set and why, how firm the front is, and who answers alike.

Numbers that look wrong beside each other (an interval that overlaps another's, a share that is higher off the front than on
it, two rows that are equal) are explained here, from the scores, only where they occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.report.trust import NO_VERDICT
from mixmerge.report.words import axis_words, count, language, listed, metric_words, percent, share

Scores = Mapping[str, Any]


def warnings(scores: Scores) -> list[str]:
    """What is missing behind the numbers: verdicts that judges did not give, and languages that are in no mean for it."""
    found = {split: _missing(scores, split) for split in scores["averaged"]}
    dev = {key: said for key, said in found.get("dev", {}).items() if said != found.get("test", {}).get(key)}
    return [*_lost(scores), *found.get("test", {}).values(), *(f"On dev prompts: {said}" for said in dev.values())]


def _missing(scores: Scores, split: str) -> dict[str, str]:
    """Of each metric, the languages without numbers that others have, or that judges should have given."""
    out = {}
    for metric, averaged in scores["averaged"][split].items():
        there = [name for name, score in scores["splits"][split][metric].items() if score]
        lacking = {code: list(of) for code, of in (averaged["thin"] | averaged["left_out"]).items()}
        if metric == "win_strict" or not lacking:  # the same verdicts as those of `win`
            continue
        where = listed(
            [f"{language(code)} ({listed(of) if len(of) < len(there) else 'all'})" for code, of in lacking.items()]
        )
        over = listed([language(code) for code in averaged["languages"]])
        name = metric_words(metric, scores).head
        if averaged["left_out"]:
            out[metric] = (
                f"{name} is averaged and compared over {over or 'no language'} only: too few verdicts in {where}."
            )
        else:
            out[metric] = f"{name} has too few verdicts in {where}."
    return out


def _lost(scores: Scores) -> list[str]:
    """Of each judge that is a model, how many verdicts it did not give."""
    said = []
    for judge, question in scores["judges"].items():
        tally = {
            verdict: sum(of.get(f"{judge}: {verdict}", 0) for of in scores["counts"].values()) for verdict in NO_VERDICT
        }
        lost = [f"{count(n)} {verdict}" for verdict, n in tally.items() if n]
        if lost and question != "correct":
            every = sum(n for of in scores["counts"].values() for key, n in of.items() if key.startswith(f"{judge}: "))
            part = f"{count(sum(tally.values()))} of {count(every)} answers"
            said.append(f"No verdict of {judge} on {part} ({listed(lost)}): left out of every share but Invalid.")
    return said


def averaged_words(scores: Scores) -> str:
    """Over which languages each axis of the balance is averaged."""
    everything, names = list(scores["languages"]), axis_words(scores)
    over = {axis: scores["averaged"]["test"][axis]["languages"] for axis in scores["answer"]["axes"]}
    if all(found == everything for found in over.values()):
        return f"each averaged over {len(everything)} language{'s' if len(everything) != 1 else ''}"

    def told(found: list[str]) -> str:
        if found == everything:
            return f"all {len(everything)} languages"
        return f"{len(found)} of {len(everything)} languages ({', '.join(found)})"

    if len({tuple(found) for found in over.values()}) == 1:
        return f"each averaged over {told(next(iter(over.values())))}"
    return "averaged over: " + "; ".join(f"{names[axis].lower()}, {told(found)}" for axis, found in over.items())


def best_set_words(scores: Scores) -> list[str]:
    """What the best set is, what put the others out, and who stays in although it looks worse."""
    everyone, there = [entry["name"] for entry in scores["candidates"]], scores["best_set"]
    lags = {name: found for name, found in scores["balance"].items() if found.get("behind")}
    prompts = min((counts["test"] for counts in scores["prompts"].values() if counts["test"]), default=0)
    level = f"{100 * scores['statistics']['level']:g} %"
    said = [
        f"With {level} probability the truly best of the {len(everyone)} is one of these. A candidate is out only if it is "
        f"further behind than bad luck with {prompts} prompts a set can put the best one, counting all comparisons at once, and "
        f"if flipping the signs of whole prompts tells the two apart as well. "
        "The intervals in the table are single ones: whether two of them overlap is not this test."
    ]
    if out := [_behind(name, lags[name]) for name in everyone if name not in there]:
        said.append(f"Out: {'; '.join(out)}.")
    if inside := [name for name in there if name in lags]:
        last = max(inside, key=lambda name: lags[name]["behind"])
        said.append(f"Furthest behind of those still in: {_behind(last, lags[last])}.")
    return said


def _behind(name: str, found: Mapping[str, float]) -> str:
    if "behind_p" in found:
        points, p = percent(found["behind"]), f"{found['behind_p']:.3f}"
        return f"{name}, by {points} points, but chance alone does that (p {p}, signs of whole prompts flipped)"
    return (
        f"{name}, by {percent(found['behind'])} points where bad luck makes up to {percent(found['behind_by_chance'])}"
    )


def front_words(scores: Scores) -> list[str]:
    """What the front is, and what the share beside a name says, where it contradicts the front too."""
    pareto = scores["pareto"]
    shares, front = pareto["share"], pareto["front"]
    draws = count(scores["statistics"]["draws"])
    said = [
        "By the numbers as measured: no other candidate is at least as good as one of these on every axis and better on one. "
        f"Beside each name: the share of {draws} draws of the prompts in which that held. Where it is low, other prompts "
        "might well have left the candidate off."
    ]
    for name, beaters in pareto["beaten_by"].items():
        lower = [other for other in front if shares[other] < shares[name]]
        if lower:
            said.append(
                f"Just off it: {name}. As measured, {listed(beaters)} did at least as well on every axis, but so narrowly that "
                f"{share(shares[name])} of the draws put {name} on the front, more than {listed(lower)}."
            )
    return said


@dataclass(frozen=True, slots=True)
class Alike:
    """Candidates that gave the same answers, letter for letter, and what is to be said of them."""

    names: Sequence[str]
    sentence: str


def alike(
    scores: Scores, responses: Iterable[Mapping[str, Any]], merges: Mapping[str, Mapping[str, Any]]
) -> list[Alike]:
    """Groups of candidates whose answers are identical: one model under several names, as far as a study can see.

    merges: candidate -> what its merge measured; a SLERP's `parallel_share` is the cause to name.
    """
    answers: dict[str, dict[str, str]] = {entry["name"]: {} for entry in scores["candidates"]}
    for row in responses:
        answers[row["candidate"]][row["prompt_id"]] = row["text"]
    groups: dict[frozenset[tuple[str, str]], list[str]] = {}
    for name, texts in answers.items():
        if texts:
            groups.setdefault(frozenset(texts.items()), []).append(name)
    found = []
    for given, names in groups.items():
        if len(names) == 1:
            continue
        sentence = (
            f"The same model under {len(names)} names, as far as this study can see: {listed(names)} gave the same answers, "
            f"letter for letter, to all {count(len(given))} prompts, so their rows are equal."
        )
        causes = [f"The cause: {parallel_words(name, merges[name])}." for name in names if name in parallel(merges)]
        found.append(Alike(names, " ".join([sentence, *causes])))
    return found


def parallel(merges: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The share of tensors that a SLERP merged as parallel, for each merge that measured one."""
    return {name: found["parallel_share"] for name, found in merges.items() if "parallel_share" in found}


def parallel_words(name: str, found: Mapping[str, Any]) -> str:
    """What a SLERP's `parallel_share` means.

    >>> parallel_words("slerp", {"parallel_share": 1.0})
    'every tensor of the models in slerp is nearly parallel, so the arc is a line and SLERP a linear merge'
    """
    if found["parallel_share"] == 1:
        return f"every tensor of the models in {name} is nearly parallel, so the arc is a line and SLERP a linear merge"
    part = share(found["parallel_share"])
    return f"{part} of the tensors of the models in {name} are nearly parallel, and SLERP merged those linearly"
