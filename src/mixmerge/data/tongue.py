"""Is a row evidently in another language than it says?

One idea: it is only where nothing of it is in its own language: an answer long enough and decisively in another one,
after a question that is decisively elsewhere too, or too short to tell. So translation, a question about a text in
another language, code and sums are left alone, and an answer in the wrong language to a question in the right one is
not seen (the language judge sees what models make of it).
"""

from __future__ import annotations

from mixmerge.data.formats import Row
from mixmerge.data.languages import known_language
from mixmerge.langid import VARIETIES, known_languages, letters, likelihoods, primary, prose

# Fewest letters to tell from, least probability of the likeliest language, most of the row's own.
ANSWER, PROMPT = (30, 0.6, 0.03), (20, 0.5, 0.05)
READ = 600  # characters of the prose that are looked at; more would cost time
LIKELY = 6  # languages; whatever lies behind the sixth is nothing
# What the model tells apart by little more than spelling and names.
_KIN = (frozenset({"hr", "sr", "bs", "sh"}), frozenset({"id", "ms"}), frozenset({"no", "nb", "nn", "da"}))


def evident_language(row: Row) -> str | None:
    """The code of the language that a row is evidently in although it says another; None for all other rows.

    >>> turn = {"role": "user", "content": "Was ist zu tun, wenn es den ganzen Tag regnet?"}
    >>> answer = "Dann bleibt man am besten zu Hause und liest ein gutes Buch."
    >>> evident_language(Row("1", "fr", [turn], answer)), evident_language(Row("1", "de", [turn], answer))
    ('de', None)
    """
    own = known_language(row.lang) or row.lang
    if primary(own) not in known_languages():
        return None
    other = _elsewhere(row.completion, own, *ANSWER)
    if not other:
        return None
    asked = "\n".join(turn["content"] for turn in row.prompt if turn["role"] == "user")
    return other if _elsewhere(asked, own, *PROMPT) != "" else None


def _elsewhere(text: str, own: str, fewest: int, least: float, most: float) -> str | None:
    """The other language that a text is in; "" where it may be its own; None where it is too short to tell."""
    text = text[: 4 * READ]
    words = prose(text)[:READ]
    if letters(words) < fewest or 2 * letters(words) < sum(not char.isspace() for char in text[:READ]):
        return None
    found, same = likelihoods(words, most=LIKELY), _same(primary(own))
    other = max(found, key=lambda code: found[code])
    mine = sum(probability for code, probability in found.items() if code in same)
    return "" if other in same or found[other] < least or mine > most else other


def _same(code: str) -> frozenset[str]:
    kin = next((group for group in _KIN if code in group), frozenset())
    return frozenset({code}) | VARIETIES.get(code, frozenset()) | kin
