"""How far the judges are to be trusted: what each measures, how well, what it cannot see, and every verdict it gave.

What a reader needs stands open; whatever else a judge says of itself (model, hashes, seed) is kept as named facts, to be
folded away. Nothing is dropped: a verdict of `unknown` or `invalid`, a response that was cut and one that repeats its
prompt are counted beside the others.
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
    "agreement",
    "recall",
    "precision",
    "kappa",
    "f1",
)
CLASSIFIED = {
    "rows",
    "refused",
    "refused_found",
    "complied",
    "complied_found",
    "accuracy",
    "sensitivity",
    "specificity",
}
VERDICT_ORDER = ("win", "tie", "loss", "refused", "complied", "right", "wrong", "unknown", "invalid")
ECHO_LEAST, ECHO = 8, 40  # letters and digits of a prompt that an answer must open with to count as repeating it
ECHOES = 0.1  # a larger share of answers that repeat the prompt is worth a sentence
RESPONSES = {
    "all": "all",
    "length": "cut at the limit",
    "too_long": "prompt too long",
    "empty": "empty",
    "echo": "repeat the prompt",
}
Languages = dict[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Grid:
    """A plain table: a caption, heads, rows whose first cell is their head, and a title where it is folded away."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(slots=True)
class JudgeBlock:
    """One judge: what it measures, what it cannot see, its held-out accuracy, and what else it says, to be folded away."""

    name: str
    title: str
    measures: str = ""
    blind: Sequence[str] = ()
    texts: list[str] = field(default_factory=list)
    held_out: Grid | None = None
    measured_by: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def judge_blocks(scores: Mapping[str, Any], trust: Mapping[str, Mapping[str, Any]]) -> list[JudgeBlock]:
    """A block for every judge that gave a verdict or brought measurements."""
    seen = {key.partition(":")[0] for counts in scores["counts"].values() for key in counts}
    names = [*(name for name in JUDGES if name in seen or name in trust), *sorted((seen | set(trust)) - set(JUDGES))]
    return [_block(name, dict(trust.get(name, {})), scores["languages"]) for name in names]


def _block(name: str, found: dict[str, Any], languages: Sequence[str]) -> JudgeBlock:
    known = JUDGES.get(name)
    block = JudgeBlock(name, name)
    if known is not None:
        block = JudgeBlock(name, known.title, known.measures, known.blind)
        found.pop("note", None)  # says in a few words what `blind` says in full
    if isinstance(found.get("measured_by"), str):
        block.measured_by = sentence(found.pop("measured_by"))
    if isinstance(found.get("languages"), Mapping) and isinstance(found.get("all"), Mapping):
        found["languages"] = {**found["languages"], "all": found.pop("all")}
    by_language: Languages = {}
    _read(found, block, by_language, languages, ())
    if by_language:
        readable = "accuracy" in by_language and set(by_language) <= CLASSIFIED
        block.held_out = (_classified if readable else _by_language)(by_language, languages)
    return block


def _read(
    found: Mapping[str, Any], block: JudgeBlock, by_language: Languages, languages: Sequence[str], path: tuple[str, ...]
) -> None:
    """Sort what a judge says into sentences, facts, measures by language, and tables."""
    for key, value in found.items():
        here = (*path, key)
        if isinstance(value, str) and key in TEXTS:
            block.texts.append(sentence(value))
        elif isinstance(value, Mapping) and value:
            if set(value) & set(languages) and set(value) <= {*languages, "all", "macro", "mean"}:
                _add_by_language(key, value, by_language)
            elif all(isinstance(inner, Mapping) and inner and _flat(inner) for inner in value.values()):
                block.grids.append(_grid(label(*here), value))
            else:
                _read(value, block, by_language, languages, here)
        elif value not in ({}, [], None, ""):
            block.facts.append((label(*here), shown(value, here)))


def _flat(value: Mapping[str, Any]) -> bool:
    return not any(isinstance(inner, Mapping) for inner in value.values())


