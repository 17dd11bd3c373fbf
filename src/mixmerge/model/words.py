"""Which tokens a language needs: the words people use, in the spellings they meet in text, counted by frequency.

The one idea: word lists (`wordfreq`) stand in for a corpus, so nothing has to be downloaded or sampled, and the
choice is the same everywhere. A word counts in lower case and capitalised, after a space and without one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixmerge.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Top words of each list: 89 % (Russian) to 100 % (Hindi) of its word mass, in about 3 s a language.
WORDS = 40_000
# Words below this rank are counted after a space only, and not in capitals: too rare to order tokens by.
FREQUENT = 20_000
# Share of a word's use by spelling, (after a space, without one), for a word that is usually written in that case.
# The spelling with the fewest tokens, learned first, is the usual one: the tokenizer saw in text how names are written.
LOWER, CAPITAL, UPPER = range(3)
SHARES: dict[int, dict[int, tuple[float, float]]] = {
    LOWER: {LOWER: (0.80, 0.03), CAPITAL: (0.10, 0.07)},
    CAPITAL: {CAPITAL: (0.85, 0.10), LOWER: (0.05, 0.0)},
    UPPER: {UPPER: (0.85, 0.05), CAPITAL: (0.05, 0.0), LOWER: (0.05, 0.0)},
}
WITHOUT_CASE = {LOWER: (0.90, 0.10)}
# Languages written without spaces: nearly every word follows another one directly.
WITHOUT_SPACES = frozenset({"ja", "zh"})
# A line feed in front keeps tokenizers that add a space of their own (Llama 2) from adding it to the word.
BEFORE = "\n"


@dataclass(frozen=True, slots=True)
class LanguageWords:
    """Spellings of one language's words as token ids; `mass` is each spelling's share of the text, summing to 1."""

    language: str
    spellings: list[tuple[int, ...]]
    mass: list[float]

    def use_of_tokens(self) -> dict[int, float]:
        """How often each token occurs in a word of this language, on average; the most used first, then by id."""
        use: defaultdict[int, float] = defaultdict(float)
        for tokens, mass in zip(self.spellings, self.mass, strict=True):
            for token in tokens:
                use[token] += mass
        return dict(sorted(use.items(), key=lambda item: (-item[1], item[0])))

    def covered_by(self, kept: set[int]) -> float:
        """Share (0..1) of the word mass whose tokens are all in `kept`."""
        return sum(
            mass for tokens, mass in zip(self.spellings, self.mass, strict=True) if kept.issuperset(tokens)
        ) / sum(self.mass)


def check_languages(languages: Sequence[str]) -> None:
    """Refuse an empty or repeated list, and languages that have no word list.

    Raises:
        UserError: also where `wordfreq` is not installed.
    """
    known = _available()
    if not languages:
        raise UserError("no languages given, so there is nothing to keep", do="name at least one")
    for language in languages:
        if language not in known:
            raise UserError(f"no word list for language {language!r}", do=did_you_mean(language, known))
    if len(set(languages)) < len(languages):
        raise UserError(f"a language is named twice: {', '.join(languages)}")


def read_words(language: str, tokenizer: Tokenizer) -> LanguageWords:
    """Encode the words of one language; takes about 3 s."""
    from wordfreq import get_frequency_dict

    listed = get_frequency_dict(language, wordlist="best")
    words = sorted(listed, key=lambda word: (-listed[word], word))[:WORDS]
    forms = [_forms(word, frequent=rank < FREQUENT) for rank, word in enumerate(words)]
    without_spaces = language in WITHOUT_SPACES
    texts = [f" {form}" for spelled in forms for form in spelled]
    tokens = dict(zip(texts, _encode(texts, tokenizer), strict=True))
    use: defaultdict[str, float] = defaultdict(float)
    for rank, (word, spelled) in enumerate(zip(words, forms, strict=True)):
        usual = min(range(len(spelled)), key=lambda form: _rarity(tokens[f" {spelled[form]}"]))
        for form, (spaced, bare) in (SHARES[usual] if len(spelled) > 1 else WITHOUT_CASE).items():
            if without_spaces:
                spaced, bare = 0.0, spaced + bare
            # Word lists have the typewriter's apostrophe, printed text mostly the other one.
            variants = {spelled[form], spelled[form].replace("'", "’")}
            for text in variants:
                use[f" {text}"] += listed[word] * spaced / len(variants)
                if rank < FREQUENT or without_spaces:
                    use[text] += listed[word] * bare / len(variants)
    used = {text: mass for text, mass in use.items() if mass > 0}
    more = [text for text in used if text not in tokens]
    tokens |= zip(more, _encode(more, tokenizer), strict=True)
    total = sum(used.values())
    return LanguageWords(language, [tokens[text] for text in used], [mass / total for mass in used.values()])


def _forms(word: str, *, frequent: bool) -> list[str]:
    """A listed (lower-case) word in lower case, capitalised and, if frequent, in capitals; once if it has no case."""
    capital = word[0].upper() + word[1:]
    if capital == word:
        return [word]
    return [word, capital, word.upper()] if frequent and len(word) > 1 else [word, capital]


def _rarity(tokens: tuple[int, ...]) -> tuple[int, int]:
    """Orders spellings: BPE joins what is frequent into few tokens and gives what it joins first the lowest ids."""
    return len(tokens), max(tokens)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    encodings = tokenizer.encode_batch_fast([BEFORE + text for text in texts], add_special_tokens=False)
    return [tuple(encoding.ids) for encoding in encodings]


def _available() -> list[str]:
    try:
        from wordfreq import available_languages
    except ImportError as error:
        raise UserError(
            "the package 'wordfreq' is not installed; it ranks words by use", do="pip install 'mixmerge[trim]'"
        ) from error
    return sorted(available_languages("best"))
