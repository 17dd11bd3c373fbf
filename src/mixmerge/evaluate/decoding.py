"""A batch of prompts through a causal model: read in passes that pad little, then one step at a time for all of them.

Reading wants prompts of one length, a step wants many rows: so prompts are read in passes of their own and stand side by side
in one cache from then on. A row that has ended leaves at once. What is done depends on the prompts and on what they are
answered, and on nothing else, so the same batch gives the same ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from mixmerge.evaluate.batches import plan_batches
from mixmerge.evaluate.engine import GenerationSettings
from mixmerge.evaluate.rows_cache import join, joinable, keep


def reads_apart(model: Any, token: int) -> bool:
    """Whether prompts can be read in passes of their own: the model's cache is one that can be joined."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[token]], device=model.device), use_cache=True, logits_to_keep=1)
    return joinable(output.past_key_values)


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    budget: int,
    passes: tuple[int, int] | None,
    sampled: GenerationSettings | None = None,
    seeds: Sequence[int] = (),
) -> list[list[int]] | None:
    """New ids of each prompt, up to and with one of `ends`, `budget` of them at most; None: logits were NaN.

    Args:
        passes: what one pass costs beside its tokens, in tokens, and the most tokens of one; None: all in one pass.
        sampled: temperature and nucleus, with a seed a prompt; None: greedy.
    """
    device, pad = model.device, min(ends)
    # row -> its prompt: the cache holds them in the order in which they are read
    prompt_of = torch.tensor(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), device=device)
    ordered = [prompts[i] for i in prompt_of.tolist()]
    width = len(ordered[-1])
    new: list[list[int]] = [[] for _ in prompts]
    stops = torch.tensor(sorted(ends), device=device)
    draws = None if sampled is None else _draws(seeds, budget).to(device)
    with torch.inference_mode():
        cache, logits = _read(model, ordered, budget, passes, pad)
        mask = torch.ones((len(prompts), width + budget), dtype=torch.long, device=device)
        mask[:, :width] = _padded(ordered, width, pad, device)[1]
        positions = torch.tensor([len(p) for p in ordered], device=device)
        for step in range(budget):
            best, ids = logits.max(-1)
            if bool(best.isnan().any()):
                return None
            if sampled is not None and draws is not None:
                ids = _sampled(logits, sampled.temperature, sampled.top_p, draws[prompt_of, step])
            for row, token in zip(prompt_of.tolist(), ids.tolist(), strict=True):
                new[row].append(token)
            going = ~torch.isin(ids, stops)
            left = int(going.sum())
            if left == 0 or step + 1 == budget:
                break
            if left < len(going):
                # rows from behind take the places of those that have ended, so that no other is copied
                order = torch.arange(left, device=device)
                holes, sources = (~going[:left]).nonzero()[:, 0], going[left:].nonzero()[:, 0] + left
                order[holes] = sources
                keep(cache, order, holes, sources)
                prompt_of, ids, mask, positions = (rows[order] for rows in (prompt_of, ids, mask, positions))
            output = model(
                input_ids=ids[:, None],
                attention_mask=mask[:, : width + step + 1],
                position_ids=(positions + step)[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]
    return new


def _read(
    model: Any, ordered: Sequence[Sequence[int]], budget: int, passes: tuple[int, int] | None, pad: int
) -> tuple[Any, Any]:
    """A cache with room for the response, and the logits of each prompt's last position; prompts ascend in length."""
    lengths = [len(prompt) for prompt in ordered]
    sizes = [len(ordered)]
    if passes is not None:
        cost, most = passes
        sizes = plan_batches(lengths, len(ordered), lambda rows, length: rows * length <= most, cost)
    caches, logits, start = [], [], 0
    for size in sizes:
        part = ordered[start : start + size]
        ids, mask = _padded(part, len(part[-1]), pad, model.device)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        caches.append(output.past_key_values)
        logits.append(output.logits[:, -1])
        start += size
    cache = caches[0] if passes is None else join(caches, lengths[-1], budget - 1)
    return cache, torch.cat(logits)


def _padded(prompts: Sequence[Sequence[int]], width: int, pad: int, device: Any) -> tuple[Any, Any]:
    """Ids and mask [prompts, width], the prompts on the right."""
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _draws(seeds: Sequence[int], steps: int) -> Any:
    """Numbers in [0, 1), float64 [rows, steps]: a row's are its seed's, whatever stands beside it."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(seed)).random(steps) for seed in seeds]))


def _sampled(logits: Any, temperature: float, top_p: float, draws: Any) -> Any:
    """Ids [rows] from logits [rows, vocabulary]: the draw's place in the cumulated mass of the most probable tokens.

    Nucleus sampling: Holtzman et al. 2020, section 3.1. The fewest tokens whose mass reaches `top_p`, the last one with it.
    """
    mass, ids = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    below = mass.cumsum(-1)
    count = ((below - mass) < top_p).sum(-1, keepdim=True)
    kept = below.gather(-1, count - 1)
    place = (below <= draws[:, None] * kept).sum(-1, keepdim=True)
    return ids.gather(-1, place.minimum(count - 1))[:, 0]
