"""Finding training rows whose question is also an evaluation prompt.

Three kinds, each row under the first that fits. `exact`: nothing is left of the difference between a user turn and a prompt
after NFKC, casefolding, dropping invisible characters and Arabic vowel signs, and folding punctuation, white space and
Arabic letters that are often written for each other. `near`: at least so much of their 5-character shingles are shared, in
any script. `parallel`: the row's id is that of a prompt, in whatever language, where the recipe says that the two come from
one source; ids alone say nothing. Paraphrases are not found.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mixmerge.data.formats import Row
from mixmerge.data.near import signatures, similar

Kind = Literal["exact", "near", "parallel"]
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row that asks what a prompt asks (given as it stands in the prompt set); `likeness` is their Jaccard if near."""

    row_id: str
    lang: str
    prompt: str
    kind: Kind = "exact"
    likeness: float = 1.0


class PromptIndex:
    """The prompts of a study, ready to be looked for in any number of data sets.

    `near` is the least Jaccard similarity of a near duplicate, above 0 and up to 1; None looks for none.
    """

    def __init__(self, texts: Iterable[str], near: float | None = None) -> None:
        self._exact: dict[str, str] = {}
        for text in texts:
            self._exact.setdefault(normalised(text), text)
        self._near = near
        self._texts = list(self._exact)
        self._signed = signatures(self._texts) if near is not None else None

    def find(self, rows: Sequence[Row], parallel: Mapping[str, str] | None = None) -> list[Overlap]:
        """The rows that ask what a prompt asks, in the order of `rows`, each once.

        `parallel` maps the ids of prompts from the rows' own source to their texts: a row `lang/id` overlaps with its id.
        """
        asked = [[normalised(turn["content"]) for turn in row.prompt if turn["role"] == "user"] for row in rows]
        left = dict.fromkeys(text for texts in asked for text in texts if text not in self._exact)
        near = self._nearest(list(left))
        found = []
        for row, texts in zip(rows, asked, strict=True):
            exact = next((self._exact[text] for text in texts if text in self._exact), None)
            nearest = max((near[text] for text in texts if text in near), default=None, key=lambda pair: pair[0])
            own_id = row.id.partition("/")[2]
            if exact is not None:
                found.append(Overlap(row.id, row.lang, exact))
            elif nearest is not None:
                found.append(Overlap(row.id, row.lang, nearest[1], "near", nearest[0]))
            elif parallel and own_id in parallel:
                found.append(Overlap(row.id, row.lang, parallel[own_id], "parallel"))
        return found

    def _nearest(self, texts: list[str]) -> dict[str, tuple[float, str]]:
        """Text -> likeness and prompt of its nearest near duplicate; of equal ones the first."""
        if self._near is None or self._signed is None or not texts or not self._texts:
            return {}
        best: dict[str, tuple[float, str]] = {}
        for i, j, likeness in similar(texts, signatures(texts), self._texts, self._signed, self._near):
            if texts[i] not in best or likeness > best[texts[i]][0]:
                best[texts[i]] = likeness, self._exact[self._texts[j]]
        return best


def overlapping(rows: Sequence[Row], prompt_texts: Iterable[str], near: float | None = None) -> list[Overlap]:
    """The rows that ask what a prompt asks, in the order of `rows`, each once."""
    return PromptIndex(prompt_texts, near).find(rows)


def counted(found: Iterable[Overlap]) -> Counts:
    """Kind -> language -> rows, what there is none of left out."""
    tally = Counter((overlap.kind, overlap.lang) for overlap in found)
    kinds = [kind for kind in get_args(Kind) if any(k == kind for k, _ in tally)]
    return {kind: {lang: tally[k, lang] for k, lang in sorted(tally) if k == kind} for kind in kinds}


def in_brief(text: str) -> str:
    """A prompt on one line of at most 100 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Counts as a person reads them.

    >>> in_words({"exact": {"en": 2, "fr": 1}, "near": {"hi": 4}})
    '3 exact (en 2, fr 1), 4 near (hi 4)'
    """
    return ", ".join(
        f"{sum(langs.values())} {kind} ({', '.join(f'{lang} {n}' for lang, n in langs.items())})"
        for kind, langs in counts.items()
    )


def normalised(text: str) -> str:
    """The text as it is compared.

    >>> normalised("What\\u2019s  NEW, e-mail?") == normalised("what's new e\\u2010mail")
    True

    A text of punctuation only keeps it, so that "?" and "!" stay apart. Arabic is folded as information retrieval does it
    (Larkey, Ballesteros & Connell 2002; Lucene's ArabicNormalizer): no vowel signs, no tatweel, one alef, ى as ي, ة as ه.
    Marks of other scripts tell words apart and stay.
    """
    # Casefolding can undo normalisation (and the reverse), so NFKC stands on both sides of it.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = re.sub(r"\s+", " ", text.translate(_FOLDED)).strip()
    found = folded or "".join(char for char in text if unicodedata.category(char) != "Cf").strip()
    # what was dropped may have stood between parts of one character
    return found if unicodedata.is_normalized("NFKC", found) else normalised(found)


_ARABIC: dict[int, str | None] = {
    **dict.fromkeys(range(0x064B, 0x0656)),  # fathatan to sukun; madda and hamza where they stand alone
    **dict.fromkeys((0x0640, 0x0670)),  # tatweel, superscript alef
    **dict.fromkeys(map(ord, "أإآٱ"), "ا"),
    ord("ى"): "ي",
    ord("ة"): "ه",
}


class _Folded(dict[int, str | None]):
    """What becomes of a character: invisible ones vanish, punctuation, white space and controls become a space."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category == "Cf" else " " if category[0] in "PZC" else chr(code)
        return self[code]


_FOLDED = _Folded(_ARABIC)
