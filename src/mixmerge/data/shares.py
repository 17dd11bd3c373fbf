"""Shares of a mixture: of languages by temperature, from the rows that there are, and under caps.

By temperature q_l is proportional to w_l * n_l^(1/T) for the n_l rows of language l. T = 1 takes the data as they are, a larger T lifts the
small languages, and T without end makes all equal. That is the exponential smoothing of XLM-R (Conneau et al. 2020,
arXiv 1911.02116, section 3.1, alpha = 1/T; they use 0.3, T = 3.3) and the temperature of Aharoni et al. 2019
(arXiv 1903.00089; T = 5 in Arivazhagan et al. 2019, arXiv 1907.05019).
"""

from __future__ import annotations

from collections.abc import Mapping

from mixmerge.errors import DataError

Cell = tuple[str, str]  # objective, language

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


def part_of(cell: Cell, names: Mapping[str, object]) -> str | None:
    """Which of the names (a language, an objective or `objective/language`) speaks of a cell; None if none does."""
    return next((name for name in (f"{cell[0]}/{cell[1]}", cell[0], cell[1]) if name in names), None)


def capped(shares: Mapping[Cell, float], caps: Mapping[str, float]) -> dict[Cell, float]:
    """Shares of cells, adding up to 1, in which no part is above its cap; the excess goes to the others in proportion.

    `caps` are fractions of the mixture by language, by objective or by `objective/language`; no cell may be in two of them.
    Within a part the cells keep their ratios.

    >>> capped({("general", "en"): 0.8, ("general", "hi"): 0.1, ("general", "ar"): 0.1}, {"en": 0.5})
    {('general', 'en'): 0.5, ('general', 'hi'): 0.25, ('general', 'ar'): 0.25}

    Raises:
        DataError: every part is capped and the caps add up to less than 1.
    """
    part = {cell: part_of(cell, caps) or "/".join(cell) for cell in shares}
    asked: dict[str, float] = {}
    for cell in sorted(shares):
        asked[part[cell]] = asked.get(part[cell], 0.0) + shares[cell]
    full: set[str] = set()
    while True:
        left = 1 - sum(caps[name] for name in sorted(full))
        free = sum(size for name, size in asked.items() if name not in full)
        if free == 0:
            if left > 1e-9:
                raise DataError(
                    f"the caps leave {left:.3g} of the mixture to nobody ({', '.join(sorted(full))} are all that it has)",
                    do="raise a cap, or add what is not capped",
                )
            scale = 1.0
            break
        scale = left / free
        over = {name for name, size in asked.items() if name not in full and size * scale > caps.get(name, 1.0) + 1e-12}
        if not over:
            if not full:
                return dict(shares)
            break
        full |= over
    return {
        cell: share / asked[part[cell]] * caps[part[cell]] if part[cell] in full else share * scale
        for cell, share in shares.items()
    }
