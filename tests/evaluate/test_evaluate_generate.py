"""Generation with a real tiny model on disk: the rows, what ends a response, and a killed run that carries on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge.errors import CheckpointError, ModelError
from mixmerge.evaluate.generate import Completion, GenerationSettings, TransformersEngine, generate, read_responses
from mixmerge.evaluate.prompts import Prompt

SETTINGS = GenerationSettings(max_new_tokens=8)


def prompts(count: int, lang: str = "en") -> list[Prompt]:
    """Prompts of many lengths, not in the order of their lengths."""
    texts = [f"{'why ' * (index * 7 % 11)}{index}?" for index in range(count)]
    return [Prompt(f"s/{lang}/p{i}", f"p{i}", "s", lang, "general", "test", text) for i, text in enumerate(texts)]


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def in_float32(model: Path, folder: Path, scale: float = 1.0) -> Path:
    """The same model in float32, where the shape of a batch costs no bits that matter.

    A `scale` above 1 on the matrices makes a random model say something else at every step.
    """
    copy_of(model, folder)
    tensors = {
        name: tensor.float() * (scale if tensor.dim() == 2 else 1)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> TransformersEngine:
    return TransformersEngine(tiny_base, threads=1, device="cpu")


@pytest.fixture(scope="module")
def ending(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """An engine whose end-of-sequence ids are ids that the tiny model often says, so that responses end at many lengths."""
    folder = in_float32(tiny_base, tmp_path_factory.mktemp("ending") / "model", scale=20)
    plain = TransformersEngine(folder, threads=1, device="cpu")
    said = plain._decode(plain._encode([p.text for p in prompts(12)]), 12)
    often = {ids[1 + index % 5] for index, ids in enumerate(said) if len(ids) > 1 + index % 5}
    edit_json(folder / "generation_config.json", eos_token_id=sorted(often)[:6])
    return TransformersEngine(folder, threads=1, device="cpu")


class Scripted:
    """An engine that says its prompt backwards and notes its batches; what stands in a file does not depend on a model."""

    def __init__(self, context: int | None = None, most: int = 10**6) -> None:
        self.context, self.most = context, most
        self.batches: list[list[str]] = []

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def fits(self, rows: int, length: int, settings: GenerationSettings) -> bool:
        return rows * (length + settings.max_new_tokens) <= self.most

    def batch_cost(self, settings: GenerationSettings) -> None:
        return None

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        self.batches.append(list(texts))
        cut = settings.max_new_tokens
        return [Completion(t[::-1][:cut], min(len(t), cut), "length" if len(t) > cut else "stop") for t in texts]


# What is written


def test_every_prompt_gets_one_row_with_its_key_text_tokens_and_finish(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    asked, out = prompts(7), tmp_path / "responses.jsonl"
    report = generate(engine, asked, out, SETTINGS, batch_size=3)
    rows = read_responses(out)
    assert {row["prompt_id"] for row in rows} == {p.id for p in asked}
    assert list(rows[0]) == ["prompt_id", "pid", "set", "lang", "purpose", "split", "text", "tokens", "finish"]
    assert report["rows"] == 7
    assert report["tokens"] == sum(row["tokens"] for row in rows)
    assert report["truncated"] == sum(row["finish"] == "length" for row in rows)
    assert report["empty"] == sum(not row["text"].strip() for row in rows)
    assert (report["too_long"], report["too_long_ids"], report["resumed"]) == (0, [], 0)


def test_the_same_prompts_give_the_same_bytes_again(engine: TransformersEngine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        generate(engine, prompts(9), tmp_path / name, SETTINGS, batch_size=4)
    generate(engine, prompts(9)[::-1], tmp_path / "backwards", SETTINGS, batch_size=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "backwards").read_bytes()


def test_the_batch_size_does_not_change_which_rows_there_are(engine: TransformersEngine, tmp_path: Path) -> None:
    order = {}
    for size in (1, 4, 64):
        generate(engine, prompts(9), tmp_path / str(size), SETTINGS, batch_size=size)
        order[size] = [row["prompt_id"] for row in read_responses(tmp_path / str(size))]
    assert len(set(order[1])) == 9
    assert order[1] == order[4] == order[64]


def test_batches_are_sorted_by_length_so_that_they_pad_little(tmp_path: Path) -> None:
    engine = Scripted()
    generate(engine, prompts(10), tmp_path / "out", SETTINGS, batch_size=4)
    lengths = [[len(text) for text in batch] for batch in engine.batches]
    assert [len(batch) for batch in lengths] == [4, 4, 2]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat)


def test_progress_counts_rows_up_to_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate(Scripted(), prompts(5), tmp_path / "out", SETTINGS, batch_size=2, progress=lambda *now: seen.append(now))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_no_prompts_make_an_empty_file(tmp_path: Path) -> None:
    assert generate(Scripted(), [], tmp_path / "out", SETTINGS)["rows"] == 0
    assert read_responses(tmp_path / "out") == []


def test_any_text_survives_the_file(tmp_path: Path) -> None:
    odd = 'line\u2028separator\u0085next\r\nline\t\x00nul \ufffd <end_of_turn> {"a": 1} नमस्ते \U0001f600'
    asked = [Prompt("s/en/p", "p", "s", "en", "harmful", "dev", odd)]
    generate(Scripted(), asked, tmp_path / "out", GenerationSettings(max_new_tokens=500))
    assert [row["text"] for row in read_responses(tmp_path / "out")] == [odd[::-1]]
    assert generate(Scripted(), asked, tmp_path / "out", SETTINGS)["resumed"] == 1


def test_a_prompt_too_long_for_the_context_is_named_and_never_cut(tmp_path: Path) -> None:
    asked = prompts(6)
    longest = max(asked, key=lambda p: len(p.text))
    engine = Scripted(context=len(longest.text) + SETTINGS.max_new_tokens - 1)
    report = generate(engine, asked, tmp_path / "out", SETTINGS, batch_size=2)
    assert (report["rows"], report["too_long"], report["too_long_ids"]) == (6, 1, [longest.id])
    (row,) = [row for row in read_responses(tmp_path / "out") if row["prompt_id"] == longest.id]
    assert (row["text"], row["tokens"], row["finish"]) == ("", 0, "too_long")
    assert all(longest.text not in batch for batch in engine.batches)
    roomy = Scripted(context=len(longest.text) + SETTINGS.max_new_tokens)
    assert generate(roomy, asked, tmp_path / "roomy", SETTINGS)["too_long"] == 0


def test_the_real_engine_knows_its_context(engine: TransformersEngine, tmp_path: Path) -> None:
    assert engine.context == 512
    asked = [*prompts(2), Prompt("s/en/long", "long", "s", "en", "general", "test", "why " * 600)]
    assert generate(engine, asked, tmp_path / "out", SETTINGS)["too_long_ids"] == ["s/en/long"]


def test_settings_and_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size"):
        generate(Scripted(), prompts(2), tmp_path / "out", SETTINGS, batch_size=0)
    with pytest.raises(ValueError, match="one id"):
        generate(Scripted(), prompts(2) * 2, tmp_path / "out", SETTINGS)


# Carrying on


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 8, 9, 10])
@pytest.mark.parametrize("torn", [b"", b'{"prompt_id": "s/en', b'{"prompt_id": "s/en/p1", "text": "caf\xc3'])
def test_a_file_cut_anywhere_is_carried_on_to_the_same_bytes(tmp_path: Path, kept: int, torn: bytes) -> None:
    whole = tmp_path / "whole"
    generate(Scripted(), prompts(10), whole, SETTINGS, batch_size=4)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.write_bytes(b"".join(lines[:kept]) + torn)
    engine = Scripted()
    report = generate(engine, prompts(10), cut, SETTINGS, batch_size=4)
    assert cut.read_bytes() == whole.read_bytes()
    found = 10 if kept == 10 else kept // 4 * 4
    assert report["resumed"] == found
    assert sum(map(len, engine.batches)) == 10 - found
    assert {k: v for k, v in report.items() if k != "resumed"} == {
        k: v for k, v in generate(Scripted(), prompts(10), whole, SETTINGS, batch_size=4).items() if k != "resumed"
    }


@pytest.mark.parametrize("place", [*range(0, 500, 23), -1])
def test_a_batch_in_which_a_bit_has_flipped_is_answered_again_with_what_follows(tmp_path, caplog, place):
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate(Scripted(), prompts(10), whole, SETTINGS, batch_size=3)
    interrupted(out, after=6)
    data = bytearray(out.read_bytes())
    data[place % len(data)] ^= 4
    out.write_bytes(data)
    lengths = [len(line) + 1 for line in whole.read_bytes().split(b"\n")]
    kept = 3 * (place % len(data) >= sum(lengths[:3]))  # -1: the end of the last line
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3)["resumed"] == kept
    assert out.read_bytes() == whole.read_bytes()
    (message,) = caplog.messages
    assert message == f"{out}: batch {kept // 3 + 1} has changed since it was written: answered again from there on"


@pytest.mark.parametrize(("digests", "resumed"), [(1, 3), (0, 0)])
def test_a_batch_whose_digest_a_kill_left_unwritten_is_answered_again(tmp_path, caplog, digests, resumed):
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate(Scripted(), prompts(10), whole, SETTINGS, batch_size=3)
    interrupted(out, after=6)
    plan = tmp_path / "out.batches"
    lines = plan.read_text().splitlines(keepends=True)
    assert len(lines) == 3, "the sizes and a digest for each batch that is there"
    plan.write_text("".join(lines[: 1 + digests]))
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3)["resumed"] == resumed
    assert out.read_bytes() == whole.read_bytes()
    assert caplog.messages == []


def test_a_plan_of_the_callers_stays_and_tells_of_rows_that_change_after_the_last(tmp_path, caplog):
    whole, out, plan = tmp_path / "whole", tmp_path / "out", tmp_path / "plan"
    generate(Scripted(), prompts(10), whole, SETTINGS, batch_size=3)
    generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3, plan=plan)
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3, plan=plan)["resumed"] == 10
    data = bytearray(out.read_bytes())
    data[-30] ^= 2
    out.write_bytes(data)
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3, plan=plan)["resumed"] == 9
    assert out.read_bytes() == whole.read_bytes()
    plan.unlink()
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3, plan=plan)["resumed"] == 0
    assert len(caplog.messages) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "plan"}


def interrupted(out: Path, *, after: int) -> None:
    """Answer so many of ten prompts, three at a time."""

    def stop(done: int, _: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3, progress=stop)


def test_carrying_on_with_another_batch_size_keeps_what_is_whole_and_completes_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(Scripted(), prompts(10), out, SETTINGS, batch_size=4)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:8]))
    assert generate(Scripted(), prompts(10), out, SETTINGS, batch_size=3)["resumed"] == 6
    assert out.read_bytes() == whole


def test_zeros_in_place_of_the_last_row_are_made_again(tmp_path: Path) -> None:
    """A machine that loses power may leave a hole where the last write was."""
    out = tmp_path / "out"
    generate(Scripted(), prompts(6), out, SETTINGS, batch_size=2)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + b"\0" * (len(lines[5]) - 1) + b"\n")
    assert generate(Scripted(), prompts(6), out, SETTINGS, batch_size=2)["resumed"] == 4
    assert out.read_bytes() == whole


def test_a_file_of_other_prompts_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(Scripted(), prompts(4, "fr"), out, SETTINGS)
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match=r"out:1: row of 's/fr/p0', expected 's/en/p0'"):
        generate(Scripted(), prompts(4), out, SETTINGS)
    with pytest.raises(CheckpointError, match="4 rows for 0 prompts"):
        generate(Scripted(), [], out, SETTINGS)
    assert out.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{]\n", b'{"text": "no id"}\n', b"3\n", b"\xff\xfe\n"])
def test_damage_before_the_last_row_is_an_error_with_its_row(tmp_path: Path, damage: bytes) -> None:
    out = tmp_path / "out"
    generate(Scripted(), prompts(4), out, SETTINGS, batch_size=2)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + damage + b"".join(lines[2:]))
    with pytest.raises(CheckpointError, match=r"out:2: not a response row"):
        generate(Scripted(), prompts(4), out, SETTINGS, batch_size=2)
    with pytest.raises(CheckpointError, match=r"out:2: not a response row"):
        read_responses(out)


def test_a_torn_file_cannot_be_read_as_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(Scripted(), prompts(3), out, SETTINGS)
    out.write_bytes(out.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"out:3: a torn row"):
        read_responses(out)


KILLED = """
import sys, time
from pathlib import Path
from test_evaluate_generate import SETTINGS, prompts
from mixmerge.evaluate.generate import TransformersEngine, generate
engine = TransformersEngine(Path(sys.argv[1]), threads=1, device="cpu")
slowly = lambda done, _: time.sleep(1 if done >= 6 else 0)
generate(engine, prompts(60), Path(sys.argv[2]), SETTINGS, batch_size=2, progress=slowly)
"""


def test_a_killed_process_is_carried_on_to_the_rows_of_one_that_was_not(
    engine: TransformersEngine, tiny_base: Path, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", KILLED, tiny_base, killed], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 120
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = killed.read_bytes().count(b"\n")
    assert 6 <= found < 60
    assert 6 <= generate(engine, prompts(60), killed, SETTINGS, batch_size=2)["resumed"] <= found
    generate(engine, prompts(60), whole, SETTINGS, batch_size=2)
    assert killed.read_bytes() == whole.read_bytes()


# The engine


def test_greedy_decoding_gives_the_ids_that_transformers_gives(ending: TransformersEngine) -> None:
    """Rows leave the batch as they end; transformers keeps them and pads. Both say the same."""
    from transformers import GenerationConfig

    encoded = ending._encode([p.text for p in prompts(12)])
    ours = ending._decode(encoded, 12)
    assert len({len(ids) for ids in ours}) >= 3, "the responses must end at different lengths"
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=sorted(ending.eos), pad_token_id=0)
    for prompt, found in zip(encoded, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = ending.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found == theirs[0, len(prompt) :].tolist()


def test_padding_and_company_do_not_change_a_response(tiny_base: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(in_float32(tiny_base, tmp_path / "fp32"), threads=1, device="cpu")
    texts = [p.text for p in prompts(9)]
    together = engine.complete(texts, SETTINGS)
    assert together == [engine.complete([text], SETTINGS)[0] for text in texts]


def test_a_sliding_window_and_a_shrinking_batch_agree_with_transformers(tmp_path: Path, tiny_base: Path) -> None:
    """Gemma 3 keeps a window in most layers; its cache must lose the rows that have ended, too."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    folder = copy_of(tiny_base, tmp_path / "gemma")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink()
    vocabulary = len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
        eos_token_id=4,
    )
    torch.manual_seed(1)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    engine = TransformersEngine(folder, threads=1, device="cpu")
    encoded = engine._encode([p.text for p in prompts(8)])
    said = engine._decode(encoded, 10)
    engine.eos |= {said[0][2], said[3][4], said[5][6]}
    ours = engine._decode(encoded, 10)
    assert len({len(ids) for ids in ours}) >= 2
    settings = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=sorted(engine.eos), pad_token_id=0)
    for prompt, found in zip(encoded, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = engine.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert found == theirs[0, len(prompt) :].tolist()


def test_a_response_stops_at_any_end_id_and_is_written_without_it(ending: TransformersEngine) -> None:
    completions = ending.complete([p.text for p in prompts(12)], GenerationSettings(max_new_tokens=12))
    stopped = [c for c in completions if c.finish == "stop"]
    assert stopped
    assert all(c.tokens < 12 for c in stopped)
    assert all(c.tokens == 12 for c in completions if c.finish == "length")


def test_the_end_of_a_turn_is_read_off_the_template_where_the_config_does_not_name_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    """A base model names its end of text only; the turn ends with what its template puts after an answer."""
    folder = copy_of(tiny_base, tmp_path / "base")
    edit_json(folder / "generation_config.json", eos_token_id=2)
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    engine = TransformersEngine(folder, threads=1, device="cpu")
    end_of_turn = engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert engine.eos == {2, end_of_turn}


def test_the_prompt_goes_through_the_template_with_a_generation_prompt(engine: TransformersEngine) -> None:
    (ids,) = engine._encode(["Why?"])
    assert engine.tokenizer.decode(ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert engine.lengths(["Why?"]) == [len(ids)]


def test_special_tokens_stay_out_of_the_text(tiny_base: Path, tmp_path: Path) -> None:
    """A model that says nothing but a special token says nothing."""
    folder = copy_of(tiny_base, tmp_path / "special")
    engine = TransformersEngine(folder, threads=1, device="cpu")
    start = engine.tokenizer.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        # the same hidden direction for every position, and one row of the head along it
        engine.model.model.norm.weight.zero_()
        head = torch.nn.Linear(32, len(engine.tokenizer), bias=True, dtype=torch.bfloat16)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[start] = 1
        engine.model.lm_head = head
    (completion,) = engine.complete(["Why?"], SETTINGS)
    assert (completion.text, completion.tokens, completion.finish) == ("", 8, "length")


def test_weights_are_in_the_dtype_that_is_asked_for_or_that_this_machine_is_quick_with(
    engine: TransformersEngine, tiny_base: Path, tmp_path: Path
) -> None:
    """A 16-bit checkpoint is float32 on a CPU that has no instructions for it; float16 is on every CPU."""
    quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert engine.model.dtype == (torch.bfloat16 if quick else torch.float32)
    for dtype in ("bfloat16", "float32"):
        asked = TransformersEngine(tiny_base, threads=1, device="cpu", dtype=dtype)
        assert asked.model.dtype == getattr(torch, dtype)
        assert all(c.text for c in asked.complete(["Why?"], SETTINGS))
    folder = copy_of(tiny_base, tmp_path / "fp16")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="float16")
    assert TransformersEngine(folder, threads=1, device="cpu").model.dtype == torch.float32


def test_sampling_settings_of_the_folder_are_not_used(
    engine: TransformersEngine, tiny_base: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_base, tmp_path / "sampling")
    edit_json(folder / "generation_config.json", do_sample=True, temperature=5.0, top_k=5, repetition_penalty=3.0)
    texts = [p.text for p in prompts(4)]
    assert TransformersEngine(folder, threads=1, device="cpu").complete(texts, SETTINGS) == engine.complete(
        texts, SETTINGS
    )


# Folders that cannot be used


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        TransformersEngine(tmp_path)


def test_pickled_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no .*safetensors file"):
        TransformersEngine(folder, device="cpu")


def test_a_folder_without_a_chat_template_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        TransformersEngine(folder, device="cpu")


def test_missing_weights_are_refused_and_not_drawn_at_random(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "missing")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"weights that config.json describes are missing: 1, 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        TransformersEngine(folder, device="cpu")


def test_a_damaged_weight_file_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        TransformersEngine(folder, device="cpu")


def test_weights_that_give_nan_are_an_error_and_not_a_response(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        TransformersEngine(folder, threads=1, device="cpu").complete(["Why?"], SETTINGS)


def test_remote_code_is_not_run(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "remote")
    proof = tmp_path / "proof"
    (folder / "modeling_evil.py").write_text(f"open({str(proof)!r}, 'w').write('ran')\nclass Evil: ...\n")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert TransformersEngine(folder, threads=1, device="cpu").complete(["Why?"], SETTINGS)
    assert not proof.exists()
