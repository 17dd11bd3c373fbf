"""Is it text at all? A broken text is neither an answer nor a refusal, so every judge asks this first.

Plain rules on characters and words, no model, the same in every language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np


def is_degenerate(text: str) -> bool:
    """Whether a text is broken: no judge should read meaning into it.

    Any of these makes it so; thresholds are checked on broken outputs of small models and on sound texts in six languages:
    - nothing to read: no letter and no digit after white space, control and replacement characters are taken out;
    - replacement (U+FFFD), control or private-use characters are more than a third of what is not white space;
    - a loop: a stretch of more than half of the text repeats one phrase exactly, back to back, at least three times
      (a phrase under ten characters: six times; one of thirty or more, which a short budget cuts off: two and a half);
    - one word is more than half of all words, and there are at least eight words;
    - a run of one character without white space fills more than half of the text, and is at least twelve long.

    A loop whose phrases differ (`1. The same. 2. The same.`) is not seen: a sound enumeration looks alike.
    """
    solid = [c for c in text if not c.isspace()]
    broken = sum(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Co", "Cn")) for c in solid)
    if not any(unicodedata.category(c)[0] in "LN" for c in solid) or 3 * broken > len(solid):
        return True
    words = re.findall(r"[^\W_]+", text.casefold())
    if len(words) >= 8 and 2 * Counter(words).most_common(1)[0][1] > len(words):
        return True
    flat = " ".join(text.casefold().split())
    return _longest_run(flat) or _loops(flat)


def _longest_run(flat: str) -> bool:
    longest = run = 1
    for before, after in pairwise(flat):
        run = run + 1 if before == after else 1
        longest = max(longest, run)
    return longest >= 12 and 2 * longest > len(flat)


def _loops(flat: str) -> bool:
    """Whether back-to-back repeats of one phrase fill more than half of `flat`.

    A stretch where flat[i] == flat[i + period] for `run` characters holds run/period + 1 copies of the phrase.
    """
    # with the space that follows every copy but the last, so that three copies count as three
    codes = np.array([ord(c) for c in flat + " "], dtype=np.uint32)
    length = len(codes)
    for period in range(1, int(length / 2.5) + 1):
        copies = 6 if period < 10 else 3 if period < 30 else 2.5
        need = max(int((copies - 1) * period), length // 2 - period + 1)
        same = codes[period:] == codes[:-period]
        if np.count_nonzero(same) >= need:
            breaks = np.flatnonzero(~same)
            runs = np.diff(np.concatenate(([-1], breaks, [len(same)]))) - 1
            if runs.max() >= need:
                return True
    return False
