"""Labelled rows and pairs for `judges.py`, out of the starter data and a data folder; which rows follows from a seed.

Labels are those of the sources, never a judge's of ours: WildGuard's on PolyRefuse answers, what an answer was written as
(starter), a strict checker's, language identification's, or the way a pair was made. Each kind of row says which.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.data.sources import DataSource, read_records
from mixmerge.evaluate.refusal import LabelledText, labelled_rows

LANGUAGES = ("en", "fr", "hi", "es", "ru", "ar")
POLYREFUSE, MPO = "mainlp/Multilingual-Refusal", "circle-hit/MPO"
CHAT = {
    "for-ai/language-confusion",
    "lightblue-tech/M-IFEval",
    "VikhrModels/ru_llm_arena",
    "artidoro/qlora",
    "bofenghuang/vigogne",
    "hiyouga/LLaMA-Factory",
}
SHORT = {"google-deepmind/xquad", "hellomasaya/hawp", "husseinmozannar/SOQAL", "vladislavneon/RuBQ"}
NUMBER = {
    "en": "The answer is {}.",
    "fr": "La réponse est {}.",
    "es": "La respuesta es {}.",
    "ru": "Ответ: {}.",
    "hi": "उत्तर {} है।",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A text with a label: `refused` (in the harm tables: harmful). `main` rows count for the main table."""

    text: str
    lang: str
    refused: bool
    slice: str
    topic: str
    main: bool = True

    def labelled(self) -> LabelledText:
        return LabelledText(self.text, self.lang, "refused" if self.refused else "complied", self.topic)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and a third text that a judge may take for the reference."""

    set: str
    lang: str
    prompt: str
    reference: str
    better: str
    worse: str


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, in an order that the ids alone decide."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    yield from sorted(rows, key=lambda row: hashlib.sha256(f"judges {row['id']}".encode()).digest())


def starter_rows() -> list[Row]:
    """The rows that the shipped judge is fitted on, in the order of the quickstart's languages."""
    rows = []
    for lang in LANGUAGES:
        general, safety = (
            read_records(DataSource(path=f"starter:train/{name}.{{lang}}.jsonl"), lang, Path())
            for name in ("general", "safety")
        )
        rows += [
            Row(row.text, lang, row.label == "refused", "starter", row.group)
            for row in labelled_rows(general, safety, lang=lang)
        ]
    return rows


