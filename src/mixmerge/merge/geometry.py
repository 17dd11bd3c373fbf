"""Methods whose result is a weighted sum of the inputs, with weights from lengths and angles.

The one idea: every such result lies in the span of the inputs, so vectors are written as coefficients over them, and
lengths and angles come from the matrix of dot products (Gram matrix): one pass over the tensor, whatever iterates later.
"""

from __future__ import annotations

import math

import numpy as np

from mixmerge.errors import ModelError
from mixmerge.merge.block import At, Block, Float64, Measured, Over

PARALLEL = 0.9995  # slerp merges tensors of a larger |cosine| linearly
NO_LENGTH = 1e-8


def weighted(block: Block, _: At, coefficients: Float64) -> Float64:
    """sum c_i x_i over the base (first, where there is one) and the inputs."""
    block.engine.weighted_sum(block.all, coefficients, block.out)
    return block.out


def linear(block: Block, at: At, _: object) -> Float64:
    """sum w_i x_i, divided by sum w_i when normalize."""
    return weighted(block, at, np.array(weights(at)))


def task_arithmetic(block: Block, at: At, _: object) -> Float64:
    """b + lambda sum w_i (x_i - b), as fixed coefficients: one model at weight 1 then is exactly that model."""
    scaled = [at["lambda"] * w for w in weights(at)]
    return weighted(block, at, np.array([1.0 - math.fsum(scaled), *scaled]))


def passthrough(block: Block, at: At, _: object) -> Float64:
    """scale x."""
    return weighted(block, at, np.array(at.each("scale")))


def weights(at: At) -> list[float]:
    """The weights, divided by their sum when normalize; all zero stay zero (the base is left as it is)."""
    given = at.each("weight")
    total = math.fsum(given) if at["normalize"] else 1.0
    return [w / total for w in given] if any(given) else given


def gram(over: Over, *, deltas: bool) -> Float64:
    """Dot products of all pairs of inputs, of task vectors where there is a base and `deltas`: float64 (k, k).

    Without `deltas` the base is the first. Task vectors are small beside the base, so their products are not
    derived from those of the models.
    """

    def dots(block: Block) -> Float64:
        rows = block.deltas() if deltas else block.all
        out = np.empty((len(rows),) * 2)
        block.engine.dots(rows, out)
        return out

    parts = np.array(over(dots))
    k = parts.shape[1]
    return np.array([[math.fsum(parts[:, a, b]) for b in range(k)] for a in range(k)])


def slerp(over: Over, at: At) -> Measured:
    """[sin((1-t) theta), sin(t theta)] / sin(theta); [1-t, t] where the two are parallel, |cos| > 0.9995."""
    G, t = gram(over, deltas=False), at["t"]
    cosine = slerp_cosine(G[0, 1], G[0, 0], G[1, 1])
    if abs(cosine) > PARALLEL:
        return Measured(np.array([1.0 - t, t]), part=1, whole=1)
    return Measured(np.array(_arc(math.acos(cosine), t)), whole=1)


def slerp_cosine(dot: float, first: float, second: float) -> float:
    """The cosine that slerp goes by, from a dot product and two squared lengths; a length of about 0 counts as 1."""
    norms = [norm if (norm := math.sqrt(square)) > NO_LENGTH else 1.0 for square in (first, second)]
    return min(1.0, max(-1.0, dot / (norms[0] * norms[1])))


def multislerp(over: Over, at: At) -> Measured:
    """The inputs' weighted mean direction mu, times sum w_i |X_i|, for X_i the inputs or, with a base, the task vectors.

    mu = sum w_i u_i, normalised. (The step of the method's guide from mu along its tangent, sum w_i (u_i - (u_i.mu) mu),
    has length 0: mu is the very point at which that sum vanishes.)

    Raises:
        ModelError: the directions cancel, so that they have no mean.
    """
    G, eps = gram(over, deltas=True), at["eps"]
    w, norms = np.array(at.each("weight")), np.sqrt(np.diag(G))
    if not (w * norms).any():
        return Measured(_onto_base(np.zeros(len(w)), at))  # nothing moves this tensor
    if at["normalize_weights"] or len(w) == 1:  # one model stays as it is
        w = w / math.fsum(w)
    mu = w / (norms + eps)  # as coefficients of X_i
    length = _norm(mu, G)
    if length <= eps:
        what = f"multislerp: the directions of the models cancel in tensor '{at.tensor}', so they have no mean"
        raise ModelError(what, do="change the weights a little, or use karcher or linear there")
    return Measured(_onto_base(mu * float(w @ norms) / length, at))


def karcher(over: Over, at: At) -> Measured:
    """The Riemannian mean of the inputs' directions on the sphere, times their mean length.

    Each round moves the mean along the average of the logarithms of the directions, until that is shorter than tol.
    """
    G = gram(over, deltas=False)
    norms = np.sqrt(np.diag(G))
    long = norms > at["tol"]
    if not long.any():
        return Measured(np.zeros(len(norms)))
    share = long / long.sum()
    inverse = np.where(long, 1.0 / np.where(long, norms, 1.0), 0.0)
    mean = share * inverse
    length = _norm(mean, G)
    if length < at["tol"]:  # directions that cancel: start from the first
        mean, length = np.eye(len(norms))[int(np.argmax(long))] * inverse, 1.0
    mean = mean / length
    for _ in range(int(at["max_iter"])):
        cosines = np.clip((G @ mean) * inverse, -1.0, 1.0)
        angles = np.arccos(cosines)
        sines = np.sin(angles)
        nowhere = sines < 1e-8  # the mean itself, or its antipode, to which no direction is the shortest
        scale = np.where(nowhere, 0.0, angles / np.where(nowhere, 1.0, sines)) * share
        step = scale * inverse - float(scale @ cosines) * mean
        length = _norm(step, G)
        if length < at["tol"]:
            break
        mean = mean * math.cos(length) + step * (math.sin(length) / length)
        mean = mean / _norm(mean, G)
    return Measured(mean * float(norms.mean()))


