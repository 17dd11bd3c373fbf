"""Cutting prompts of ascending lengths into batches: the cut with the least padding and the fewest batches together."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def plan_batches(
    lengths: Sequence[int], most: int, fits: Callable[[int, int], bool], cost: int | None = None
) -> list[int]:
    """Sizes of batches for prompts of ascending lengths, each within `most` rows and `fits(rows, longest)`.

    `cost` is what one more batch costs, in tokens of a prompt's pass: the batches are those with the least padding and
    cost together. None: each takes as many as it may. One prompt is a batch in any case: what does not fit is told when
    it is tried.

    >>> plan_batches([1, 1, 2, 5, 9], 3, lambda rows, longest: rows * longest <= 8)
    [3, 1, 1]
    >>> plan_batches([1, 1, 1, 9, 9], 5, lambda rows, longest: True, cost=10)
    [3, 2]
    """
    sizes: list[int] = []
    if cost is None:
        for length in lengths:
            if sizes and sizes[-1] < most and fits(sizes[-1] + 1, length):
                sizes[-1] += 1
            else:
                sizes.append(1)
        return sizes
    least, last = [0], [0]  # of the first prompts: their cost in the best cut, and the size of its last batch
    for end, length in enumerate(lengths, 1):
        least.append(least[end - 1] + length + cost)
        last.append(1)
        for size in range(2, min(most, end) + 1):
            if not fits(size, length):
                break
            if (total := least[end - size] + size * length + cost) < least[end]:
                least[end], last[end] = total, size
    end = len(lengths)
    while end:
        sizes.append(last[end])
        end -= last[end]
    return sizes[::-1]