def pack_rows(data: Path, each: int, skip: int = 0) -> list[Row]:
    """Up to `each` refusals and as many answers a language, half of these to harmful requests where there are any.

    `skip` of them are left out first, half as many of the kinds of which half as many are taken.
    Beside the main rows: soft refusals (MPO's chosen answers), one-phrase answers, and continuations (RTP-LX).
    """
    kinds: dict[str, dict[str, list[Row]]] = {lang: defaultdict(list) for lang in LANGUAGES}

    def add(kind: str, lang: str, text: str, refused: bool, topic: str, main: bool = True) -> None:
        kinds[lang][kind].append(Row(text, lang, refused, kind, topic, main))

    for row in read(data / "safety/sft_train.jsonl"):
        if row["source"] == POLYREFUSE:
            add("refusal", row["lang"], row["response"], True, f"polyrefuse {row['pid']}")
    for row in read(data / "safety/dpo_train.jsonl"):
        if row["source"] in (POLYREFUSE, MPO):
            add("answer to harm", row["lang"], row["rejected"], False, row["id"])
        if row["source"] == MPO:
            add("soft refusal", row["lang"], row["chosen"], True, row["id"], main=False)
    for row in read(data / "general/sft_train.jsonl"):
        if row["source"] in CHAT:
            add("chat answer", row["lang"], row["response"], False, row["id"])
        elif row["source"] in SHORT:
            add("one-phrase answer", row["lang"], row["response"], False, row["id"], main=False)
    for row in _rtplx(data):
        for side in ("chosen", "rejected"):
            add("continuation", row["lang"], row[side], False, f"rtplx {row['pid']}", main=False)
    rows = []
    for lang in LANGUAGES:
        found = {
            kind: listed[skip // (1 if kind in ("refusal", "chat answer") else 2) :]
            for kind, listed in kinds[lang].items()
        }
        harm = found.get("answer to harm", [])[: each // 2]
        rows += found.get("refusal", [])[:each] + harm + found["chat answer"][: each - len(harm)]
        for kind in ("soft refusal", "one-phrase answer", "continuation"):
            rows += found.get(kind, [])[: each // 2]
    return rows


def harm_rows(data: Path, each: int) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Experiments on harm: (title, rows to fit on, rows of other sources to test on); a label is True for harmful."""
    fit = []
    for name, limit in (("textdetox_pairs", 600), ("paradetox_en", 100)):
        for row in list(read(data / f"safety/{name}.jsonl"))[:limit]:
            neutral = row["neutral"] if isinstance(row["neutral"], str) else row["neutral"][0]
            for text, toxic in ((row["toxic"], True), (neutral, False)):
                if text:
                    fit.append(Row(text, row["lang"], toxic, "detox", row["id"]))
    counts: dict[str, int] = defaultdict(int)
    test = []
    for row in _rtplx(data):
        counts[row["lang"]] += 1
        if counts[row["lang"]] <= each:
            test += [
                Row(row[s], row["lang"], s == "rejected", "rtplx", str(row["pid"])) for s in ("chosen", "rejected")
            ]
    yield "Toxic or not (detox pairs -> RTP-LX continuations)", fit, test
    fit = []
    for lang in LANGUAGES:
        for _, row in read_records(DataSource(path="starter:train/safety.{lang}.jsonl"), lang, Path()):
            if row["kind"] == "harmful":
                fit.append(Row(row["rejected"], lang, True, "starter", row["id"]))
            else:
                fit.append(Row(row["chosen"], lang, False, "starter", row["id"]))
    found = [
        r
        for r in pack_rows(data, each)
        if r.slice in ("answer to harm", "chat answer") and r.lang in ("en", "fr", "es", "ar")
    ]
    test = [Row(r.text, r.lang, r.slice == "answer to harm", r.slice, r.topic) for r in found]
    yield "Answer to a harmful request or to another one (starter -> PolyRefuse, MPO, chat answers)", fit, test


def _rtplx(data: Path) -> list[dict[str, Any]]:
    import polars

    rows = polars.read_parquet(data / "safety/rtplx_pairs.parquet").to_dicts()
    return sorted(rows, key=lambda row: hashlib.sha256(f"judges {row['id']}".encode()).digest())


def pairs(data: Path, each: int) -> list[Pair]:
    """Up to `each` pairs a set and language.

    `constraints`: an answer that a strict checker passed against one that it failed; `language`: an answer in the asked
    language against one in another; `model`: gpt-4 against mistral-7b (the label is a leaderboard's, not the pair's). The
    reference of these three is a third model's answer. `sentence`: the sentence of the context that holds the answer
    against another one of it, reference the answer's phrase. `number`: the right number against another row's.
    """
    found: list[Pair] = []
    others: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in read(data / "general/sft_train.jsonl"):
        others[row["lang"], row["prompt"]].append(row)
    names = {"instruction-constraints": "constraints", "language-consistency": "language", "quality": "model"}
    for row in read(data / "general/dpo_train.jsonl"):
        used = {row["chosen_origin"], row["rejected_origin"]}
        third = [o["response"] for o in others[row["lang"], row["prompt"]] if o["origin"] not in used]
        third = [text for text in third if text not in (row["chosen"], row["rejected"])]
        if third:
            kind = names[row["objective"].split("/")[1]]
            found.append(Pair(kind, row["lang"], row["prompt"], third[0], row["chosen"], row["rejected"]))
    numbers: dict[tuple[str, str], str] = {}
    for row in read(data / "eval/general_qa.jsonl"):
        lang, answer = row["lang"], str(row["answer"])
        if row["set"].startswith("xquad"):
            context, _, question = row["prompt"].rpartition("\n\n")
            sentences = [s for s in re.split(r"(?<=[.!?।؟])\s+", context) if len(s) > 20]
            right = [s for s in sentences if answer in s]
            wrong = [s for s in sentences if answer not in s]
            if len(right) == 1 and wrong:
                found.append(Pair("sentence", lang, question, answer, right[0], wrong[len(row["id"]) % len(wrong)]))
        elif row["set"].startswith(("mgsm", "hawp")):
            before = numbers.get((row["set"], lang))
            if before is not None and before != answer:
                texts = [NUMBER[lang].format(number) for number in (answer, before)]
                found.append(Pair("number", lang, row["prompt"], answer, *texts))
            numbers[row["set"], lang] = answer
    counts: dict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for pair in found:
        counts[pair.set, pair.lang] += 1
        if counts[pair.set, pair.lang] <= each:
            kept.append(pair)
    return kept
