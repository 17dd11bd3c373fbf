"""How prompts are cut into batches: bounded by tokens and memory, kept over a kill, and without a say in what is sampled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.generate import GenerationSettings, TransformersEngine, generate, plan_batches, read_responses
from mixmerge.evaluate.prompts import Prompt
from mixmerge.kept import sealed, unsealed

SETTINGS = GenerationSettings(max_new_tokens=4)
SAMPLED = GenerationSettings(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=1)


def prompts(count: int) -> list[Prompt]:
    texts = [f"{'why ' * (index * 7 % 23)}{index}?" for index in range(count)]
    return [Prompt(f"s/en/p{i}", f"p{i}", "s", "en", "general", "test", text) for i, text in enumerate(texts)]


def said(folder: Path) -> dict[str, str]:
    return {row["prompt_id"]: row["text"] for row in read_responses(folder)}


@pytest.fixture(scope="module")
def talker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float32, with matrices so large that it says something else at every step."""
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("talker") / "model"))
    weights = folder / "model.safetensors"
    tensors = {name: tensor.float() * (8 if tensor.dim() == 2 else 1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(talker: Path) -> TransformersEngine:
    return TransformersEngine(talker, threads=1, device="cpu")


# The plan


def padded(lengths: list[int], sizes: list[int]) -> int:
    """Tokens of all prompts' passes, padding among them."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return sum(size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True))


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 9), st.integers(1, 2000), st.integers(0, 500))
def test_batches_that_weigh_their_padding_cost_no_more_than_the_largest_or_the_smallest(
    lengths: list[int], most: int, tokens: int, cost: int
) -> None:
    lengths.sort()

    def fits(rows: int, longest: int) -> bool:
        return rows * longest <= tokens

    sizes = plan_batches(lengths, most, fits, cost)
    assert sum(sizes) == len(lengths)
    start = 0
    for size in sizes:
        assert size == 1 or (size <= most and fits(size, lengths[start + size - 1]))
        start += size
    paid = padded(lengths, sizes) + cost * len(sizes)
    for other in (plan_batches(lengths, most, fits), [1] * len(lengths)):
        assert paid <= padded(lengths, other) + cost * len(other)


def test_a_dear_batch_takes_what_it_may_and_a_free_one_pads_nothing() -> None:
    lengths = [1, 1, 2, 2, 2, 50]
    assert plan_batches(lengths, 9, lambda rows, longest: True, 10**6) == [6]
    assert plan_batches(lengths, 9, lambda rows, longest: True, 60) == [5, 1]
    assert padded(lengths, plan_batches(lengths, 9, lambda rows, longest: True, 0)) == sum(lengths)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 9), st.integers(1, 2000))
def test_batches_keep_to_both_bounds_and_none_could_take_one_more(lengths: list[int], most: int, tokens: int) -> None:
    lengths.sort()

    def fits(rows: int, longest: int) -> bool:
        return rows * longest <= tokens

    sizes = plan_batches(lengths, most, fits)
    assert sum(sizes) == len(lengths)
    start = 0
    for size in sizes:
        assert 1 <= size <= most
        assert size == 1 or fits(size, lengths[start + size - 1])
        following = start + size
        if following < len(lengths):
            assert size == most or not fits(size + 1, lengths[following])
        start = following


def test_a_batch_is_bounded_by_tokens_and_by_bytes_and_not_only_by_rows(talker: Path, tmp_path: Path) -> None:
    asked = prompts(23)
    free = TransformersEngine(talker, threads=1, device="cpu")
    lengths = sorted(free.lengths([p.text for p in asked]))
    few = TransformersEngine(talker, threads=1, device="cpu", batch_tokens=200)
    poor = TransformersEngine(talker, threads=1, device="cpu", memory=free.batch_bytes(2, lengths[-1], SETTINGS))
    for bounded, most in ((few, lambda rows, width: rows * (width + 4) <= 200), (poor, lambda rows, width: True)):
        sizes = plan_batches(lengths, 64, lambda rows, longest, e=bounded: e.fits(rows, longest, SETTINGS), 10**6)
        assert len(sizes) > 2
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        assert all(most(size, lengths[end - 1]) for size, end in zip(sizes, ends, strict=True))
        assert sizes[-1] < max(sizes), "the longest prompts stand in smaller batches"
    assert free.fits(23, lengths[-1], SETTINGS)
    for name, other in (("free", free), ("few", few), ("poor", poor)):
        generate(other, asked, tmp_path / name, SETTINGS, batch_size=64)
    assert said(tmp_path / "free") == said(tmp_path / "few") == said(tmp_path / "poor")


def test_the_estimate_of_bytes_grows_with_all_that_a_batch_holds(engine: TransformersEngine) -> None:
    plain = engine.batch_bytes(4, 20, SETTINGS)
    assert engine.batch_bytes(8, 20, SETTINGS) == 2 * plain
    assert engine.batch_bytes(4, 40, SETTINGS) > plain
    assert engine.batch_bytes(4, 20, GenerationSettings(max_new_tokens=40)) > plain
    assert engine.batch_bytes(4, 20, GenerationSettings(max_new_tokens=4, temperature=1)) > plain
    # two layers and one more, one head of 16 numbers, keys and values, 24 tokens of 4 bytes, 4 rows: the cache alone
    assert plain > 4 * 2 * 3 * 16 * 24 * 4


def test_a_file_is_carried_on_in_the_batches_that_it_was_begun_with(talker: Path, tmp_path: Path) -> None:
    """Also on a machine that would cut them otherwise."""
    small = TransformersEngine(talker, threads=1, device="cpu", batch_tokens=120)
    large = TransformersEngine(talker, threads=1, device="cpu")
    asked, out, whole = prompts(30), tmp_path / "out", tmp_path / "whole"
    generate(small, asked, whole, SETTINGS)
    lengths = sorted(small.lengths([p.text for p in asked]))
    cost = small.batch_cost(SETTINGS)
    plan = plan_batches(lengths, 32, lambda rows, width: small.fits(rows, width, SETTINGS), cost)

    def stop(done: int, _: int) -> None:
        if done >= plan[0] + plan[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(small, asked, out, SETTINGS, progress=stop)
    begun = out.with_name("out.batches")
    assert unsealed(begun.read_text(encoding="utf-8").partition("\n")[0]) == plan
    with out.open("ab") as file:
        file.write(b'{"prompt_id": "s/en')
    assert generate(large, asked, out, SETTINGS)["resumed"] == plan[0] + plan[1]
    assert out.read_bytes() == whole.read_bytes()
    assert not begun.exists()


@pytest.mark.parametrize("damage", ["[1, 2", "[3, 7]", '{"a": 1}', "", "null", "\x00\x00"])
def test_a_plan_that_has_changed_is_told_of_and_all_is_answered_again(
    engine: TransformersEngine, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tmp_path / "out.batches"
    generate(engine, prompts(10), tmp_path / "whole", SETTINGS)
    (tmp_path / "out").write_bytes((tmp_path / "whole").read_bytes().replace(b"text", b"test"))
    plan.write_text(damage, encoding="utf-8")
    assert generate(engine, prompts(10), tmp_path / "out", SETTINGS)["resumed"] == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert caplog.messages == [f"{plan} has changed since it was written: all is answered again"]


def test_a_plan_of_other_prompts_is_named_and_nothing_is_made(engine: TransformersEngine, tmp_path: Path) -> None:
    (tmp_path / "out.batches").write_text(sealed([3, 4]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"out\.batches: not the batches of 10 prompts; delete it and out"):
        generate(engine, prompts(10), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


# Memory that ends

SHORT = """
import json, resource, sys
from pathlib import Path
from mixmerge.evaluate.generate import GenerationSettings, TransformersEngine
engine = TransformersEngine(Path(sys.argv[1]), threads=1, device="cpu", dtype="float32")
settings = GenerationSettings(max_new_tokens=60)
texts = [f"{number} " + "why " * 60 for number in range(256)]
roomy, before = engine.complete(texts, settings), engine.halved
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
narrow, halved = engine.complete(texts, settings), engine.halved
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([before, halved, [c.text for c in roomy], [c.text for c in narrow]]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds the address space by Linux's means")
def test_a_batch_that_memory_cannot_hold_is_halved_until_it_fits(talker: Path) -> None:
    """A real process whose memory is bounded by the system, after it has been shown what it would say otherwise.

    What is freed goes back to the system at once, so that the bound is on what the batch takes: 26 MB as a whole.
    """
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", SHORT, talker, "18"],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=os.environ | returned,
    )
    assert done.returncode == 0, done.stderr
    before, halved, roomy, narrow = json.loads(done.stdout)
    assert (before, len(roomy)) == (0, 256)
    assert halved >= 1
    assert narrow == roomy


# Sampling


def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_batch(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    for name, size, asked in (("all", 64, prompts(12)), ("five", 5, prompts(12)[::-1]), ("alone", 1, prompts(12))):
        generate(engine, asked, tmp_path / name, SAMPLED, batch_size=size)
    assert said(tmp_path / "all") == said(tmp_path / "five") == said(tmp_path / "alone")
    other = GenerationSettings(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=2)
    generate(engine, prompts(12), tmp_path / "other", other)
    differ = [key for key, text in said(tmp_path / "other").items() if text != said(tmp_path / "all")[key]]
    assert len(differ) > 6


def test_samples_follow_the_probabilities_within_the_nucleus(engine: TransformersEngine) -> None:
    """The first token of many seeds beside the softmax: a chi-squared of what is within the 0.8 most probable."""
    temperature, top_p, count = 1.5, 0.8, 4000
    (prompt,) = engine._encode(["Why?"])
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt])).logits[0, -1].double()
    mass, ids = (logits / temperature).softmax(-1).sort(descending=True)
    kept = int(((mass.cumsum(-1) - mass) < top_p).sum())
    expected = dict(zip(ids[:kept].tolist(), (mass[:kept] / mass[:kept].sum() * count).tolist(), strict=True))
    settings = GenerationSettings(max_new_tokens=1, temperature=temperature, top_p=top_p)
    drawn: Counter[int] = Counter()
    for start in range(0, count, 500):
        for (token,) in engine._decode([prompt] * 500, 1, settings, range(start, start + 500)):
            drawn[token] += 1
    assert set(drawn) <= set(expected)
    frequent = [token for token in expected if expected[token] >= 5]
    squares = sum((drawn[token] - expected[token]) ** 2 / expected[token] for token in frequent)
    freedom = len(frequent)
    # fixed seeds, so this is no gamble; 5 deviations of a chi-squared of so many degrees
    assert squares < freedom + 5 * (2 * freedom) ** 0.5
    assert len(frequent) > 3


def test_a_cold_or_narrow_sample_is_the_greedy_answer(engine: TransformersEngine) -> None:
    texts = [p.text for p in prompts(6)]
    greedy = engine.complete(texts, SETTINGS)
    assert engine.complete(texts, GenerationSettings(max_new_tokens=4, temperature=1e-4)) == greedy
    assert engine.complete(texts, GenerationSettings(max_new_tokens=4, temperature=5, top_p=1e-9)) == greedy


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}])
def test_sampling_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GenerationSettings(**wrong)
