"""Word lists: which spellings count, and how languages are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mixmerge.errors import UserError
from mixmerge.model.tokens import BpeTokenizer
from mixmerge.model.words import LanguageWords, check_languages, read_words


def test_spellings_with_and_without_space_and_capital_are_counted_and_sum_to_one(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2).open()
    words = read_words("en", tokenizer)
    mass = dict(zip(words.spellings, words.mass, strict=True))
    assert sum(words.mass) == pytest.approx(1.0)
    the = [mass[tuple(tokenizer.encode("\n" + text).ids)] for text in (" the", " The", "The", "the")]
    assert the == sorted(the, reverse=True)
    assert the[-1] > 0


def test_the_spelling_that_bpe_learned_first_counts_as_the_usual_one(gemma: Path, few_words: None) -> None:
    tokenizer = BpeTokenizer.read(gemma).open()
    words = read_words("en", tokenizer)
    mass = dict(zip(words.spellings, words.mass, strict=True))
    house, york, usa = (
        [mass.get(tuple(tokenizer.encode("\n " + form, add_special_tokens=False).ids), 0.0) for form in forms]
        for forms in (("house", "House", "HOUSE"), ("york", "York", "YORK"), ("usa", "Usa", "USA"))
    )
    assert house.index(max(house)) == 0
    assert york.index(max(york)) == 1
    assert usa.index(max(usa)) == 2


def test_both_apostrophes_share_a_words_use(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2).open()
    words = read_words("en", tokenizer)
    mass = dict(zip(words.spellings, words.mass, strict=True))
    straight, printed = (mass[tuple(tokenizer.encode("\n " + text).ids)] for text in ("don't", "don’t"))
    assert straight == pytest.approx(printed)


def test_chinese_words_count_without_a_space(tiny_gpt2: Path) -> None:
    tokenizer = BpeTokenizer.read(tiny_gpt2).open()
    spellings = set(read_words("zh", tokenizer).spellings)
    assert tuple(tokenizer.encode("\n我们").ids) in spellings
    assert tuple(tokenizer.encode("\n 我们").ids) not in spellings


def test_tokens_are_ordered_by_use_and_cover_only_words_they_spell() -> None:
    words = LanguageWords("xx", [(1, 2), (3,), (2, 2)], [0.5, 0.3, 0.2])
    assert list(words.use_of_tokens().items()) == [(2, pytest.approx(0.9)), (1, 0.5), (3, 0.3)]
    assert words.covered_by({1, 2}) == pytest.approx(0.7)
    assert words.covered_by({1}) == 0.0


def test_an_unknown_language_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="no word list for language 'fra'; did you mean 'f"):
        check_languages(["en", "fra"])


def test_a_language_without_a_word_list_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UserError, match=r"no word list for language 'xq'; known: ar, bg, "):
        check_languages(["xq"])


def test_no_language_and_a_language_named_twice_are_refused() -> None:
    with pytest.raises(UserError, match="no languages given"):
        check_languages([])
    with pytest.raises(UserError, match="named twice: en, fr, en"):
        check_languages(["en", "fr", "en"])


def test_without_wordfreq_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(UserError, match=r"pip install 'mixmerge\[trim\]'"):
        check_languages(["en"])
