"""The account of a data set in one line for people."""

from __future__ import annotations

from mixmerge.data.account import Account, most_first


def account_line(name: str, account: Account) -> str:
    """What became of a data set's records, from what was kept to what was not, with the first example of each fault.

    >>> account_line("general", Account(read=3, kept={"en": 2, "fr": 0}, other_language={"de": 1}))
    'data general: 2 of 3 rows (en 2, fr 0); 1 in other languages skipped (de 1)'
    """
    if not account.kept:
        return f"data {name}: not read, it has none of the languages asked for"
    kept = sum(account.kept.values())
    of = f" of {account.read:,}" if kept != account.read else ""
    parts = [f"data {name}: {kept:,}{of} row{'s' * (account.read != 1)} ({_by(account.kept)})"]
    if account.other_language:
        counts = most_first(account.other_language)
        more = f", {len(counts) - 6} more" if len(counts) > 6 else ""
        skipped = sum(account.other_language.values())
        parts.append(f"{skipped:,} in other languages skipped ({_by(dict(counts[:6]))}{more})")
    if account.bad:
        firsts = "; ".join(f"first {kind}: {tally.first}" for kind, tally in account.bad.items())
        parts.append(f"{account.bad_rows:,} bad dropped ({account.kinds()}; {firsts})")
    if account.replaced.rows:
        rows, first = account.replaced.rows, account.replaced.first
        parts.append(f"{rows:,} with U+FFFD, where a character was lost before (first {first})")
    if account.limit_reached:
        beyond = f", {account.beyond_limit:,} beyond it left out" if account.beyond_limit else ""
        parts.append(f"limit reached in {', '.join(account.limit_reached)}{beyond}")
    if account.wrong_language:
        out_of = f" of {account.judged:,} judged"
        done = " dropped" if account.wrong_dropped else ""
        firsts = "; ".join(f"first {code}: {tally.first}" for code, tally in account.wrong_language.items())
        by = _by({code: tally.rows for code, tally in account.wrong_language.items()})
        parts.append(
            f"{account.wrong_rows:,}{out_of} evidently in another language than they say{done} ({by}; {firsts})"
        )
    return "; ".join(parts)


def _by(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count:,}" for code, count in counts.items())
