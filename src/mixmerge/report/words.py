"""What the report calls things, and how it writes numbers: one place, so that page, charts, tables and CSV agree.

Fractions come in and percent goes out. ASCII here; the page turns a hyphen before a digit into a minus sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as a reader meets it: column head, longer name, what is counted, which way is better."""

    head: str
    name: str
    meaning: str
    better: Literal["higher", "lower"]


METRICS: Mapping[str, Metric] = {
    "win": Metric(
        "General",
        "General quality: win rate against the base",
        "General prompts on which the candidate's answer is judged nearer to the reference than the base's; a tie counts half, "
        "so 50 is the base itself.",
        "higher",
    ),
    "harm": Metric("Harm", "Harm rate", "Harmful requests that the candidate complied with.", "lower"),
    "over_refusal": Metric(
        "Over-refusal", "Over-refusal", "Harmless look-alike requests that the candidate refused.", "lower"
    ),
    "wrong_language": Metric(
        "Wrong language",
        "Wrong language",
        "Answers in another language than the prompt's, of all whose language is known.",
        "lower",
    ),
    "invalid": Metric(
        "Invalid",
        "Invalid",
        "Empty or broken text, on harmful and look-alike prompts: neither a refusal nor an answer.",
        "lower",
    ),
    "win_strict": Metric(
        "General, strict",
        "General quality, strict: wins only",
        "As the win rate, but a tie counts nothing: the count of arXiv 2410.10801. The base has none against itself.",
        "higher",
    ),
}
BENCHMARK = "bench/"


def metric_words(key: str, scores: Mapping[str, Any]) -> Metric:
    """A metric as a reader meets it, by who judges it in this study; benchmarks (`bench/<name>`) among them.

    >>> metric_words("bench/mgsm", {}).head
    'mgsm'
    """
    if key.startswith(BENCHMARK):
        name = key.removeprefix(BENCHMARK)
        meaning = "Answers that are right by the benchmark's own check; an answer that it cannot read is wrong."
        return Metric(name, f"Benchmark: {name}", meaning, "higher")
    found = METRICS[key]
    if key == "harm" and judged_as(scores, "harm") == "harm":
        return replace(found, meaning=f"Answers to harmful requests that {scores['decide']['harm']} judged harmful.")
    if key == "win" and scores["decide"]["quality"] != "quality":
        judge = scores["decide"]["quality"]
        meaning = (
            f"General prompts on which {judge} judged the candidate's answer better than the base's; a tie counts half, so "
            "50 is the base itself."
        )
        return replace(found, meaning=meaning)
    return found


def judged_as(scores: Mapping[str, Any], question: str) -> str:
    """What the judge that decides a question is asked: harm may be decided by a judge of refusals."""
    return str(scores["judges"][scores["decide"][question]])


# The axes of the balance, on which larger is always better.
AXES: Mapping[str, str] = {
    "win": "General quality (win rate)",
    "harm": "Harmful requests refused",
    "over_refusal": "Harmless look-alikes answered",
}
SHORT_AXES: Mapping[str, str] = {
    "balance": "Balance",
    "win": "General",
    "harm": "Harm refused",
    "over_refusal": "Look-alikes",
}
# Where a judge of harm decides it, an answer may be safe without being a refusal.
JUDGED_SAFE, SHORT_JUDGED_SAFE = "Harmful requests met safely", "Harm avoided"


def axis_words(scores: Mapping[str, Any]) -> dict[str, str]:
    """The names of the axes in this study."""
    return dict(AXES) | ({"harm": JUDGED_SAFE} if judged_as(scores, "harm") == "harm" else {})


def short_axis_words(scores: Mapping[str, Any]) -> dict[str, str]:
    """Shorter ones for charts and heads, the balance among them."""
    return dict(SHORT_AXES) | ({"harm": SHORT_JUDGED_SAFE} if judged_as(scores, "harm") == "harm" else {})


KINDS: Mapping[str, tuple[str, str]] = {
    "base": ("Base", "what everything starts from"),
    "expert": ("Experts", "trained on one objective or language, here or elsewhere"),
    "baseline": ("Baselines", "data mixes, trained as one model"),
    "merge": ("Merges", "computed from other models' weights"),
}
KIND_ORDER = tuple(KINDS)
PURPOSES: Mapping[str, str] = {
    "general": "General prompts",
    "harmful": "Harmful requests",
    "harmless": "Harmless look-alikes",
    "benchmark": "Benchmarks",
}
LANGUAGES: Mapping[str, str] = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fr": "French", "he": "Hebrew", "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Filipino", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip


def language(code: str) -> str:
    """The English name of a language, or its code."""
    return LANGUAGES.get(code, code)


def percent(fraction: float, *, signed: bool = False) -> str:
    """A fraction as percent (or points) with one decimal.

    >>> percent(0.67451), percent(-0.0004), percent(0.05, signed=True)
    ('67.5', '0.0', '+5.0')
    """
    return number(100 * fraction, signed=signed)


def number(value: float, *, signed: bool = False) -> str:
    """One decimal; never a negative zero.

    >>> number(-58.249, signed=True), number(-0.01, signed=True)
    ('-58.2', '0.0')
    """
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


OPEN = "…"  # an end of an interval that is infinite


def ends(found: Mapping[str, float | None]) -> str:
    """An interval of signed numbers, an open end as an ellipsis.

    >>> ends({"low": -3.21, "high": None})
    '[-3.2, …]'
    """
    low, high = (OPEN if (end := found[key]) is None else number(end, signed=True) for key in ("low", "high"))
    return f"[{low}, {high}]"


def count(value: float | None) -> str:
    """A count with separators; None is one that nobody knows.

    >>> count(1234567)
    '1,234,567'
    """
    return "not known" if value is None else f"{round(value):,}"


def share(fraction: float) -> str:
    """A share in whole percent that says all or none only where it is so.

    >>> share(1.0), share(0.999), share(0.5), share(0.001)
    ('100 %', 'over 99 %', '50 %', 'under 1 %')
    """
    if 0.995 <= fraction < 1:
        return "over 99 %"
    return "under 1 %" if 0 < fraction < 0.005 else f"{100 * fraction:.0f} %"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
