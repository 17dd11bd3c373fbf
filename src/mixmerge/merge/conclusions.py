"""What a diagnosis means, in sentences: each says a number that was measured, and what follows from it for a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

Found = Mapping[str, Any]


def conclusions(found: Found) -> list[str]:
    """The sentences of a diagnosis, the one on SLERP first."""
    told = [*_slerp(found), *_lengths(found), *_directions(found), *_signs(found)]
    return told or ["There is one model and no base: nothing to compare."]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each model's name, or the whole where two would be alike.

    >>> short_names(["m/base", "m/code", "n/code"])
    {'m/base': 'base', 'm/code': 'm/code', 'n/code': 'n/code'}
    """
    last = ["+".join(PurePath(part).name or part for part in model.split("+")) for model in models]
    return {model: name if last.count(name) == 1 else model for model, name in zip(models, last, strict=True)}


def _slerp(found: Found) -> list[str]:
    """SLERP of parallel tensors is linear by rule; at t = 0.5 that of any others is the average over cos(angle / 2)."""
    tensors = [
        (tensor, pairs)
        for tensor in found["tensors"]
        if (pairs := [p for p in tensor["models"] if p["compared_tensors"]])
    ]
    if not tensors:
        return []
    one_pair = len(found["total"]["models"]) == 1
    slerp = "SLERP" if one_pair else "SLERP of any two of these models"
    bent = [(tensor, pair) for tensor, pairs in tensors for pair in pairs if not pair["parallel_tensors"]]
    rule = f"|cosine| > {found['parallel_above']}"
    count = len(tensors)
    if not bent:
        return [f"{slerp} is linear here: all {count} tensors are parallel ({rule})."]
    straight = count - len({tensor["name"] for tensor, _ in bent})
    share = 1 - sum({t["name"]: t["elements"] for t, _ in bent}.values()) / sum(t["elements"] for t, _ in tensors)
    factor, worst = max((1 / math.sqrt((1 + (pair["cosine"] or 0.0)) / 2), tensor["name"]) for tensor, pair in bent)
    first = f"{slerp} is linear in {straight} of {count} tensors ({_percent(share)} of the parameters), which are parallel ({rule})"
    return [f"{first}; the others are, at t = 0.5, the plain average times at most {factor:.4g} ({worst})."]


def _lengths(found: Found) -> list[str]:
    known = [(e["relative_length"], found["names"].get(e["model"], e["model"])) for e in found["total"]["lengths"]]
    lengths = [(length, name) for length, name in known if length is not None]
    if not lengths:
        return []
    same = [name for length, name in lengths if length == 0]
    if same:
        return [f"{_listed(same)} {'is' if len(same) == 1 else 'are'} the base itself: no element differs."]
    told = _listed([f"{_percent(length)} ({name})" for length, name in lengths])
    if len(lengths) > 3:
        told = f"between {_percent(min(lengths)[0])} ({min(lengths)[1]}) and {_percent(max(lengths)[0])} ({max(lengths)[1]})"
    subject = "The task vector is" if len(lengths) == 1 else "The task vectors are"
    return [f"{subject} {told} of the base in length, over all matrices."]


def _directions(found: Found) -> list[str]:
    """What two task vectors of random directions would show is a cosine of about 0."""
    pairs = [
        (entry["cosine"], " and ".join(found["names"].get(model, model) for model in entry["pair"]))
        for entry in found["total"]["task_vectors"]
        if entry["cosine"] is not None
    ]
    if not pairs:
        return []
    (low, lowest), (high, highest) = min(pairs), max(pairs)
    if len(pairs) == 1:
        return [f"The cosine of the task vectors is {low:.3f}: {_meaning(low, high)}."]
    return [
        f"The cosines of the task vectors lie between {low:.3f} ({lowest}) and {high:.3f} ({highest}): {_meaning(low, high)}."
    ]


def _meaning(low: float, high: float) -> str:
    if low > 0.9:
        return "they point almost the same way, so methods differ mostly in length"
    if high < -0.1:
        return "they point against each other, so a sum of them undoes part of both"
    if max(abs(low), abs(high)) < 0.1:
        return "they are almost at right angles, so a sum of them keeps most of each"
    return "they share a part of their direction" if low >= 0 else "some of them work against each other"


def _signs(found: Found) -> list[str]:
    signs = found["total"]["signs"]
    if signs["conflict_share"] is None:
        return []
    told = (
        f"Signs conflict in {_percent(signs['conflict_share'])} of the elements that two or more task vectors change "
        f"({_percent(signs['conflict_share_by_size'])} by size); by chance it would be "
        f"{_percent(signs['conflict_share_by_chance'])}"
    )
    cells = [
        (cell["signs"]["conflict_share_by_size"], cell)
        for cell in found["kinds"]
        if cell["signs"]["conflict_share_by_size"] is not None
    ]
    if len(cells) > 1:
        share, most = max(cells, key=lambda cell: cell[0])
        told += f". By size, most conflict is in kind '{most['kind']}' ({_percent(share)})"
    return [told + "."]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _percent(share: float) -> str:
    """
    >>> _percent(0.4971), _percent(0.000123)
    ('49.7 %', '0.012 %')
    """
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"
