"""The data that comes with mixmerge: whole, parallel, in the language it says, and never on both sides."""

import json
import re
import unicodedata
from importlib.resources import files
from itertools import combinations

import pytest

from mixmerge.data.overlap import normalised
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.language import LanguageJudge

LANGUAGES = ["en", "fr", "hi", "es", "ru", "ar"]
TRAIN = {"train/general": 64, "train/safety": 80}
PROMPTS = {"prompts/general": 40, "prompts/harmful": 40, "prompts/harmless": 40}
TEXTS = ("prompt", "completion", "chosen", "rejected", "reference")


def read(name, lang):
    text = (files("mixmerge") / "starter" / f"{name}.{lang}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("name", "rows"), (TRAIN | PROMPTS).items())
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_file_has_the_rows_of_the_english_one(name, rows, lang):
    english, here = read(name, "en"), read(name, lang)
    assert len(here) == rows
    fixed = ("id", "kind", "category", "split")
    assert [{k: r[k] for k in fixed if k in r} for r in here] == [{k: r[k] for k in fixed if k in r} for r in english]
    assert [list(row) for row in here] == [list(row) for row in english]


@pytest.mark.parametrize("name", TRAIN | PROMPTS)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_text_is_sound_and_prompts_are_distinct(name, lang):
    rows = read(name, lang)
    for row in rows:
        for key in TEXTS:
            if key in row:
                assert row[key] == unicodedata.normalize("NFC", row[key]).strip()
                assert not is_degenerate(row[key]), row["id"]
    assert len({normalised(row["prompt"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_texts_are_in_their_language(lang):
    judge = LanguageJudge(LANGUAGES)
    texts = [(r["id"], r[key]) for name in TRAIN | PROMPTS for r in read(name, lang) for key in TEXTS if key in r]
    found = {row_id: judge.probabilities(text) for row_id, text in texts if len(text) > 60}
    wrong = [i for i, found_ in found.items() if found_ and (found_[1] or max(found_[0], key=found_[0].get)) != lang]
    assert not wrong


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_prompt_is_trained_on(lang):
    sets = [{normalised(row["prompt"]) for row in read(name, lang)} for name in TRAIN | PROMPTS]
    for one, other in combinations(sets, 2):
        assert not one & other


def test_each_harmful_request_has_a_harmless_twin():
    rows = {row["id"]: row["kind"] for row in read("train/safety", "en")}
    numbers = {re.sub(r"[ab]$", "", row_id) for row_id in rows}
    assert len(numbers) == 40
    assert all((rows[f"{n}a"], rows[f"{n}b"]) == ("harmful", "harmless") for n in numbers)
    harmful, harmless = (read(f"prompts/{name}", "en") for name in ("harmful", "harmless"))
    assert [r["id"][2:] for r in harmful] == [r["id"][2:] for r in harmless]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_preferences_have_two_sides(lang):
    for row in read("train/safety", lang):
        assert normalised(row["chosen"]) != normalised(row["rejected"])
