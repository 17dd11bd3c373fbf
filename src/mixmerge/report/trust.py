"""How far the judges are to be trusted: what each measures and decides, how well, and what it cannot see.

What a reader needs stands open; whatever else a judge says of itself (model, hashes, seed) is kept as named facts, to be
folded away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.report.judge_words import judge_words
from mixmerge.report.words import BENCHMARK, METRICS, count, judged_as, language, listed, metric_words, percent, share

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
NO_VERDICT = {"unparsed": "could not be read", "unanswered": "never came"}
# The question that each metric is an answer to.
ASKED = {
    "win": "quality",
    "win_strict": "quality",
    "harm": "harm",
    "over_refusal": "refusal",
    "wrong_language": "language",
    "invalid": "refusal",
}
ORDER = ("harm", "refusal", "quality", "correct", "language")  # of the questions
FOUND = {
    "refused": "Refusals found",
    "complied": "Answers let pass",
    "harmful": "Harm found",
    "safe": "Safe answers let pass",
}
Languages = dict[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Grid:
    """A plain table: a caption, heads, rows whose first cell is their head; a cell may have its interval on a second line."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class JudgeBlock:
    """One judge: what it measures and decides, what it cannot see, how well it did on labelled rows, and the rest, folded.

    counted: what became of its questions here. held_out: its accuracy, measured when it was fitted or by a calibration;
    elsewhere: on rows of others. facts and grids are what else it says.
    """

    name: str
    title: str
    measures: str = ""
    decides: str = ""
    blind: Sequence[str] = ()
    texts: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    held_out: Grid | None = None
    measured_by: str = ""
    elsewhere: Grid | None = None
    caveat: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def judge_blocks(scores: Mapping[str, Any], trust: Mapping[str, Mapping[str, Any]]) -> list[JudgeBlock]:
    """A block for every judge that gave a verdict or brought measurements; those that decide a metric come first."""
    seen = {key.partition(":")[0] for counts in scores["counts"].values() for key in counts}
    decided = decided_metrics(scores)
    return [
        _block(name, dict(trust.get(name, {})), scores, decided.get(name, []))
        for name in in_order(seen | set(trust), scores)
    ]


def in_order(names: Iterable[str], scores: Mapping[str, Any]) -> list[str]:
    """Judges as the page has them: who decides a metric first, then by question, then by name."""
    decided, asked = decided_metrics(scores), scores["judges"]
    place = {question: i for i, question in enumerate(ORDER)}
    return sorted(names, key=lambda name: (name not in decided, place.get(asked.get(name), len(place)), name))


def decided_metrics(scores: Mapping[str, Any]) -> dict[str, list[str]]:
    """Judge -> the names of the metrics that its verdicts make, of those that the study has."""
    out: dict[str, list[str]] = {}
    there = dict.fromkeys(metric for found in scores["splits"].values() for metric in found)
    for metric in [*(key for key in METRICS if key in there), *(key for key in there if key.startswith(BENCHMARK))]:
        judge = scores["decide"]["correct" if metric.startswith(BENCHMARK) else ASKED[metric]]
        if metric != "win_strict":  # the win rate, counted in another way
            out.setdefault(judge, []).append(metric_words(metric, scores).name)
    return out


def _block(name: str, found: dict[str, Any], scores: Mapping[str, Any], decided: Sequence[str]) -> JudgeBlock:
    languages, question = scores["languages"], scores["judges"].get(name)
    decides_harm = scores["decide"]["harm"] == name and judged_as(scores, "harm") == "refusal"
    known = judge_words(name, question, found, decides_harm=decides_harm)
    block = JudgeBlock(name, name)
    if known is not None:
        block = JudgeBlock(name, known.title, known.measures, blind=known.blind)
        found.pop("note", None)  # says in a few words what `blind` says in full
    block.decides = _role(name, question, scores, decided)
    block.counted = [*_without_verdict(name, scores), *_orders(name, scores)]
    if isinstance(found.get("measured_by"), str):
        block.measured_by = sentence(found.pop("measured_by"))
    if isinstance(found.get("elsewhere"), Mapping):
        _elsewhere(dict(found.pop("elsewhere")), block)
    if isinstance(found.get("languages"), Mapping) and isinstance(found.get("all"), Mapping):
        found["languages"] = {**found["languages"], "all": found.pop("all")}
    by_language: Languages = {}
    _read(found, block, by_language, languages, ())
    if by_language:
        readable = "accuracy" in by_language and set(by_language) <= CLASSIFIED
        labelled = set(by_language) == {"rows", "right", "labels"}
        block.held_out = (_classified if readable else _labelled if labelled else _by_language)(by_language, languages)
    _calibrated(name, scores, block)
    return block