def model_stock(over: Over, at: At) -> Measured:
    """t mean(x) + (1-t) b, with t = N c / (1 + (N-1) c) and c the mean cosine between task vectors.

    https://arxiv.org/abs/2403.19522, eq. 2.
    """
    return Measured(_stock(gram(over, deltas=True)[:, :, None])[:, 0])


def model_stock_by_row(block: Block, at: At, statistic: object) -> Float64:
    """The same with a c for each row of a matrix (filter_wise)."""
    if not at["filter_wise"]:
        return weighted(block, at, np.asarray(statistic))
    coefficients = _stock(_by_row(block, at))
    block.engine.weighted_rows(block.all, at.row, coefficients, True, block.out)
    return block.out


def _stock(G: Float64) -> Float64:
    """Coefficients (k + 1, m) of the base and the inputs for m Gram matrices (k, k, m) of task vectors."""
    k = len(G)
    norms = np.sqrt(np.einsum("iim->im", G))
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosines = [G[i, j] / np.maximum(norms[i] * norms[j], 1e-12) for i, j in pairs]
    c = np.clip(np.array(cosines), -1.0, 1.0).mean(axis=0)
    whole = 1.0 + (k - 1) * c
    opposed = np.abs(whole) < 1e-12  # task vectors that cancel leave the base
    t = np.where(opposed, 0.0, k * c / np.where(opposed, 1.0, whole))
    return np.array([1.0 - t, *[t / k] * k])


def nuslerp(over: Over, at: At) -> Measured:
    """From x_1 to x_2 by t = w_2 / (w_1 + w_2), along the arc between their directions; with a base, of the task vectors.

    One arc for the tensor, or one for each row (nuslerp_flatten: false) or column (and nuslerp_row_wise: true) of a
    matrix. That is what mergekit computes, though its guide has rows and columns the other way round.
    """
    if at["nuslerp_flatten"]:
        G = gram(over, deltas=True)[:, :, None]
    elif not at["nuslerp_row_wise"] or len(at.shape) < 2:
        return Measured()  # a block has whole rows
    else:
        G = np.sum(over(lambda block: _by_column(block, at)), axis=0)
    return Measured(_arcs(G, at))


def nuslerp_combine(block: Block, at: At, statistic: object) -> Float64:
    """The sum of the inputs by the coefficients of their tensor, row or column."""
    if at["nuslerp_flatten"]:
        return weighted(block, at, _onto_base(np.asarray(statistic)[:, 0], at))
    by_row = statistic is None
    coefficients = _arcs(_by_row(block, at), at) if by_row else np.asarray(statistic)
    if block.has_base:
        coefficients = np.array([1.0 - coefficients.sum(axis=0), *coefficients])
    block.engine.weighted_rows(block.all, at.row, coefficients, by_row, block.out)
    return block.out


def _arcs(G: Float64, at: At) -> Float64:
    """Coefficients (2, m) of the arcs between two vectors, from m Gram matrices (2, 2, m).

    A line where they are colinear: within 3e-4 of that, an arc is a line in float32, or goes round through rounding errors.
    """
    first, second = at.each("weight")
    t = second / (first + second) if abs(first + second) > 1e-8 else 0.5
    norms = np.maximum(np.sqrt(np.einsum("iim->im", G)), 1e-7)
    angle = np.arccos(np.clip(G[0, 1] / (norms[0] * norms[1]), -1.0, 1.0))
    sine = np.sin(angle)
    colinear = np.abs(sine) < 3e-4
    sine = np.where(colinear, 1.0, sine)
    a, b = np.sin((1.0 - t) * angle) / sine, np.sin(t * angle) / sine
    return np.array([np.where(colinear, 1.0 - t, a), np.where(colinear, t, b)])


def _arc(angle: float, t: float) -> list[float]:
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _norm(coefficients: Float64, G: Float64) -> float:
    return math.sqrt(max(0.0, float(coefficients @ G @ coefficients)))


def _onto_base(coefficients: Float64, at: At) -> Float64:
    """b + sum c_i (x_i - b) as coefficients of b and the x_i; unchanged where there is no base."""
    return np.array([1.0 - math.fsum(coefficients), *coefficients]) if at.has_base else coefficients


def _by_row(block: Block, at: At) -> Float64:
    """Dot products of all pairs of task vectors, or of inputs without a base, in each row: float64 (k, k, rows)."""
    found = np.empty((block.inputs, block.inputs, block.size // at.row))
    block.engine.row_dots(block.deltas(), at.row, found)
    return found


def _by_column(block: Block, at: At) -> Float64:
    """The same in each column, over the rows of this block: float64 (k, k, row)."""
    found = np.empty((block.inputs, block.inputs, at.row))
    block.engine.column_dots(block.deltas(), at.row, found)
    return found
