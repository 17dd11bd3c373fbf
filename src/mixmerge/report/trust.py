"""How far the judges are to be trusted: what each is, what it measured of itself, and every verdict it gave.

A judge's own measurements (trust.json) are shown whatever keys they have: what we know well, the rest as it is named.
Nothing is dropped: a verdict of `unknown` or `invalid` and a response that was cut are counted beside the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.report.tables import by_kind
from mixmerge.report.words import JUDGES, count, language, percent

TEXTS = ("description", "note", "notes", "caveat", "warning")
FRACTIONS = (
    "accuracy",
    "sensitivity",
    "specificity",
    "share",
    "rate",
    "agreement",
    "recall",
    "precision",
    "kappa",
    "f1",
)
LONG = 60  # characters; a longer text is a sentence, not a fact
VERDICT_ORDER = ("win", "tie", "loss", "refused", "complied", "right", "wrong", "unknown", "invalid")


@dataclass(frozen=True, slots=True)
class Grid:
    """A plain table: a caption, heads, and rows whose first cell is their head."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class JudgeBlock:
    """One judge: name, title, sentences about it, facts (label, value) and tables."""

    name: str
    title: str
    texts: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def judge_blocks(scores: Mapping[str, Any], trust: Mapping[str, Mapping[str, Any]]) -> list[JudgeBlock]:
    """A block for every judge that gave a verdict or brought measurements."""
    seen = {key.partition(":")[0] for counts in scores["counts"].values() for key in counts}
    names = [*(name for name in JUDGES if name in seen or name in trust), *sorted((seen | set(trust)) - set(JUDGES))]
    blocks = []
    for name in names:
        title, text = JUDGES.get(name, (name, ""))
        block = JudgeBlock(name, title, [text] if text else [])
        by_language: dict[str, Mapping[str, Any]] = {}
        found = dict(trust.get(name, {}))
        if isinstance(found.get("languages"), Mapping) and isinstance(found.get("all"), Mapping):
            found["languages"] = {**found["languages"], "all": found.pop("all")}
        _read(found, block, by_language, scores["languages"], ())
        if by_language:
            block.grids.insert(0, _by_language(by_language, scores["languages"]))
        blocks.append(block)
    return blocks


def _read(
    found: Mapping[str, Any],
    block: JudgeBlock,
    by_language: dict[str, Mapping[str, Any]],
    languages: Sequence[str],
    path: tuple[str, ...],
) -> None:
    """Sort what a judge says into sentences, facts, measures by language, and tables."""
    for key, value in found.items():
        here = (*path, key)
        if isinstance(value, str) and key in TEXTS:
            block.texts.append(value)
        elif isinstance(value, Mapping) and value:
            if set(value) & set(languages) and set(value) <= {*languages, "all", "macro", "mean"}:
                _add_by_language(key, value, by_language)
            elif all(isinstance(inner, Mapping) and inner and _flat(inner) for inner in value.values()):
                block.grids.append(_grid(label(*here), value))
            else:
                _read(value, block, by_language, languages, here)
        elif isinstance(value, str) and len(value) > LONG:
            block.texts.append(f"{label(*here)}: {value}")
        elif value not in ({}, [], None, ""):
            block.facts.append((label(*here), shown(value, here)))


def _flat(value: Mapping[str, Any]) -> bool:
    return not any(isinstance(inner, Mapping) for inner in value.values())


def _add_by_language(key: str, value: Mapping[str, Any], by_language: dict[str, Mapping[str, Any]]) -> None:
    if all(isinstance(inner, Mapping) for inner in value.values()):
        measures = dict.fromkeys(measure for inner in value.values() for measure in inner)
        for measure in measures:
            by_language[measure] = {code: inner.get(measure) for code, inner in value.items()}
    else:
        by_language[key] = value


def _by_language(measures: Mapping[str, Mapping[str, Any]], languages: Sequence[str]) -> Grid:
    extra = [code for values in measures.values() for code in values if code not in languages]
    codes = [*languages, *dict.fromkeys(extra)]
    rows = [
        [language(code) if code in languages else label(code), *(shown(v.get(code), (k,)) for k, v in measures.items())]
        for code in codes
    ]
    return Grid("Held-out measurements by language", ["Language", *(label(key) for key in measures)], rows)


def _grid(caption: str, value: Mapping[str, Mapping[str, Any]]) -> Grid:
    heads = list(dict.fromkeys(key for inner in value.values() for key in inner))
    rows = [[label(name), *(shown(inner.get(head), (head,)) for head in heads)] for name, inner in value.items()]
    return Grid(caption, ["", *map(label, heads)], rows)


def label(*path: str) -> str:
    """Keys as a reader's words.

    >>> label("held_out", "by_topic")
    'Held out, by topic'
    """
    words = ", ".join(str(key).replace("_", " ") for key in path)
    return words[:1].upper() + words[1:]


def shown(value: Any, path: Sequence[str]) -> str:
    """A value as text; fractions known by their name become percent.

    >>> shown(0.934, ["accuracy"]), shown(0.02, ["margin"]), shown([1, "a"], ["x"])
    ('93.4 %', '0.02', '1, a')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and 0 <= value <= 1 and any(word in key.lower() for key in path for word in FRACTIONS):
        return f"{percent(value)} %"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{label(key).lower()} {shown(inner, (key,))}" for key, inner in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(shown(inner, path) for inner in value) or "–"
    return str(value)


@dataclass(frozen=True, slots=True)
class VerdictCounts:
    """Counts by candidate: columns grouped by judge, then what happened to the responses."""

    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[str]]]


def verdict_counts(scores: Mapping[str, Any], responses: Iterable[Mapping[str, Any]]) -> VerdictCounts:
    """Every verdict of every judge by candidate, and how many answers were cut, empty or not asked for."""
    verdicts: dict[str, set[str]] = {}
    for counts in scores["counts"].values():
        for key in counts:
            judge, _, verdict = key.partition(": ")
            verdicts.setdefault(judge, set()).add(verdict)
    order = {verdict: i for i, verdict in enumerate(VERDICT_ORDER)}
    judges = [*(name for name in JUDGES if name in verdicts), *sorted(set(verdicts) - set(JUDGES))]
    groups = [(name, sorted(verdicts[name], key=lambda v: (order.get(v, len(order)), v))) for name in judges]
    tallies: dict[str, Counter[str]] = {entry["name"]: Counter() for entry in scores["candidates"]}
    for row in responses:
        tally = tallies[row["candidate"]]
        tally["all"] += 1
        tally[row["finish"]] += 1
        tally["empty"] += not row["text"].strip()
    rows = []
    for entry in by_kind(scores["candidates"]):
        found, tally = scores["counts"][entry["name"]], tallies[entry["name"]]
        cells = [count(found.get(f"{judge}: {verdict}", 0)) for judge, names in groups for verdict in names]
        rows.append((entry["name"], [*cells, *(count(tally[key]) for key in ("all", "length", "too_long", "empty"))]))
    return VerdictCounts([*groups, ("responses", ["all", "cut at the limit", "prompt too long", "empty"])], rows)
