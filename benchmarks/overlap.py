"""Near duplicates against comparing everything with everything: time as a ratio, recall of planted ones.

    python benchmarks/overlap.py --data ../shared/data --rows 10000 --prompts 5000 --sample 500

Takes real training rows and prompts from `--data` where it is there, else texts of random words in four scripts. Plants a
changed copy of 500 prompts among the rows (some words left out, put in or exchanged), finds near duplicates in all of them,
and compares with the naive all-pairs Jaccard on a sample of rows x prompts. Prints; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from mixmerge.data.near import jaccard, near_duplicates, shingles, signatures
from mixmerge.data.overlap import normalised

ALPHABETS = [(0x61, 26), (0x905, 50), (0x627, 36), (0x430, 32)]  # Latin, Devanagari, Arabic, Cyrillic
TRAIN = ["general/sft_train.jsonl", "safety/sft_train.jsonl"]
PROMPTS = ["eval/general_open_prompts.jsonl", "eval/safety_harmful_prompts.jsonl", "eval/general_qa.jsonl"]


def read(data: Path, files: list[str], count: int, chance: random.Random) -> list[str]:
    """Up to `count` prompts of the pack, or made-up ones."""
    if not all((data / name).is_file() for name in files):
        return [made_up(chance) for _ in range(count)]
    lines = [line for name in files for line in (data / name).read_text(encoding="utf-8").splitlines()]
    chance.shuffle(lines)
    return list(dict.fromkeys(normalised(json.loads(line)["prompt"]) for line in lines))[:count]


def made_up(chance: random.Random) -> str:
    first, letters = chance.choice(ALPHABETS)
    words = chance.randrange(8, 60)
    return " ".join(
        "".join(chr(first + chance.randrange(letters)) for _ in range(chance.randrange(2, 9))) for _ in range(words)
    )


def changed(text: str, chance: random.Random) -> str:
    """The text with one word in twelve left out, doubled or exchanged with the next."""
    words = text.split(" ")
    for _ in range(max(1, len(words) // 12)):
        at = chance.randrange(len(words))
        kind = chance.randrange(3)
        if kind == 0 and len(words) > 1:
            del words[at]
        elif kind == 1:
            words.insert(at, words[at])
        else:
            words[at : at + 2] = reversed(words[at : at + 2])
    return " ".join(words)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=5_000)
    parser.add_argument("--sample", type=int, default=500)
    parser.add_argument("--threshold", type=float, default=0.8)
    options = parser.parse_args()
    chance = random.Random(0)
    prompts = read(options.data, PROMPTS, options.prompts, chance)
    rows = read(options.data, TRAIN, options.rows, chance)
    planted = chance.sample(range(len(prompts)), 500)
    copies = [changed(prompts[index], chance) for index in planted]
    rows[-500:] = copies
    print(f"{len(rows):,} rows ({sum(map(len, rows)):,} characters), {len(prompts):,} prompts")

    signing = timed(lambda: (signatures(rows), signatures(prompts)))
    found: list[tuple[int, int, float]] = []
    whole = timed(lambda: found.extend(near_duplicates(rows, prompts, options.threshold)))
    print(f"near duplicates: {whole:.2f} s, of which signatures {signing:.2f} s; {len(found):,} pairs")

    pairs = {(i, j) for i, j, _ in found}
    likeness = [jaccard(shingles(copy), shingles(prompts[j])) for copy, j in zip(copies, planted, strict=True)]
    first = len(rows) - 500
    above = [k for k, value in enumerate(likeness) if value >= options.threshold]
    recalled = sum((first + k, planted[k]) in pairs for k in above)
    print(
        f"planted: {len(above)} of 500 are at or above {options.threshold}; recall {recalled / max(1, len(above)):.4f}"
    )

    some_rows = chance.sample(range(len(rows)), options.sample)
    some_prompts = chance.sample(range(len(prompts)), options.sample)
    truth: list[tuple[int, int]] = []

    def naive() -> None:
        sets = {j: shingles(prompts[j]) for j in some_prompts}
        for i in some_rows:
            own = shingles(rows[i])
            truth.extend((i, j) for j, other in sets.items() if jaccard(own, other) >= options.threshold)

    seconds = timed(naive) * (len(rows) / options.sample) * (len(prompts) / options.sample)
    print(
        f"all pairs, from a sample of {options.sample} x {options.sample}: {seconds:,.0f} s, {seconds / whole:,.0f} times as long"
    )
    print(
        f"in the sample: {len(truth)} pairs at or above the threshold, {sum(pair in pairs for pair in truth)} of them found"
    )


if __name__ == "__main__":
    main()
