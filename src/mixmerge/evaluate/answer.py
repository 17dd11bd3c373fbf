"""The study's answer: the best set, the Pareto front, and the merge against the data mix, in numbers and in a sentence.

`balance` is the mean over the axes that there are: win rate, harmful prompts met without harm, look-alikes answered. What a choice is
made on (dev) is not what it is reported on (test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixmerge.evaluate.metrics import Table
from mixmerge.stats.paired import Array, clusters_in, lags, means, on_front, student_interval

SAME_COST = 0.1  # a difference in training tokens up to this share goes without saying


def answer(
    tables: Mapping[str, Mapping[str, Table]], candidates: Sequence[Mapping[str, Any]], level: float
) -> dict[str, Any]:
    """Balance, best set and the answer; `tables` hold the axes of each split, candidates have their `tokens`."""
    names, axes = [entry["name"] for entry in candidates], list(tables["test"])
    # A choice on fewer axes than the report's would be a choice of something else.
    chosen_on = "dev" if set(axes) <= set(tables["dev"]) else "test"
    answer: dict[str, Any] = {"chosen_on": chosen_on, "axes": axes, "picked": {}, "verdict": "none"}
    if not axes:
        answer["sentence"] = "Nothing to compare: no verdict on test prompts beside the base's."
        return {"balance": {}, "best_set": [], "answer": answer}
    mean, drawn = goodness(tables["test"], axes)
    clusters = {axis: clusters_in(tables["test"][axis].values) for axis in axes}
    fewest = min(clusters.values())
    balance, balance_drawn = mean.mean(-1), drawn.mean(-1)
    choice = goodness(tables[chosen_on], axes)[0].mean(-1)
    scores = {}
    for i, name in enumerate(names):
        low, high = student_interval(float(balance[i]), balance_drawn[:, i], level, fewest, (0.0, 1.0))
        scores[name] = {"value": float(balance[i]), "low": low, "high": high, "chosen_by": float(choice[i])}
    behind, needed = lags(balance_drawn, balance, level, fewest)
    for i, name in enumerate(names):
        if np.isfinite(needed[i]):
            scores[name] |= {"behind": float(behind[i]), "behind_by_chance": float(needed[i])}
    for kind in ("merge", "baseline", "expert"):
        of_kind = [i for i, entry in enumerate(candidates) if entry["kind"] == kind]
        if of_kind:
            answer["picked"][kind] = names[max(of_kind, key=lambda i: choice[i])]
    if "merge" in answer["picked"] and "baseline" in answer["picked"]:
        merge, mix = names.index(answer["picked"]["merge"]), names.index(answer["picked"]["baseline"])

        def difference(mean: Array, drawn: Array, clusters: int) -> dict[str, float]:
            value = float(mean[merge] - mean[mix])
            low, high = student_interval(value, drawn[:, merge] - drawn[:, mix], level, clusters)
            return {"value": value, "low": low, "high": high}

        found = difference(balance, balance_drawn, fewest)
        answer["difference"] = found
        answer["verdict"] = "merge" if found["low"] > 0 else "mix" if found["high"] < 0 else "undecided"
        answer["by_axis"] = {
            axis: difference(mean[:, k], drawn[:, :, k], clusters[axis]) for k, axis in enumerate(axes)
        }
    costs = {entry["name"]: entry["tokens"] for entry in candidates}
    answer["sentence"] = _sentence(answer, names[int(np.argmax(balance))], level, costs)
    return {
        "balance": scores,
        "best_set": [n for n, lag, most in zip(names, behind, needed, strict=True) if lag <= most],
        "answer": answer,
    }


def _sentence(answer: Mapping[str, Any], top: str, level: float, tokens: Mapping[str, int | None]) -> str:
    if answer["verdict"] == "none":
        return f"Nothing to compare (no merge, or no baseline): the highest balance is that of {top}."
    merge, mix, found = answer["picked"]["merge"], answer["picked"]["baseline"], answer["difference"]
    value, low, high = (_signed(100 * found[key]) for key in ("value", "low", "high"))
    points = f"{value} points of balance [{low}, {high}]"
    said = {
        "merge": f"Merge: the merge '{merge}' beats the data mix '{mix}' by {points}",
        "mix": f"Mix: the data mix '{mix}' beats the merge '{merge}' ({points} for the merge)",
        "undecided": f"Undecided: the merge '{merge}' and the data mix '{mix}' cannot be told apart ({points})",
    }[answer["verdict"]]
    said += _cost({"merge": tokens[merge], "data mix": tokens[mix]}, answer["verdict"])
    choice = "chosen on dev prompts" if answer["chosen_on"] == "dev" else "chosen on the same prompts, so optimistic"
    return f"{said}. Both were {choice}; intervals at {100 * level:.0f} %."


def _cost(tokens: Mapping[str, int | None], verdict: str) -> str:
    """A clause on the training tokens of the two that are compared; empty where they are about as many.

    >>> _cost({"merge": 100, "data mix": 200}, "mix"), _cost({"merge": 100, "data mix": 200}, "merge")
    ('; it was trained on 2.0 times the tokens', ', though the data mix was trained on 2.0 times the tokens')
    >>> _cost({"merge": 100, "data mix": 110}, "mix"), _cost({"merge": None, "data mix": 9}, "mix")
    ('', '; what the merge cost is not known')
    """
    subject = {"merge": "merge", "mix": "data mix"}.get(verdict)
    unknown = [name for name, count in tokens.items() if count is None]
    if unknown:
        who = "both" if len(unknown) == 2 else "it" if unknown[0] == subject else f"the {unknown[0]}"
        return f"; what {who} cost is not known"
    (fewer, less), (more, most) = sorted(
        ((name, count or 0) for name, count in tokens.items()), key=lambda each: each[1]
    )
    if most <= (1 + SAME_COST) * less:
        return ""
    much = f"{most / less:.1f} times the tokens" if less else f"{most:,} tokens, the {fewer} on none"
    who = "; it" if more == subject else f"; the {more}" if subject is None else f", though the {more}"
    return f"{who} was trained on {much}"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def pareto(tables: Mapping[str, Table], names: Sequence[str]) -> dict[str, Any]:
    """Who is on the front as measured, who beats each of the others, and in which share of the draws each is on it."""
    if not tables:
        return {"axes": [], "front": [], "share": {}, "beaten_by": {}}
    mean, drawn = goodness(tables, list(tables))
    shares = on_front(drawn).mean(axis=0)
    better = np.asarray((mean[None] >= mean[:, None]).all(-1) & (mean[None] > mean[:, None]).any(-1))
    return {
        "axes": list(tables),
        "front": [name for name, there in zip(names, on_front(mean), strict=True) if there],
        "share": {name: float(share) for name, share in zip(names, shares, strict=True)},
        "beaten_by": {
            name: [names[int(j)] for j in np.flatnonzero(row)]
            for name, row in zip(names, better, strict=True)
            if row.any()
        },
    }


def macro(table: Table) -> tuple[Array, Array]:
    """Mean over languages: (C,) and its draws (draws, C)."""
    return np.nanmean(means(table.values), axis=1), np.nanmean(table.drawn, axis=2)


def goodness(tables: Mapping[str, Table], axes: Sequence[str]) -> tuple[Array, Array]:
    """Macro-averages on some axes, larger is better: (C, axes), (draws, C, axes)."""
    found = [macro(tables[axis]) for axis in axes]
    return np.stack([mean for mean, _ in found], -1), np.stack([drawn for _, drawn in found], -1)
