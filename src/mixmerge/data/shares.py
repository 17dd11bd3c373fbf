"""Shares of languages in a mixture: from the rows that there are, by temperature.

q_l is proportional to w_l * n_l^(1/T) for the n_l rows of language l. T = 1 takes the data as they are, a larger T lifts the
small languages, and T without end makes all equal. That is the exponential smoothing of XLM-R (Conneau et al. 2020,
arXiv 1911.02116, section 3.1, alpha = 1/T; they use 0.3, T = 3.3) and the temperature of Aharoni et al. 2019
(arXiv 1903.00089; T = 5 in Arivazhagan et al. 2019, arXiv 1907.05019).
"""

from __future__ import annotations

from collections.abc import Mapping

DIGITS = 9  # of a share: the last bits of a power differ between machines, and shares are part of an identity


def by_temperature(rows: Mapping[str, int], temperature: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Shares (0..1, to 9 digits) of the languages in `weights`; one without rows, or with weight 0, gets none.

    >>> by_temperature({"en": 900, "hi": 100}, 2, {"en": 1, "hi": 1})
    {'en': 0.75, 'hi': 0.25}

    All are 0 where no language has rows.
    """
    most = max(rows.values(), default=0)
    sizes = {
        code: weight * (rows[code] / most) ** (1 / temperature) if rows.get(code) else 0.0
        for code, weight in weights.items()
    }
    total = sum(sizes[code] for code in sorted(sizes))
    return {code: round(size / total, DIGITS) if total else 0.0 for code, size in sizes.items()}
