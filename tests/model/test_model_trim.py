"""Trimming a model: the rows that stay, the ids that move, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mixmerge.errors import CheckpointError, ModelError, UserError
from mixmerge.model.tokens import BpeTokenizer
from mixmerge.model.trim import choose_tokens, trim_vocabulary
from mixmerge.model.words import LanguageWords

COVERED = "The people of the world"


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_qwen", "tiny_llama"])
def test_covered_text_gets_the_same_logits_for_the_kept_tokens(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(kind)
    size = len(BpeTokenizer.read(source).always_kept()) + 600
    report = trim_vocabulary(source, tmp_path / "out", languages=["en"], size=size)
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    before, after = _logits(source, old(COVERED).input_ids), _logits(tmp_path / "out", new(COVERED).input_ids)
    assert old.convert_ids_to_tokens(old(COVERED).input_ids) == new.convert_ids_to_tokens(new(COVERED).input_ids)
    rows = [old.convert_tokens_to_ids(token) for token in new.convert_ids_to_tokens(range(len(new)))]
    assert after.shape[-1] == size == report.tokens_after == len(new)
    torch.testing.assert_close(after, before[..., rows])


def test_weight_files_without_rows_are_hard_linked_and_the_index_is_rewritten(tiny_qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = trim_vocabulary(tiny_qwen, out, languages=["en"], size=1000)
    files = sorted(out.glob("*.safetensors"))
    shared = [file.name for file in files if file.samefile(tiny_qwen / file.name)]
    assert shared == ["model-00002-of-00003.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report.parameters_after == sum(tensor.numel() for tensor in tensors.values())
    assert report.parameters_before - report.parameters_after == 2 * 16 * (2003 + 13 - 1000)


def test_special_ids_move_in_both_configurations(tiny_qwen: Path, tmp_path: Path) -> None:
    generation = json.loads((tiny_qwen / "generation_config.json").read_text())
    old = Tokenizer.from_file(str(tiny_qwen / "tokenizer.json"))
    rare = _last_learned(tiny_qwen)
    generation |= {
        "eos_token_id": [old.token_to_id("<|endoftext|>"), old.token_to_id("<|im_end|>")],
        "suppress_tokens": [old.token_to_id("<|im_start|>"), rare],
        "forced_bos_token_id": None,
    }
    (tiny_qwen / "generation_config.json").write_text(json.dumps(generation))
    trim_vocabulary(tiny_qwen, tmp_path / "out", languages=["en"], size=400)
    new = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert written.eos_token_id == [new.token_to_id("<|endoftext|>"), new.token_to_id("<|im_end|>")]
    assert written.suppress_tokens == [new.token_to_id("<|im_start|>")]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 400
    assert config["bos_token_id"] == config["pad_token_id"] == new.token_to_id("<|endoftext|>")


def test_a_token_that_a_configuration_names_is_kept(tiny_qwen: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_qwen / "config.json").read_text())
    rare = _last_learned(tiny_qwen)
    token = Tokenizer.from_file(str(tiny_qwen / "tokenizer.json")).id_to_token(rare)
    (tiny_qwen / "config.json").write_text(json.dumps({**config, "image_token_index": rare}))
    trim_vocabulary(tiny_qwen, tmp_path / "out", languages=["en"], size=400)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).id_to_token(named) == token


def test_the_unchanged_share_is_what_encoding_the_words_again_gives(tiny_gpt2: Path, tmp_path: Path) -> None:
    report = trim_vocabulary(tiny_gpt2, tmp_path / "out", languages=["en", "fr"], size=900)
    assert set(report.unchanged) == {"en", "fr"}
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tiny_gpt2, tmp_path / "out"))
    from wordfreq import get_frequency_dict

    words = get_frequency_dict("fr", wordlist="best")
    top = sorted(words, key=lambda word: (-words[word], word))[:3000]
    same = sum(words[word] for word in top if old.encode(f" {word}").tokens == new.encode(f" {word}").tokens)
    assert report.unchanged["fr"] == pytest.approx(same / sum(words[word] for word in top), abs=0.05)


def test_a_language_that_is_behind_chooses_before_one_that_is_ahead(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2)
    start = tokenizer.always_kept()
    free = [number for number in sorted(tokenizer.tokens) if not (tokenizer.needed_by(number) - {number} - start)]
    free = [number for number in free if number not in start][:75]
    behind = LanguageWords("behind", [(number,) for number in free[:50]], [0.02] * 50)
    ahead = LanguageWords("ahead", [(min(start),), *((number,) for number in free[50:])], [0.5, *[0.02] * 25])
    kept = choose_tokens(tokenizer, start, [behind, ahead], len(start) + 30)
    assert behind.covered_by(kept) == pytest.approx(0.55, abs=0.011)  # 25 tokens to draw level, then every second one
    assert ahead.covered_by(kept) == pytest.approx(0.55, abs=0.011)


def test_a_token_that_many_words_use_comes_before_one_that_few_use(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2)
    start = tokenizer.always_kept()
    high = max(number for number in tokenizer.tokens if number not in start)
    low = min(number for number in tokenizer.tokens if number not in start)
    words = LanguageWords("xx", [(high,), (low,)], [0.9, 0.1])
    kept = choose_tokens(tokenizer, start, [words], len(start) + len(tokenizer.needed_by(high)))
    assert kept == start | tokenizer.needed_by(high)


def test_a_small_part_of_the_room_goes_to_punctuation_which_word_lists_lack(tiny_llama: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_llama)
    start = tokenizer.always_kept()
    comma = next(tokenizer.without_letters())
    marks = [number for number in tokenizer.without_letters() if number not in start]
    kept = choose_tokens(tokenizer, start, [LanguageWords("xx", [(comma,)], [1.0])], len(start) + 200)
    assert kept & set(marks) >= set(marks[:2])


def test_room_that_words_leave_over_goes_to_the_lowest_ids(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2)
    start = tokenizer.always_kept()
    lowest = [number for number in sorted(tokenizer.tokens) if number not in start][:5]
    kept = choose_tokens(tokenizer, start, [LanguageWords("xx", [(0,)], [1.0])], len(start) + 5)
    assert kept - start == set(lowest)


def test_progress_counts_languages_and_weight_files(tiny_qwen: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    trim_vocabulary(
        tiny_qwen, tmp_path / "out", languages=["en", "hi"], size=900, progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(done, 5) for done in range(6)]


def test_a_size_below_the_tokens_that_must_stay_names_the_least_one(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size 200 is too small: 259 .* must stay; give a size of 259 or more"):
        trim_vocabulary(tiny_gpt2, tmp_path / "out", languages=["en"], size=200)
    report = trim_vocabulary(tiny_gpt2, tmp_path / "out", languages=["en"], size=259)
    assert report.tokens_after == 259


def test_a_size_that_trims_nothing_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size 2003 is not below the 2003 tokens there are"):
        trim_vocabulary(tiny_gpt2, tmp_path / "out", languages=["en"], size=2003)


def test_an_unknown_language_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'en'"):
        trim_vocabulary(tmp_path / "absent", tmp_path / "out", languages=["eng"], size=1000)


def _missing_ids(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 50256}))


def _bad_words(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"bad_words_ids": [[1, 2]]}))


def _no_vocabulary_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))


def _small_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1999}))


def _strange_rows(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "memory.table": torch.zeros(2003, 3)}, folder / "model.safetensors")


def _no_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "wte" not in name}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing_ids, r"token ids that the tokenizer lacks: \[50256\]"),
        (_bad_words, "bad_words_ids holds token ids"),
        (_no_vocabulary_size, "no vocab_size"),
        (_small_embedding, "ids reach 2002, the model has 1999 rows"),
        (_strange_rows, "memory.table has 2003 rows"),
        (_no_embedding, "no embedding found"),
    ],
)
def test_a_model_that_cannot_be_renumbered_is_refused_and_leaves_nothing(
    spoil: Callable[[Path], None], message: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    spoil(tiny_gpt2)
    (tmp_path / "place").mkdir()
    with pytest.raises(ModelError, match=message):
        trim_vocabulary(tiny_gpt2, tmp_path / "place" / "out", languages=["en"], size=900)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_damaged_weight_file_is_named_and_leaves_nothing(tiny_gpt2: Path, tmp_path: Path) -> None:
    weights = tiny_gpt2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read"):
        trim_vocabulary(tiny_gpt2, tmp_path / "place" / "out", languages=["en"], size=900)
    assert list((tmp_path / "place").iterdir()) == []


def _last_learned(folder: Path) -> int:
    """The rarest token that BPE learned, which no small trimming keeps."""
    return max(BpeTokenizer.read(folder).vocabulary.values())


def _logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        return torch.as_tensor(model.eval()(torch.tensor([ids])).logits)