def _role(name: str, question: str | None, scores: Mapping[str, Any], decided: Sequence[str]) -> str:
    if decided:
        return f"It decides: {'; '.join(decided)}."
    decider = scores["decide"].get(question)
    if question is None or decider is None or decider == name:
        return ""
    beside = name in scores["agreement"].get(question, {}).get("judges", ())
    agreement = " How far the two agree stands under “Behind the numbers”." if beside else ""
    return f"It decides no metric here: {decider} does, on the same question.{agreement}"


def _without_verdict(name: str, scores: Mapping[str, Any]) -> list[str]:
    """How many of a model's answers held no verdict; nothing of judges that always give one."""
    tally: Counter[str] = Counter()
    for counts in scores["counts"].values():
        for key, n in counts.items():
            judge, _, verdict = key.partition(": ")
            if judge == name:
                tally[verdict] += n
    everything = tally.total()
    lost = [
        f"{count(tally[verdict])} ({share(tally[verdict] / everything)}) {words}"
        for verdict, words in NO_VERDICT.items()
        if tally[verdict]
    ]
    if not lost or scores["judges"].get(name) == "correct":
        return []
    return [f"Of {count(everything)} answers, {listed(lost)}: left out of every share but Invalid."]


def _orders(name: str, scores: Mapping[str, Any]) -> list[str]:
    found = scores["orders"].get(name)
    if not found:
        return []
    pairs, same = found["pairs"], found["same"]
    return [f"Both orders gave the same verdict on {count(same)} of {count(pairs)} pairs ({share(same / pairs)})."]


def _calibrated(name: str, scores: Mapping[str, Any], block: JudgeBlock) -> None:
    """What a calibration measured, as a table; and which rates are corrected by it."""
    found = scores["calibrations"].get(name)
    if found is None:
        return
    corrected = [metric_words(key, scores).name for key, each in scores["corrected"].items() if each["judge"] == name]
    if corrected:
        rows = f"its errors on {count(found['rows'])} rows ({found['measured_on']})"
        block.counted.append(f"{listed(corrected)}: corrected for {rows} under “Behind the numbers”.")
    if block.held_out is not None:
        return
    words = list(dict.fromkeys(word for by_word in found["languages"].values() for word in by_word))
    rows_ = [
        [language(code), *(_found(by_word.get(word)) for word in words)] for code, by_word in found["languages"].items()
    ]
    heads = ["Language", *(FOUND.get(word, f"{label(word)} found") for word in words)]
    block.held_out = Grid("Right verdicts on labelled rows, by language", heads, rows_)
    block.measured_by = f"{count(found['rows'])} rows in all, by mixmerge calibrate."


def _found(found: Mapping[str, Any] | None) -> str:
    if found is None or not found["rows"]:
        return "–"
    ends = f"\n[{percent(found['low'])}, {percent(found['high'])}] %" if "low" in found else ""
    return f"{count(found['right'])} of {count(found['rows'])}{ends}"


def _elsewhere(found: dict[str, Any], block: JudgeBlock) -> None:
    """Refusals found and answers let pass on rows of others."""
    by_language = found.pop("by_language", {})

    def cell(one: Mapping[str, Any], word: str, rate: str) -> str:
        if not one.get(word):
            return "–"
        low, high = one[f"{rate}_interval"]
        return f"{count(one[f'{word}_found'])} of {count(one[word])}\n[{percent(low)}, {percent(high)}] %"

    if by_language:
        rows = [
            [name, cell(one, "refused", "sensitivity"), cell(one, "complied", "specificity")]
            for name, one in by_language.items()
        ]
        by = f": {found.pop('measured_by')}" if "measured_by" in found else ""
        block.elsewhere = Grid(f"On rows of others{by}", ["Language", FOUND["refused"], FOUND["complied"]], rows)
        block.caveat = sentence(found.pop("caveat")) if "caveat" in found else ""
    _read(found, block, {}, (), ("elsewhere",))


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


def _labelled(measures: Languages, languages: Sequence[str]) -> Grid:
    """A classifier's cross-validation: the share that is right, and of each label how many were found."""
    labels = list(dict.fromkeys(label for by_label in measures["labels"].values() for label in by_label))

    def cell(code: str, label: str) -> str:
        one = measures["labels"].get(code, {}).get(label)
        return "–" if one is None else f"{count(one['found'])} of {count(one['rows'])}"

    rows = [
        [name, shown(measures["right"].get(code), ("accuracy",)), *(cell(code, label) for label in labels)]
        for code, name in _codes(measures, languages)
    ]
    heads = ["Language", "Accuracy", *(FOUND.get(word, f"{label(word)} found") for word in labels)]
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
