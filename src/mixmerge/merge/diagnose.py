"""What can be known of a merge before it is paid for: how far apart the models are, and which way their task vectors point.

The one idea: one pass over the same blocks that a merge reads gathers sums (dot products, squared lengths, counts) per
tensor; sums add up, so a layer, a kind of module or the whole model is told by the same formulas as a tensor.
Invariants: nothing is written; memory does not grow with the model; the number of threads changes no sum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mixmerge.errors import RecipeError
from mixmerge.merge import kernels
from mixmerge.merge.anatomy import KINDS, Place, place_of
from mixmerge.merge.block import Block, Counts, Float32, Float64
from mixmerge.merge.conclusions import conclusions, short_names
from mixmerge.merge.config import load_config
from mixmerge.merge.geometry import NO_LENGTH, PARALLEL, slerp_cosine
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.sources import Files
from mixmerge.merge.stream import prepare, staff
from mixmerge.merge.tensors import Crew, Target, Visits

SMALL = 1 << 21  # elements of the largest matrix whose singular values are computed
Pair = tuple[str, str]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Sums:
    """What adds up over tensors. Models go by their names, so tensors of other models may be added too.

    models: per pair of models, the base first: a.b, |a|^2, |b|^2, then tensors and elements that SLERP can tell apart
    (not both zero) and those of them that it treats as parallel: float64 (7,). tasks: per pair of task vectors d: the
    first three. lengths: per task vector: |d|^2, |b|^2, elements that differ from the base, elements: (4,).
    ranks: per task vector, over small matrices: effective rank, full rank, matrices: (3,).
    signs: elements that two or more change, those of them with both signs, how many chance would give, and sum |d| over
    the first and the second: (5,).
    """

    tensors: int
    elements: int
    models: Mapping[Pair, Float64]
    tasks: Mapping[Pair, Float64]
    lengths: Mapping[str, Float64]
    ranks: Mapping[str, Float64]
    signs: Float64

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.tensors + other.tensors,
            self.elements + other.elements,
            _added(self.models, other.models),
            _added(self.tasks, other.tasks),
            _added(self.lengths, other.lengths),
            _added(self.ranks, other.ranks),
            self.signs + other.signs,
        )

    def told(self) -> dict[str, Any]:
        """As JSON: shares are 0..1; None where there is nothing to divide by."""
        shared, conflicts, chance, size, against = (float(value) for value in self.signs)
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "models": [
                {
                    "pair": list(pair),
                    "cosine": _cosine(*map(float, found[:3])),
                    "compared_tensors": int(found[3]),
                    "parallel_tensors": int(found[5]),
                    "parallel_share": _ratio(found[6], found[4]),
                }
                for pair, found in self.models.items()
            ],
            "task_vectors": [
                {"pair": list(pair), "cosine": _cosine(*map(float, found))} for pair, found in self.tasks.items()
            ],
            "lengths": [
                {
                    "model": model,
                    "relative_length": None if (ratio := _ratio(found[0], found[1])) is None else math.sqrt(ratio),
                    "changed_share": _ratio(found[2], found[3]),
                    "effective_rank": _ratio(self.ranks[model][0], self.ranks[model][2]),
                    "full_rank": _ratio(self.ranks[model][1], self.ranks[model][2]),
                }
                for model, found in self.lengths.items()
            ],
            "signs": {
                "shared_share": _ratio(shared, self.elements),
                "conflict_share": _ratio(conflicts, shared),
                "conflict_share_by_size": _ratio(against, size),
                "conflict_share_by_chance": _ratio(chance, shared),
            },
        }


def diagnose(
    config: MergeConfig | Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the models of a merge tensor by tensor, and summed per layer, per kind of module and in all.

    `progress` gets elements done and in all; `threads` defaults to the cores given to this process. Without a base that
    stands apart there are no task vectors, and what is told of them is empty.

    Returns:
        method, bases, models, names (short ones), parallel_above, small_matrix, conclusions (sentences); total and layers (over matrices),
        kinds, cells (a layer and a kind), tensors, each as `Sums.told` has it; bytes_read, seconds.

    Raises:
        RecipeError, ModelError, CheckpointError: as `merge` does.
    """
    began = time.monotonic()
    if not isinstance(config, MergeConfig):
        config = load_config(config)
    if config.earlier:
        made = ", ".join(f"'{one.name}'" for one in config.earlier)
        what = f"this merge takes the results of others of its file ({made}), which are not there"
        raise RecipeError(what, where=config.where(), do="make them first, and name their folders in a file of its own")
    files, rows, done = Files(), list[tuple[Target, Place, Sums]](), 0
    with closing(files):
        job = prepare(config, files)
        targets, whole = job.targets, sum(target.size for target in job.targets)
        with staff(job, threads) as crew:
            for target, following in zip_longest(targets, targets[1:]):
                for source in following.read if following is not None else ():
                    source.ahead()
                rows.append((target, place_of(target.name), measure(target, crew)))
                done += target.size
                if progress is not None:
                    progress(done, whole)
    bases = list(dict.fromkeys(target.base.model for target in targets if target.base is not None))
    models = list(dict.fromkeys(source.model for target in targets for source in target.sources))
    found = {
        "method": config.merge_method,
        "bases": bases,
        "models": models,
        "names": short_names([*bases, *(model for model in models if model not in bases)]),
        "parallel_above": PARALLEL,
        "small_matrix": SMALL,
    }
    found |= _summed(rows)
    return found | {
        "conclusions": conclusions(found),
        "bytes_read": crew.bytes_read,
        "seconds": time.monotonic() - began,
    }


