"""The methods again, written from the papers' formulas on whole tensors in float64: sorting, no blocks, no histograms."""

import hashlib
import json
import math

import numpy as np


def linear(xs, weights, normalize=True):
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def slerp(base, x, t):
    unit = [v / norm if (norm := np.linalg.norm(v)) > 1e-8 else v for v in (base, x)]
    cosine = float(np.clip(np.sum(unit[0] * unit[1]), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * x
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * x) / math.sin(angle)


def task_arithmetic(base, xs, weights, normalize=False, lam=1.0):
    mix = sum(w * (x - base) for w, x in zip(weights, xs, strict=True))
    return base + lam * (mix / sum(weights) if normalize else mix)


def top_mask(delta, density):
    """Stable sort by falling float32 magnitude: of equal ones the lowest flat index comes first."""
    kept = np.argsort(-np.abs(delta.astype(np.float32)), kind="stable")[: max(1, int(density * delta.size))]
    mask = np.zeros(delta.size, bool)
    mask[kept] = True
    return mask


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


def consensus(base, xs, weights, masks, normalize, rescale, lam=1.0):
    out = np.array(base)
    vectors = []
    for x, mask in zip(xs, masks, strict=True):
        delta = x - base
        factor = np.abs(delta).sum() / np.abs(delta[mask]).sum() if rescale and np.abs(delta[mask]).sum() else 1.0
        vectors.append(np.where(mask, delta * factor, 0.0))
    for place in range(base.size):
        signed = [w * v[place] for w, v in zip(weights, vectors, strict=True)]
        sign = 1.0 if sum(signed) >= 0 else -1.0
        agree = [s * sign > 0 for s in signed]
        mix = sum(s for s, yes in zip(signed, agree, strict=True) if yes)
        total = sum(w for w, yes in zip(weights, agree, strict=True) if yes)
        if normalize and any(agree) and abs(total) >= 1e-8:
            mix /= total
        out[place] = base[place] + lam * mix
    return out


def round_bf16(values):
    """float64 to the nearest bfloat16, ties to even, in one rounding, as float64 (torch rounds to float32 first)."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
