"""The study's answer: the best set, the Pareto front, and the merge against the data mix, in numbers and in a sentence.

`balance` is the mean over the axes that there are: win rate, harmful prompts met without harm, look-alikes answered. What a choice is
made on (dev) is not what it is reported on (test). A comparison is called only where its interval and the sign-flip test of that
pair both tell it from chance: the interval relies on many prompts, the test on none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import DataError
from mixmerge.evaluate.metrics import Table
from mixmerge.stats.paired import Array, Lags, bootstrap_means, clusters_in, lags, means, on_front, student_interval
from mixmerge.stats.permutation import compare, contributions, sign_flip

FLIPS = 10_000
FEW = 10  # prompts that differ, below which their number says why a test cannot tell
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
    fewest = min(clusters_in(tables["test"][axis].values) for axis in axes)
    balance, balance_drawn = mean.mean(-1), drawn.mean(-1)
    choice = goodness(tables[chosen_on], axes)[0].mean(-1)
    scores = {}
    for i, name in enumerate(names):
        low, high = student_interval(float(balance[i]), balance_drawn[:, i], level, fewest, (0.0, 1.0))
        if name == "base" and axes == ["win"]:
            low = high = float(balance[i])  # by definition
        scores[name] = {"value": float(balance[i]), "low": low, "high": high, "chosen_by": float(choice[i])}
    all_lags = lags(balance_drawn, balance, level, fewest)
    p = lag_tests([tables["test"][axis] for axis in axes], all_lags)
    told = p <= 1 - level
    behind, needed, ahead = all_lags.surest(told)
    best_set = [name for i, name in enumerate(names) if not told[i].any()]
    for i, name in enumerate(names):
        if np.isfinite(needed[i]):
            scores[name] |= {"behind": float(behind[i]), "behind_by_chance": float(needed[i])}
        if name in best_set and np.isfinite(p[i, ahead[i]]):
            scores[name]["behind_p"] = float(p[i, ahead[i]])
    for kind in ("merge", "baseline", "expert"):
        of_kind = [i for i, entry in enumerate(candidates) if entry["kind"] == kind]
        if of_kind:
            answer["picked"][kind] = names[max(of_kind, key=lambda i: choice[i])]
    if "merge" in answer["picked"] and "baseline" in answer["picked"]:
        merge, mix = names.index(answer["picked"]["merge"]), names.index(answer["picked"]["baseline"])
        found = [
            _difference([tables["test"][axis] for axis in group], merge, mix, level)
            for group in (axes, *([a] for a in axes))
        ]
        answer["difference"], answer["by_axis"] = found[0], dict(zip(axes, found[1:], strict=True))
        answer["verdict"] = found[0]["better"]
    costs = {entry["name"]: entry["tokens"] for entry in candidates}
    answer["sentence"] = _sentence(answer, names[int(np.argmax(balance))], level, costs)
    return {
        "balance": scores,
        "best_set": best_set,
        "answer": answer,
    }


def _difference(tables: Sequence[Table], merge: int, mix: int, level: float) -> dict[str, Any]:
    """The merge less the mix on the mean of some axes, over prompts that both have verdicts on, and who is better for sure.

    {value, low, high, p, prompts, better}: `prompts` of those differ, `better` is merge, mix or undecided.
    """
    done = compare(
        [table.values for table in tables],
        against=mix,
        among=[merge],
        flips=FLIPS,
        seed=tables[0].seed,
        purpose="answer",
    )
    value, p = float(done.difference[merge]), float(done.p[merge])
    if np.isnan(value):
        raise DataError(
            "no prompt on which the merge and the mix that are compared both have a verdict", where="the answer"
        )
    drawn = balance_of([paired(table, [merge], mix)[1] for table in tables])[:, 0]
    low, high = student_interval(value, drawn, level, min(int(in_common(table, mix)[merge]) for table in tables))
    better = "undecided" if p > 1 - level else "merge" if low > 0 else "mix" if high < 0 else "undecided"
    return {"value": value, "low": low, "high": high, "p": p, "prompts": int(done.clusters[merge]), "better": better}


def lag_tests(tables: Sequence[Table], found: Lags) -> Array:
    """Sign-flip p-values (C, C) of the lags that are larger than chance makes, on the mean of the axes; NaN for the others."""
    p = np.full(found.behind.shape, np.nan)
    asked = found.behind > found.needed
    terms = [
        np.concatenate([contributions(table.values, i)[asked[i]] for table in tables], axis=1) / len(tables)
        for i in range(len(asked))
        if asked[i].any()
    ]
    if terms:
        p[asked] = sign_flip(np.concatenate(terms), flips=FLIPS, seed=tables[0].seed, purpose="best set")[0]
    return p


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
    if answer["verdict"] == "undecided" and (found["low"] > 0 or found["high"] < 0):
        count, p = found["prompts"], f"p {found['p']:.2f}"
        differ = "1 prompt differs" if count == 1 else f"{count} prompts differ"
        said += f": only {differ}, and" if count < FEW else ":"
        said += f" chance alone does that ({p}, signs of whole prompts flipped)"
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


def paired(table: Table, mine: Sequence[int], against: int) -> tuple[Array, Array]:
    """Differences of macro-averages from one candidate's over the prompts that both have: (K,) and their draws (draws, K)."""
    mine = list(mine)
    apart = table.values[mine] - table.values[against]
    drawn = table.drawn[:, mine] - table.drawn[:, [against]]
    known = ~np.isnan(table.values)
    other = (known[mine] != known[against]).any(axis=(1, 2))
    if other.any():
        again = bootstrap_means(apart[other], draws=len(drawn), seed=table.seed, purpose=table.purpose)
        drawn[:, other] = again
    with np.errstate(invalid="ignore"):
        return np.nanmean(means(apart), axis=1), np.nanmean(drawn, axis=2)


def in_common(table: Table, against: int) -> NDArray[np.int64]:
    """Prompts on which each candidate and the one `against` both have a verdict, in whatever language: (C,)."""
    known = ~np.isnan(table.values)
    return np.asarray((known & known[against]).any(axis=1).sum(axis=1))


def balance_of(drawn: Sequence[Array]) -> Array:
    """The mean of some axes, each (draws, K)."""
    return np.asarray(np.mean(drawn, axis=0))


def macro(table: Table) -> tuple[Array, Array]:
    """Mean over languages: (C,) and its draws (draws, C)."""
    return np.nanmean(means(table.values), axis=1), np.nanmean(table.drawn, axis=2)


def goodness(tables: Mapping[str, Table], axes: Sequence[str]) -> tuple[Array, Array]:
    """Macro-averages on some axes, larger is better: (C, axes), (draws, C, axes)."""
    found = [macro(tables[axis]) for axis in axes]
    return np.stack([mean for mean, _ in found], -1), np.stack([drawn for _, drawn in found], -1)
