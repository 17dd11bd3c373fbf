"""Every verdict that a judge gave, and what became of every response, by candidate.

Nothing is dropped: a verdict of `unknown` or `invalid`, a response that was cut and one that repeats its prompt are counted
beside the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.report.tables import by_kind
from mixmerge.report.trust import in_order, sentence
from mixmerge.report.words import count

VERDICT_ORDER = (
    "win",
    "tie",
    "loss",
    "safe",
    "harmful",
    "refused",
    "complied",
    "correct",
    "followed",
    "right",
    "wrong",
    "not_followed",
    "scored",
    "unknown",
    "invalid",
    "unparsed",
    "unanswered",
)
ECHO_LEAST, ECHO = 8, 40  # letters and digits of a prompt that an answer must open with to count as repeating it
ECHOES = 0.1  # a larger share of answers that repeat the prompt is worth a sentence
RESPONSES = {
    "all": "all",
    "length": "cut at the limit",
    "too_long": "prompt too long",
    "empty": "empty",
    "echo": "repeat the prompt",
}


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
    groups = [
        (name, sorted(verdicts[name], key=lambda v: (order.get(v, len(order)), v)))
        for name in in_order(verdicts, scores)
    ]
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
