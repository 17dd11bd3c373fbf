"""The methods again, written from the papers' formulas on whole tensors in float64: sorting, no blocks, no histograms.

Vectors are flat; where rows matter the tensor's shape comes along. Of equal magnitudes the lowest flat index is the largest.
"""

import hashlib
import json
import math
from functools import cache

import numpy as np


def linear(xs, weights, normalize=True):
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def unit(v):
    """The direction of a vector; a vector of zeros has none, and stays."""
    return v / (np.linalg.norm(v) or 1.0)


def arc(a, b, t):
    """[coefficient of a, coefficient of b] of the point at t on the arc between their directions."""
    angle = math.acos(np.clip(np.sum(unit(a) * unit(b)), -1, 1))
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(base, x, t):
    if abs(np.sum(unit(base) * unit(x))) > 0.9995:
        return (1 - t) * base + t * x
    a, b = arc(base, x, t)
    return a * base + b * x


def nuslerp(base, xs, weights, shape, along):
    """`along`: one arc for the whole tensor, for each of its rows or for each of its columns."""
    origin = np.zeros_like(xs[0]) if base is None else base
    a, b = ((x - origin).reshape(shape) for x in xs)
    out, t = np.empty(shape), weights[1] / sum(weights)
    if along == "whole" or len(shape) < 2:
        places = [...]
    else:
        places = [(slice(None), i) if along == "columns" else i for i in range(shape[along == "columns"])]
    for place in places:
        first, second = arc(a[place], b[place], t)
        out[place] = first * a[place] + second * b[place]
    return origin + out.ravel()


def multislerp(base, xs, weights):
    origin = np.zeros_like(xs[0]) if base is None else base
    vectors, shares = [x - origin for x in xs], np.array(weights) / sum(weights)
    norms = [np.linalg.norm(v) for v in vectors]
    units = [unit(v) for v in vectors]
    mean = unit(sum(s * u for s, u in zip(shares, units, strict=True)))
    step = sum(s * (u - np.sum(u * mean) * mean) for s, u in zip(shares, units, strict=True))
    length = np.linalg.norm(step)
    point = mean * math.cos(length) + step * np.sinc(length / math.pi)
    return origin + point * np.dot(shares, norms)


def karcher(xs, rounds=10, tol=1e-5):
    norms = [np.linalg.norm(x) for x in xs]
    units = [unit(x) for x in xs if x.any()]
    mean = unit(sum(units))
    for _ in range(rounds):
        step = np.zeros_like(mean)
        for u in units:
            angle = math.acos(np.clip(np.sum(u * mean), -1, 1))
            step += (u - math.cos(angle) * mean) / np.sinc(angle / math.pi) / len(units)
        length = np.linalg.norm(step)
        if length < tol:
            break
        mean = mean * math.cos(length) + step * np.sinc(length / math.pi)
        mean = unit(mean)
    return mean * np.mean(norms)


def model_stock(base, xs, shape, by_row):
    """t mean(x) + (1-t) b, t = k c / (1 + (k-1) c), c the mean cosine between task vectors: of the tensor or of each row."""
    row = shape[-1] if by_row and len(shape) > 1 else base.size
    b, *rows = (v.reshape(-1, row) for v in (base, *xs))
    out, k = np.empty(rows[0].shape), len(xs)
    for i in range(len(out)):
        d = [x[i] - b[i] for x in rows]
        pairs = [(p, q) for p in range(k) for q in range(p)]
        c = np.mean([np.dot(d[p], d[q]) / (np.linalg.norm(d[p]) * np.linalg.norm(d[q])) for p, q in pairs])
        t = k * c / (1 + (k - 1) * c)
        out[i] = t * sum(x[i] for x in rows) / k + (1 - t) * b[i]
    return out.ravel()


def nearswap(base, x, t):
    w = np.array([min(1.0, t / abs(p - q)) if p != q else 1.0 for p, q in zip(base, x, strict=True)])
    return w * x + (1 - w) * base


def task_arithmetic(base, xs, weights, normalize=False, lam=1.0):
    mix = sum(w * (x - base) for w, x in zip(weights, xs, strict=True))
    return base + lam * (mix / sum(weights) if normalize else mix)


def rising(values):
    """Flat indices from the smallest float32 magnitude to the largest."""
    return np.argsort(-np.abs(values.astype(np.float32)), kind="stable")[::-1]


def mask_of(size, places):
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask


def top_mask(delta, density):
    return mask_of(delta.size, rising(delta)[-max(1, int(density * delta.size)) :])