def measure(target: Target, crew: Crew) -> Sums:
    """Read one tensor of all models once, and sum up how far apart they are."""
    # One pass over blocks of any shape: nothing has to be kept for a second one.
    visits = Visits(replace(target, method=replace(target.method, measure=None, rows=False)), crew)
    k, has_base = len(target.sources), target.base is not None
    small = has_base and len(target.shape) == 2 and min(target.shape) > 1 and target.size <= SMALL
    whole: Float32 = np.empty((k, target.size if small else 0), np.float32)

    def visit(block: Block) -> tuple[Float64, Float64, Counts, Float64, Counts]:
        models, tasks = np.empty((k + has_base,) * 2), np.zeros((k, k))
        counts, sums, changed = np.zeros((k + 1, 2), np.int64), np.zeros(2), np.zeros(k, np.int64)
        kernels.dots(block.all, models)
        if has_base:
            deltas = block.deltas()
            kernels.dots(deltas, tasks)
            kernels.signs(deltas, counts, sums, changed)
            if small:
                whole[:, block.start : block.start + block.size] = deltas
        return models, tasks, counts, sums, changed

    blocks = list(zip(*visits(visit), strict=True))
    models, tasks, sums = (_exact_sum(blocks[i]) for i in (0, 1, 3))
    counts, changed = np.sum(blocks[2], axis=0), np.sum(blocks[4], axis=0)
    ranks = [0.0] * k
    if small:
        ranks = crew.each(k, lambda i, _: effective_rank(whole[i].reshape(target.shape)))
    inputs = _names([source.model for source in target.sources])
    everyone = _names([source.model for source in target.read])
    full = min(target.shape, default=0)
    return Sums(
        1,
        target.size,
        {
            (everyone[a], everyone[b]): _models(models[a, b], models[a, a], models[b, b], target.size)
            for a, b in combinations(range(len(everyone)), 2)
        },
        {
            (inputs[a], inputs[b]): np.array([tasks[a, b], tasks[a, a], tasks[b, b]])
            for a, b in combinations(range(k if has_base else 0), 2)
        },
        {
            name: np.array([tasks[i, i], models[0, 0], changed[i], target.size])
            for i, name in enumerate(inputs if has_base else ())
        },
        {
            name: np.array([ranks[i], full, 1.0]) if small else np.zeros(3)
            for i, name in enumerate(inputs if has_base else ())
        },
        np.array([counts[2:, 0].sum(), counts[2:, 1].sum(), _by_chance(counts[:, 0]), *sums]),
    )