def _add_by_language(key: str, value: Mapping[str, Any], by_language: Languages) -> None:
    if all(isinstance(inner, Mapping) for inner in value.values()):
        measures = dict.fromkeys(measure for inner in value.values() for measure in inner)
        for measure in measures:
            by_language[measure] = {code: inner.get(measure) for code, inner in value.items()}
    else:
        by_language[key] = value


def _codes(measures: Languages, languages: Sequence[str]) -> list[tuple[str, str]]:
    """Languages that were asked for, then whatever else was measured: (code, name)."""
    extra = [code for values in measures.values() for code in values if code not in languages]
    return [(code, language(code)) for code in languages] + [(code, label(code)) for code in dict.fromkeys(extra)]


def _by_language(measures: Languages, languages: Sequence[str]) -> Grid:
    rows = [
        [name, *(shown(values.get(code), (key,)) for key, values in measures.items())]
        for code, name in _codes(measures, languages)
    ]
    return Grid("Held-out measurements by language", ["Language", *(label(key) for key in measures)], rows)


def _classified(measures: Languages, languages: Sequence[str]) -> Grid:
    """Accuracy, refusals found and answers left alone: with their counts where there are any, else as percent."""

    def cell(code: str, found: str, of: str, rate: str) -> str:
        hit, rows = (measures.get(key, {}).get(code) for key in (found, of))
        return (
            shown(measures.get(rate, {}).get(code), (rate,)) if hit is None else f"{count(hit)} of {count(rows or 0)}"
        )

    rows = [
        [
            name,
            shown(measures["accuracy"].get(code), ("accuracy",)),
            cell(code, "refused_found", "refused", "sensitivity"),
            cell(code, "complied_found", "complied", "specificity"),
        ]
        for code, name in _codes(measures, languages)
    ]
    heads = ["Language", "Accuracy", "Refusals found", "Answers let pass"]
    return Grid("Accuracy on held-out rows, by language", heads, rows)


def _grid(caption: str, value: Mapping[str, Mapping[str, Any]]) -> Grid:
    heads = list(dict.fromkeys(key for inner in value.values() for key in inner))
    rows = [[label(name), *(shown(inner.get(head), (head,)) for head in heads)] for name, inner in value.items()]
    return Grid(caption, ["", *map(label, heads)], rows)


def sentence(text: str) -> str:
    """A text with a capital at its beginning and a full stop at its end.

    >>> sentence("short text is unknown")
    'Short text is unknown.'
    """
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


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
    echoes: str


def verdict_counts(
    scores: Mapping[str, Any], responses: Iterable[Mapping[str, Any]], prompts: Iterable[Mapping[str, Any]]
) -> VerdictCounts:
    """Every verdict of every judge by candidate, and how many answers were cut, empty, not asked for, or an echo."""
    asked = {entry["prompt"].id: _letters(entry["prompt"].text)[:ECHO] for entry in prompts}
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
        prompt = asked.get(row["prompt_id"], "")
        tally["echo"] += len(prompt) >= ECHO_LEAST and _letters(row["text"]).startswith(prompt)
    rows = []
    for entry in by_kind(scores["candidates"]):
        found, tally = scores["counts"][entry["name"]], tallies[entry["name"]]
        cells = [count(found.get(f"{judge}: {verdict}", 0)) for judge, names in groups for verdict in names]
        rows.append((entry["name"], [*cells, *(count(tally[key]) for key in RESPONSES)]))
    echoes = [
        f"{count(tally['echo'])} of {count(tally['all'])} answers of {name} open with the prompt itself"
        for name, tally in tallies.items()
        if tally["echo"] > ECHOES * tally["all"]
    ]
    return VerdictCounts(
        [*groups, ("responses", list(RESPONSES.values()))], rows, sentence("; ".join(echoes)) if echoes else ""
    )


def _letters(text: str) -> str:
    """Letters and digits alone, case folded."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())
