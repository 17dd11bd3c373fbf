"""The merge methods, one declarative entry each: it drives validation, `mixmerge methods`, the documentation and the work.

The one idea: a method first *measures* (a small statistic per tensor, gathered block by block) and then *combines* each
block on its own. So no method needs a whole tensor, and blocks may run in any order on any number of threads.
Numerics: inputs are decoded to float32 exactly, combined in float64 (in float32 `b + (x - b)` is not `x`), and rounded
once at the store. Invariant: a result depends on the inputs, the parameters, the seed and the tensor's name only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mixmerge.merge import elementwise, geometry, sparsify
from mixmerge.merge.block import At, Block, Float64, Measured, Over


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method: per input or shared by all, its default (None: must be given) and its range.

    `whole`: takes whole numbers only.
    """

    scope: Literal["input", "shared"]
    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    about: str = ""

    @property
    def is_flag(self) -> bool:
        return isinstance(self.default, bool)


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    `base`: "required" or "optional" (it stands apart: task vectors are taken from it), "none" (an input like the others).
    `inputs`: fewest and most models besides the base. `share`: the name of the measured share it reports.
    `rows`: blocks must hold whole rows of a matrix. `elects`: a sign is elected per element, and normalising divides by the
    weights that agree with it. `source`: the paper.
    """

    summary: str
    base: Literal["required", "optional", "none"]
    inputs: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    combine: Callable[[Block, At, Any], Float64]
    measure: Callable[[Over, At], Measured] | None = None
    share: str | None = None
    rows: bool = False
    elects: bool = False
    source: str = ""


def _flag(default: bool, about: str) -> Parameter:
    return Parameter("shared", default=default, about=about)


_WEIGHT = Parameter("input", about="how much of this model, or of its task vector")
_ONE = Parameter("input", default=1.0, about="how much of this model, or of its task vector")
_DENSITY = Parameter("input", default=1.0, low=0.0, high=1.0, about="share of the task vector that is kept")
_LAMBDA = Parameter("shared", default=1.0, about="factor of the merged task vector")
_NORMALIZE = "divide by the sum of the weights that take part"
_RESCALE = "give a thinned task vector its L1 length back"


def _sparse(*, normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    flags = {"normalize": _flag(normalize, _NORMALIZE), "rescale": _flag(rescale, _RESCALE)}
    return {"weight": _WEIGHT, "density": _DENSITY, **more, **flags, "lambda": _LAMBDA}


_GAMMA = Parameter("input", default=0.01, low=0.0, high=1.0, about="share of the largest elements that is dropped")
_EPSILON = Parameter("input", default=0.15, low=0.0, high=1.0, about="how far the probability varies around density")
_UNCHANGED = Parameter("shared", default=1e-5, low=0.0, about="a change no larger than this is none")

METHODS: dict[str, Method] = {
    "linear": Method(
        "weighted average of the models",
        base="none",
        inputs=(1, None),
        parameters={"weight": _WEIGHT, "normalize": _flag(True, _NORMALIZE)},
        combine=geometry.linear,
        source="https://arxiv.org/abs/2203.05482",
    ),
    "slerp": Method(
        "point on the arc between the base and one other model",
        base="required",
        inputs=(1, 1),
        parameters={"t": Parameter("shared", low=0.0, high=1.0, about="0 is the base, 1 the other model")},
        combine=geometry.weighted,
        measure=geometry.slerp,
        share="parallel_share",
    ),
    "nuslerp": Method(
        "point on the arc between two models, or between their task vectors",
        base="optional",
        inputs=(2, 2),
        parameters={
            "weight": _WEIGHT,
            "nuslerp_flatten": _flag(True, "one arc for a whole tensor"),
            "nuslerp_row_wise": _flag(False, "else one for each column, not each row"),
        },
        combine=geometry.nuslerp_combine,
        measure=geometry.nuslerp,
        rows=True,
    ),
    "multislerp": Method(
        "weighted mean of several models, or their task vectors, on the sphere",
        base="optional",
        inputs=(1, None),
        parameters={
            "weight": _WEIGHT,
            "normalize_weights": _flag(True, "divide the weights by their sum"),
            "eps": Parameter("shared", default=1e-8, low=0.0, about="lengths below it count as 0"),
        },
        combine=geometry.weighted,
        measure=geometry.multislerp,
    ),
    "karcher": Method(
        "Riemannian mean of the models' directions, times their mean length",
        base="none",
        inputs=(2, None),
        parameters={
            "max_iter": Parameter("shared", default=10, low=1, whole=True, about="rounds at most"),
            "tol": Parameter("shared", default=1e-5, low=0.0, about="stop at a step shorter than this"),
        },
        combine=geometry.weighted,
        measure=geometry.karcher,
    ),
    "task_arithmetic": Method(
        "the base plus the weighted task vectors",
        base="required",
        inputs=(1, None),
        parameters={"weight": _WEIGHT, "normalize": _flag(False, _NORMALIZE), "lambda": _LAMBDA},
        combine=geometry.task_arithmetic,
        source="https://arxiv.org/abs/2212.04089",
    ),
    "ties": Method(
        "the base plus trimmed task vectors that agree on a sign",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=True, rescale=False),
        combine=sparsify.combine(elect=True),
        elects=True,
        measure=sparsify.trim,
        share="kept_share",
        source="https://arxiv.org/abs/2306.01708",
    ),
    "dare_ties": Method(
        "the base plus randomly thinned task vectors that agree on a sign",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=False, rescale=True),
        combine=sparsify.combine(elect=True),
        elects=True,
        measure=sparsify.drop_at_random,
        share="kept_share",
        source="https://arxiv.org/abs/2311.03099",
    ),
    "dare_linear": Method(
        "the base plus randomly thinned task vectors",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=False, rescale=True),
        combine=sparsify.combine(elect=False),
        measure=sparsify.drop_at_random,
        share="kept_share",
        source="https://arxiv.org/abs/2311.03099",
    ),
    "breadcrumbs": Method(
        "the base plus task vectors without their largest and smallest elements",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=False, rescale=False, gamma=_GAMMA),
        combine=sparsify.combine(elect=False),
        measure=sparsify.trim_both_ends,
        share="kept_share",
        source="https://arxiv.org/abs/2312.06795",
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs whose task vectors agree on a sign",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=False, rescale=False, gamma=_GAMMA),
        combine=sparsify.combine(elect=True),
        elects=True,
        measure=sparsify.trim_both_ends,
        share="kept_share",
        source="https://arxiv.org/abs/2312.06795",
    ),
    "della": Method(
        "the base plus task vectors thinned by rank, that agree on a sign",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=True, rescale=True, epsilon=_EPSILON),
        combine=sparsify.combine(elect=True),
        elects=True,
        measure=sparsify.drop_by_rank,
        share="kept_share",
        rows=True,
        source="https://arxiv.org/abs/2406.11617",
    ),
    "della_linear": Method(
        "the base plus task vectors thinned by rank",
        base="required",
        inputs=(1, None),
        parameters=_sparse(normalize=False, rescale=True, epsilon=_EPSILON),
        combine=sparsify.combine(elect=False),
        measure=sparsify.drop_by_rank,
        share="kept_share",
        rows=True,
        source="https://arxiv.org/abs/2406.11617",
    ),
    "sce": Method(
        "the base plus task vectors where they vary most, weighed by their energy",
        base="required",
        inputs=(1, None),
        parameters={
            "select_topk": Parameter("shared", default=1.0, low=0.0, high=1.0, about="share of the positions kept")
        },
        combine=sparsify.select_combine,
        measure=sparsify.select,
        share="kept_share",
        source="https://arxiv.org/abs/2408.07990",
    ),
    "ram": Method(
        "the base plus what models changed: alone as it is, several of them on average",
        base="required",
        inputs=(1, None),
        parameters={"epsilon": _UNCHANGED},
        combine=elementwise.ram,
        source="https://arxiv.org/abs/2601.13572",
    ),
    "ramplus_tl": Method(
        "ram that strengthens what a model changed alone, the more it shares with others",
        base="required",
        inputs=(1, None),
        parameters={
            "r": Parameter("shared", default=0.1, low=0.0, about="strength for each unit of shared / unique elements"),
            "alpha": Parameter("shared", default=0.2, low=0.0, about="shared / unique counts up to here"),
            "epsilon": _UNCHANGED,
        },
        combine=elementwise.ram,
        measure=elementwise.ram_plus,
        source="https://arxiv.org/abs/2601.13572",
    ),
    "arcee_fusion": Method(
        "the base with those elements of the other model whose change matters far more than most",
        base="required",
        inputs=(1, 1),
        parameters={},
        combine=sparsify.fuse_combine,
        measure=sparsify.fuse,
        share="kept_share",
        rows=True,
        source="https://arxiv.org/abs/2403.13257",
    ),
    "model_stock": Method(
        "between the base and the models' mean, by the angle between task vectors",
        base="required",
        inputs=(2, None),
        parameters={"filter_wise": _flag(False, "one angle for each row of a matrix")},
        combine=geometry.model_stock_by_row,
        measure=geometry.model_stock,
        rows=True,
        source="https://arxiv.org/abs/2403.19522",
    ),
    "nearswap": Method(
        "the base, moved to the other model where the two are nearly alike",
        base="required",
        inputs=(1, 1),
        parameters={"t": Parameter("shared", low=0.0, about="elements closer than this are taken over whole")},
        combine=elementwise.nearswap,
    ),
    "passthrough": Method(
        "one model, unchanged or scaled",
        base="none",
        inputs=(1, 1),
        parameters={"scale": Parameter("input", default=1.0, about="factor")},
        combine=geometry.passthrough,
    ),
}