def effective_rank(matrix: Float32) -> float:
    """exp of the entropy of the singular values as shares of their sum: 1 for a single direction, 0 for a matrix of zeros.

    O. Roy and M. Vetterli, "The effective rank", EUSIPCO 2007. In float64, by the eigenvalues of the smaller Gram matrix.

    >>> round(effective_rank(np.diag([3.0, 3.0, 0.0])), 6), effective_rank(np.ones((4, 7)))
    (2.0, 1.0)
    """
    x = matrix.astype(np.float64)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    squares = np.linalg.eigvalsh(gram)
    # what is below the rounding of the largest is no direction
    values = np.sqrt(squares[squares > squares[-1] * len(squares) * np.finfo(np.float64).eps])
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return math.exp(-float(shares @ np.log(shares)))


def _models(dot: float, first: float, second: float, size: int) -> Float64:
    """The sums of a pair of models at one tensor; SLERP's own rule says whether it is parallel."""
    compared = max(first, second) > NO_LENGTH**2
    parallel = compared and abs(slerp_cosine(dot, first, second)) > PARALLEL
    return np.array([dot, first, second, compared, compared * size, parallel, parallel * size], np.float64)


def _by_chance(changed_by: Counts) -> float:
    """How many elements would have both signs if each sign of a task vector were a toss of a coin."""
    return math.fsum(int(count) * (1.0 - 2.0 ** (1 - m)) for m, count in enumerate(changed_by) if m > 1)


def _summed(rows: Sequence[tuple[Target, Place, Sums]]) -> dict[str, Any]:
    """The tensors' sums, told one by one and added up by place.

    Layers and the total are over matrices: the few weights of norms can be longer than all else, and would hide it.
    """
    order = {stack: i for i, stack in enumerate(dict.fromkeys(place.stack for _, place, _ in rows))}
    matrices = [row for row in rows if len(row[0].shape) > 1] or rows

    def layer(place: Place) -> tuple[int, int]:  # what is outside of layers comes first
        return (-1, 0) if place.layer is None else (order[place.stack], place.layer)

    def by(
        key: Callable[[Place], tuple[int, ...]], *fields: str, over: Sequence[tuple[Target, Place, Sums]] = rows
    ) -> list[dict[str, Any]]:
        groups: dict[tuple[int, ...], tuple[Place, list[Sums]]] = {}
        for _, place, sums in over:
            groups.setdefault(key(place), (place, []))[1].append(sums)
        return [
            {field: getattr(place, field) for field in fields} | _total(members).told()
            for _, (place, members) in sorted(groups.items(), key=lambda group: group[0])
        ]

    return {
        "total": _total(sums for _, _, sums in matrices).told(),
        "kinds": by(lambda place: (KINDS.index(place.kind),), "kind"),
        "layers": by(layer, "stack", "layer", over=matrices),
        "cells": by(lambda place: (*layer(place), KINDS.index(place.kind)), "stack", "layer", "kind"),
        "tensors": [
            {"name": target.name, "shape": list(target.shape), "stack": place.stack, "layer": place.layer}
            | {"kind": place.kind}
            | sums.told()
            for target, place, sums in rows
        ],
    }


def _total(members: Iterable[Sums]) -> Sums:
    return reduce(Sums.__add__, members, Sums(0, 0, {}, {}, {}, {}, np.zeros(5)))


def _added(one: Mapping[K, Float64], other: Mapping[K, Float64]) -> dict[K, Float64]:
    return {
        key: one[key] + other[key] if key in one and key in other else one[key] if key in one else other[key]
        for key in {**one, **other}
    }


def _exact_sum(parts: Sequence[Float64]) -> Float64:
    """The sum of arrays, each element rounded once."""
    stacked = np.array(parts)
    flat = [math.fsum(column) for column in stacked.reshape(len(stacked), -1).T]
    return np.array(flat).reshape(stacked.shape[1:])


def _names(models: Sequence[str]) -> list[str]:
    """Names that tell models apart: one that comes again has its number behind it."""
    return [name if (n := models[: i + 1].count(name)) == 1 else f"{name} ({n})" for i, name in enumerate(models)]


def _cosine(dot: float, first: float, second: float) -> float | None:
    lengths = math.sqrt(first) * math.sqrt(second)
    return min(1.0, max(-1.0, dot / lengths)) if lengths > 0 else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None