def crumbs_mask(delta, density, gamma):
    """Without the int(gamma n) largest, and of the rest the int(density n) largest."""
    keep, top = int(density * delta.size), int(gamma * delta.size)
    bottom = max(0, delta.size - keep - top)
    return mask_of(delta.size, rising(delta)[bottom : bottom + keep])


@cache
def random_words(size, seed, tensor, index):
    """The documented stream: Philox4x32-10 keyed by 8 bytes of the sha256 of [seed, tensor, input], in plain integers."""
    key = int.from_bytes(hashlib.sha256(json.dumps([seed, tensor, index]).encode()).digest()[:8], "little")
    words = []
    for counter in range(-(-size // 4)):
        x, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        words += x
    return np.array(words[:size], np.uint32)


def dare_mask(size, density, seed, tensor, index):
    """Each element is kept whose word, as a fraction of 2^32, is below the density."""
    return random_words(size, seed, tensor, index) / 2**32 < density


def della_mask(delta, shape, density, epsilon, seed, tensor, index):
    """In each row of n elements, rank r (0: the smallest) is kept with probability density - epsilon + 2 epsilon r / (n-1)."""
    row = shape[-1] if len(shape) > 1 else delta.size
    chances = np.empty((delta.size // row, row))
    for chance, values in zip(chances, delta.reshape(-1, row), strict=True):
        chance[rising(values)] = np.linspace(density - epsilon, density + epsilon, row)
    return random_words(delta.size, seed, tensor, index) / 2**32 < chances.ravel()


def consensus(base, xs, weights, masks, normalize, rescale, lam=1.0, elect=True):
    """b + lambda sum of the masked, weighed task vectors: with `elect` of those that have the sign of that sum."""
    D = []
    for x, mask, w in zip(xs, masks, weights, strict=True):
        kept = np.where(mask, x - base, 0.0)
        whole, left = np.abs(x - base).sum(), np.abs(kept).sum()
        D.append(w * kept * (whole / left if rescale and left else 1.0))
    sign = np.where(sum(D) >= 0, 1.0, -1.0)
    agree = [d * sign > 0 if elect else np.ones(base.size, bool) for d in D]
    mix = sum(np.where(yes, d, 0.0) for d, yes in zip(D, agree, strict=True))
    total = sum(np.where(yes, w, 0.0) for w, yes in zip(weights, agree, strict=True))
    if normalize:
        mix = mix / np.where(np.abs(total) < 1e-8, 1.0, total)
    return base + lam * mix


def sce(base, xs, topk):
    """Where the task vectors vary most; weighed by their mean squares there; of those with the sign of their sum."""
    d = np.array([(x - base).astype(np.float32) for x in xs]).astype(np.float64)
    spread = d.var(axis=0).astype(np.float32)
    mask = np.ones(base.size, bool)
    if topk < 1:
        mask = mask_of(base.size, rising(spread)[base.size - int(topk * np.count_nonzero(spread)) :])
    d = np.array([x - base for x in xs]) * mask
    weights = np.square(d).sum(axis=1) / np.square(d).sum()
    agree = d * np.where(d.sum(axis=0) >= 0, 1.0, -1.0) > 0
    total = (weights[:, None] * agree).sum(axis=0)
    return base + (weights[:, None] * agree * d).sum(axis=0) / np.where(total > 0, total, 1.0)


def ram(base, xs, epsilon=1e-5, r=0.0, alpha=0.0):
    """What several models changed on average, what one changed times 1 + r min(shared / unique, alpha) of that model."""
    changed = [np.abs((x - base).astype(np.float32)) > np.float32(epsilon) for x in xs]
    models, out = sum(c.astype(int) for c in changed), np.array(base)
    for x, mine in zip(xs, changed, strict=True):
        unique, shared = mine & (models == 1), mine & (models > 1)
        boost = 1 + r * min(shared.sum() / unique.sum(), alpha) if unique.any() else 1.0
        out[unique] += boost * (x - base)[unique]
        out[shared] += (x - base)[shared] / models[shared]
    return out


def arcee_fusion(base, x, shape):
    """x where |x - b| KL(softmax(x) || softmax(b)) of its row exceeds median + 1.5 (Q3 - Q1) of all, else b."""
    row = shape[-1] if len(shape) > 1 else base.size
    b, y = base.reshape(-1, row), x.reshape(-1, row)
    p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (b, y))
    importance = np.abs(y - b) * (q * np.log(q / p)).sum(axis=1, keepdims=True)
    low, median, high = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    return np.where(importance >= (median + 1.5 * (high - low)) * (1 - 1e-6), y, b).ravel()


def round_bf16(values):
    """float64 to the nearest bfloat16, ties to even, in one rounding, as float64 (torch rounds to float32 first)."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
