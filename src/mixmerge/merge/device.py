"""The compiled loops again as torch operations, so that blocks can be worked on by a CUDA device.

The one idea: every operation is one that IEEE 754 defines, or a sum in the very order of the compiled loops, so a device
changes no byte. Names, arguments and results are those of kernels.py and selection.py; arrays of a block are tensors
here, small results are numpy arrays as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixmerge.errors import UserError
from mixmerge.merge import kernels, selection

_MAGNITUDE = 0x7FFFFFFF
_WORD = 0xFFFFFFFF
_DTYPES = {np.float32: torch.float32, np.float64: torch.float64, np.bool_: torch.bool, np.uint32: torch.int64}


class Device:
    """All that a method asks of a block's arrays, on one torch device.

    Raises:
        UserError: there is no such device.
    """

    threads = 2  # one reads and writes while the other's block is at work

    def __init__(self, name: str) -> None:
        if name.partition(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"unknown device '{name}'", where="--device", do="cpu, cuda, or one of several as cuda:1")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("torch finds no CUDA device here", where=f"--device {name}", do="leave --device away")
        try:
            self._on: dict[str, Any] = {"device": torch.zeros(1, device=name).device}
        except RuntimeError as error:
            raise UserError(
                f"torch has no such device here ({type(error).__name__})", where=f"--device {name}", do="e.g. cuda"
            ) from error

    def empty(self, shape: Any, dtype: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=_DTYPES[dtype], **self._on)

    def host(self, values: torch.Tensor) -> Any:
        return values.cpu().numpy()

    def count(self, mask: torch.Tensor) -> int:
        return int(torch.count_nonzero(mask))

    def below(self, words: torch.Tensor, limit: int, mask: torch.Tensor) -> None:
        mask[:] = words < int(limit)

    def raw(self, words: Any, places: Any, stored: Any, size: int) -> tuple[torch.Tensor, Any]:
        """A block's raw elements, moved here one input after the other, and where each begins."""
        widths = np.array([2 if kind == kernels.F32 else 1 for kind in stored]) * size
        widths += widths % 2  # so that the next one may be read as 32 bits
        moved = torch.empty(int(widths.sum()), dtype=torch.int16, **self._on)
        begins = np.cumsum(widths) - widths
        for place, begin, width in zip(places, begins, widths, strict=True):
            piece = words[place : place + width].view(np.int16)
            moved[begin : begin + len(piece)].copy_(torch.from_numpy(piece))
        return moved, begins

    def decode(self, words: torch.Tensor, place: int, stored: int, out: torch.Tensor) -> bool:
        n = out.numel()
        if stored == kernels.F32:
            out[:] = words[place : place + 2 * n].view(torch.float32)
        else:
            kind = torch.bfloat16 if stored == kernels.BF16 else torch.float16
            out[:] = words[place : place + n].view(kind).float()
        return bool(torch.isfinite(out).all())

    def task_vector(self, words: torch.Tensor, places: Any, stored: Any, index: int, out: torch.Tensor) -> int:
        base = torch.empty_like(out)
        if not self.decode(words, places[0], stored[0], base):
            return 0
        if not self.decode(words, places[index], stored[index], out):
            return index
        out -= base
        return -1

    def encode(self, values: torch.Tensor, dtype: str, single: torch.Tensor, into: Any) -> bool:
        """float64 rounded once to nearest even; whether all are finite as stored."""
        if dtype == "F32":
            stored = values.float()
        else:
            single[:] = values
            odd = _rounded_to_odd(values, single)
            stored = odd.to(torch.bfloat16 if dtype == "BF16" else torch.float16)
        into[:] = stored.view(torch.uint8).cpu().numpy()
        return bool(torch.isfinite(stored).all())

    def weighted_sum(self, rows: torch.Tensor, coefficients: Any, out: torch.Tensor) -> None:
        taking_part = [(float(c), x) for c, x in zip(coefficients, rows, strict=True) if c != 0.0]
        out[:] = 0.0
        for i, (c, x) in enumerate(taking_part):
            if i == 0:
                torch.mul(x.double(), c, out=out)
            else:
                out += c * x.double()

    def dots(self, rows: torch.Tensor, out: Any) -> None:
        wide = _strips(rows.double()[:, None], 1024)
        for a in range(len(rows)):
            for b in range(a + 1):
                out[a, b] = out[b, a] = _sequential(_folded(wide[a] * wide[b]))[0]

    def row_dots(self, rows: torch.Tensor, row: int, out: Any) -> None:
        wide = _strips(rows.double().view(len(rows), -1, row), kernels.strip_of(row))
        for a in range(len(rows)):
            for b in range(a + 1):
                out[a, b] = out[b, a] = _sequential(_folded(wide[a] * wide[b]))

    def column_dots(self, rows: torch.Tensor, row: int, out: Any) -> None:
        x = rows.double().view(len(rows), -1, row)
        for a in range(len(rows)):
            for b in range(a + 1):
                out[a, b] = out[b, a] = _sequential((x[a] * x[b]).T)

    def weighted_rows(self, rows: torch.Tensor, row: int, coefficients: Any, by_row: bool, out: torch.Tensor) -> None:
        c = torch.from_numpy(np.ascontiguousarray(coefficients)).to(**self._on)
        total = out.view(-1, row)
        total[:] = 0.0
        for i, x in enumerate(rows):
            total += (c[i][:, None] if by_row else c[i]) * x.double().view(-1, row)

    def count_high(self, values: torch.Tensor, histogram: Any) -> None:
        found = torch.bincount(_magnitudes(values) >> 16, minlength=selection.HIGH_BINS)
        histogram += found.cpu().numpy()

    def count_low(self, values: torch.Tensor, high: int, histogram: Any) -> None:
        magnitudes = _magnitudes(values)
        low = magnitudes[(magnitudes >> 16) == int(high)] & 0xFFFF
        histogram += torch.bincount(low, minlength=selection.LOW_BINS).cpu().numpy()

    def gather_low(self, values: torch.Tensor, high: int, out: Any) -> int:
        magnitudes = _magnitudes(values)
        found = (magnitudes[(magnitudes >> 16) == int(high)] & 0xFFFF).cpu().numpy()
        out[: len(found)] = found
        return len(found)

    def places_of(self, values: torch.Tensor, magnitude: int, places: Any) -> int:
        found = torch.nonzero(_magnitudes(values) == int(magnitude))[:, 0].cpu().numpy()
        places[: len(found)] = found
        return len(found)

    def keep_window(self, values: torch.Tensor, start: int, window: Any, mask: torch.Tensor) -> None:
        above, above_end, below, below_end = (int(part) for part in window)
        m, at = _magnitudes(values), torch.arange(len(values), **self._on) + start
        mask[:] = (m > above) | ((m == above) & (at < above_end))
        if below < 0x7F800000:
            mask &= (m < below) | ((m == below) & (at >= below_end))

    def keep_by_rank(
        self, values: torch.Tensor, row: int, low: float, span: float, words: torch.Tensor, mask: torch.Tensor
    ) -> None:
        # of equal magnitudes the lowest index ranks highest: a stable sort from the other end
        order = _magnitudes(values).view(-1, row).flip(1).sort(dim=1, stable=True).indices
        ranks = torch.empty_like(order)
        ranks.scatter_(1, order, torch.arange(row, **self._on).expand_as(order).contiguous())
        limit = (span * ranks.flip(1).double() + low) * 4294967296.0
        mask[:] = (words.view(-1, row).double() < limit).view(-1)

    def philox(self, key_low: int, key_high: int, start: int, out: torch.Tensor) -> None:
        first, end = start // 4, (start + len(out) + 3) // 4
        counter = torch.arange(first, end, **self._on)
        x = [counter & _WORD, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
        k0, k1 = int(key_low), int(key_high)
        for _ in range(10):
            (a_high, a_low), (b_high, b_low) = _wide_product(0xD2511F53, x[0]), _wide_product(0xCD9E8D57, x[2])
            x = [b_high ^ x[1] ^ k0, b_low, a_high ^ x[3] ^ k1, a_low]
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        skipped = start - 4 * first
        out[:] = torch.stack(x, dim=1).view(-1)[skipped : skipped + len(out)]

    def masked_sums(self, values: torch.Tensor, mask: torch.Tensor, sums: Any) -> None:
        size, kept = values.double().abs(), mask.double()
        wide = _strips(torch.stack([size, size * kept])[:, None], 1024)
        sums[0] += _sequential(_folded(wide[0]))[0]
        sums[1] += _sequential(_folded(wide[1]))[0]
        sums[2] += self.count(mask)

    def masked_squares(self, rows: torch.Tensor, mask: torch.Tensor, out: Any) -> None:
        x = rows.double()
        wide = _strips((x * x * mask)[:, None], 1024)
        for i in range(len(rows)):
            out[i] = _sequential(_folded(wide[i]))[0]

    def consensus(
        self,
        words: torch.Tensor,
        places: Any,
        stored: Any,
        first: int,
        mask: torch.Tensor,
        windows: Any,
        weights: Any,
        scales: Any,
        elect: bool,
        normalize: bool,
        factor: float,
        out: torch.Tensor,
    ) -> int:
        base, single = torch.empty_like(out, dtype=torch.float32), torch.empty_like(out, dtype=torch.float32)
        if not self.decode(words, places[0], stored[0], base):
            return 0
        vectors, total, all_weights = [], torch.zeros_like(out), 0.0
        for i, weight in enumerate(weights):
            if not self.decode(words, places[i + 1], stored[i + 1], single):
                return i + 1
            all_weights += float(weight)
            kept = mask[i]
            if len(windows):
                kept = torch.empty_like(single, dtype=torch.bool)
                self.keep_window(single - base, first, windows[i], kept)
            vectors.append(float(weight * scales[i]) * (single.double() - base.double()) * kept)
            total += vectors[-1]
        if elect:
            out[:] = 0.0
            divisor = torch.zeros_like(out)
            for own, weight in zip(vectors, weights, strict=True):
                agrees = ((own > 0.0) == (total >= 0.0)) & (own != 0.0)
                out += own * agrees
                divisor += float(weight) * agrees.double()
        else:
            out[:] = total
            divisor = torch.full_like(out, all_weights)
        if normalize:
            out /= torch.where(divisor.abs() >= 1e-8, divisor, 1.0)
        torch.add(base.double(), factor * out, out=out)
        return -1

    def spread(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        total, square = torch.zeros_like(rows[0], dtype=torch.float64), torch.zeros_like(rows[0], dtype=torch.float64)
        for x in rows:
            total += x.double()
        for x in rows:
            off = x.double() - total / len(rows)
            square += off * off
        out[:] = square / len(rows)

    def agreeing(
        self, rows: torch.Tensor, base: torch.Tensor, mask: torch.Tensor, weights: Any, out: torch.Tensor
    ) -> None:
        vectors = [x.double() - base.double() for x in rows]
        total, mix, divisor = (torch.zeros_like(out) for _ in range(3))
        for d in vectors:
            total += d
        for d, weight in zip(vectors, weights, strict=True):
            kept = d * mask
            agrees = ((kept > 0.0) == (total >= 0.0)) & (kept != 0.0)
            mix += float(weight) * kept * agrees
            divisor += float(weight) * agrees.double()
        out[:] = base.double() + mix / torch.where(divisor > 0.0, divisor, 1.0)

    def changed_mean(
        self, rows: torch.Tensor, base: torch.Tensor, epsilon: float, boosts: Any, out: torch.Tensor
    ) -> None:
        total, boosted, models = (torch.zeros_like(out) for _ in range(3))
        for x, boost in zip(rows, boosts, strict=True):
            changed = (x - base).abs() > float(epsilon)
            d = (x.double() - base.double()) * changed
            total += d
            boosted += d * float(boost)
            models += changed
        out[:] = base.double() + torch.where(models == 1.0, boosted, total / models.clamp(min=1.0))

    def count_changed(self, rows: torch.Tensor, base: torch.Tensor, epsilon: float, out: Any) -> None:
        changed = (rows - base).abs() > float(epsilon)
        alone = changed & (changed.sum(dim=0) == 1)
        out[:, 0], out[:, 1] = changed.sum(dim=1).cpu().numpy(), alone.sum(dim=1).cpu().numpy()

    def swap_near(self, x: torch.Tensor, base: torch.Tensor, t: float, out: torch.Tensor) -> None:
        b, value = base.double(), x.double()
        d = value - b
        out[:] = torch.where(d.abs() <= t, value, b + torch.copysign(torch.full_like(d, t), d))

    def times_rows(self, values: torch.Tensor, row: int, factors: Any, out: torch.Tensor) -> None:
        factor = torch.from_numpy(np.ascontiguousarray(factors)).to(**self._on)
        out[:] = (values.double().view(-1, row) * factor[:, None]).view(-1)

    def take_beyond(
        self, values: torch.Tensor, fence: float, x: torch.Tensor, base: torch.Tensor, out: torch.Tensor
    ) -> int:
        beyond = values.double().abs() >= fence
        out[:] = torch.where(beyond, x, base)
        return int(beyond.sum())


def _magnitudes(values: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values without their signs: int32, in the order of the magnitudes."""
    return values.view(torch.int32) & _MAGNITUDE


def _rounded_to_odd(values: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """float64 -> float32, cut, with a last bit of 1 where something was cut: rounding that again is rounding once."""
    back = nearest.double()
    bits = nearest.view(torch.int32)
    cut = bits - (back.abs() > values.abs()).int()
    return torch.where(back != values, cut | 1, bits).view(torch.float32)


def _strips(values: torch.Tensor, strip: int) -> torch.Tensor:
    """(k, rows, n) -> (k, rows, strips, strip), filled up with zeros."""
    k, rows, n = values.shape
    wide = values.new_zeros(k, rows, -(-n // strip) * strip)
    wide[:, :, :n] = values
    return wide.view(k, rows, -1, strip)


def _folded(products: torch.Tensor) -> torch.Tensor:
    """The sum of each strip (its last dimension) as kernels.fold has it."""
    n = products.shape[-1] // 4
    a, b, c, d = (products[..., i * n : (i + 1) * n] for i in range(4))
    total = (a + b) + (c + d)
    while n > 1:
        n //= 2
        total = total[..., :n] + total[..., n : 2 * n]
    return total[..., 0]


def _sequential(parts: torch.Tensor) -> Any:
    """The sums over the last dimension, one part after the other: float64."""
    return np.cumsum(parts.cpu().numpy(), axis=-1)[..., -1]


def _wide_product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of a b, for numbers of 32 bits in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
