"""What a judge is, the rows it writes, and the judge that needs no model: nearness to a reference answer.

A judge maps items (a prompt, a response, where it compares also an opponent's response) to verdicts, one an item and in
order. Every item gets a verdict: what cannot be judged has a verdict of its own (`unknown`, `invalid`), never none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mixmerge.errors import DataError
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.prompts import Prompt
from mixmerge.whole import write_whole

# The judges that are always there, with the question that each answers, and which of them decides a question by default.
LOCAL = {"quality": "quality", "refusal": "refusal", "language": "language"}
DECIDE = {"quality": "quality", "harm": "refusal", "refusal": "refusal", "language": "language"}
# Outcomes of a judge that is a model: its server gave no answer, or its answer holds no verdict.
NO_VERDICT = ("unanswered", "unparsed")


@dataclass(frozen=True, slots=True)
class Item:
    """A response to be judged; `opponent` is the other candidate's response to the same prompt, for pairwise judges."""

    prompt: Prompt
    response: str
    opponent: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's finding; `value` is its number where it has one, `details` what a reader may want beside it."""

    prompt: Prompt
    judge: str
    verdict: str
    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The JSON-serialisable row that is written."""
        return {**self.prompt.key(), "judge": self.judge, "verdict": self.verdict, "value": self.value, **self.details}


class Judge(Protocol):
    """Responses in, verdicts out."""

    @property
    def name(self) -> str: ...

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Every verdict that it can give."""
        ...

    def describe(self) -> dict[str, Any]:
        """Who judges and how far to be trusted, JSON-serialisable; printed in every report."""
        ...

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order."""
        ...


def pair_up(
    prompts: Sequence[Prompt],
    responses: Iterable[Mapping[str, Any]],
    opponents: Iterable[Mapping[str, Any]] | None = None,
) -> list[Item]:
    """Items in the order of the prompts, from response rows as `generate` writes them.

    Raises:
        DataError: a prompt without a response (or, where opponents are given, without an opponent's).
    """
    texts = {row["prompt_id"]: row["text"] for row in responses}
    others = None if opponents is None else {row["prompt_id"]: row["text"] for row in opponents}
    for what, found in (("response", texts), ("opponent's response", others)):
        if found is not None and (missing := [p.id for p in prompts if p.id not in found]):
            raise DataError(f"{len(missing)} prompts have no {what}", where=missing[0], do="generate again to carry on")
    return [Item(p, texts[p.id], None if others is None else others[p.id]) for p in prompts]


def write_verdicts(judge: Judge, verdicts: Sequence[Verdict], out: Path) -> dict[str, int]:
    """Write the verdicts as JSONL, whole or not at all, and count them: every verdict the judge can give, zeros too."""
    rows = (json.dumps(verdict.row(), ensure_ascii=False, allow_nan=False) + "\n" for verdict in verdicts)
    write_whole(out, "".join(rows))
    counts = Counter(verdict.verdict for verdict in verdicts)
    return {name: counts[name] for name in judge.verdicts}


class ReferenceJudge:
    """Win, loss or tie, seen from the candidate: whose response is nearer to the reference answer, by chrF++?

    chrF++ (Popović 2017; sacrebleu, characters 1..6 and words 1..2) as a fraction 0..1. A difference of at most `margin`
    is a tie. An empty or degenerate response counts as 0 and loses to a sound one; two of them tie. `value` is the
    difference, above 0 where the candidate is nearer; both scores stand in the row. Of several references the one nearest
    to a response counts. Nearness to a reference is a weak sign of quality in a single row; it is meant for shares over
    many prompts.
    """

    name = "reference"
    verdicts = ("win", "loss", "tie")

    def __init__(self, margin: float = 0.02) -> None:
        if not 0 <= margin < 1:
            raise ValueError(f"margin {margin} is not in [0, 1): it is a difference of chrF++ as fractions")
        from sacrebleu.metrics import CHRF

        self.margin = margin
        self._metric = CHRF(word_order=2)

    def describe(self) -> dict[str, Any]:
        # a signature exists only after a score, because it names the number of references
        self._metric.sentence_score("a", ["a"])
        return {
            "name": self.name,
            "kind": "reference",
            "metric": "chrF++",
            "signature": str(self._metric.get_signature()),
            "margin": self.margin,
            "note": "compares with one reference answer; an empty or degenerate response loses to a sound one",
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            DataError: a prompt without a reference answer.
            ValueError: an item without an opponent.
        """
        return [self._judge(item) for item in items]

    def _judge(self, item: Item) -> Verdict:
        references, opponent = item.prompt.references, item.opponent
        if not references:
            raise DataError(
                "no reference answer to compare with", where=item.prompt.id, do="add a reference to the row"
            )
        if opponent is None:
            raise ValueError(f"{item.prompt.id}: a pairwise judge needs an opponent's response")
        scores = [round(self._metric.sentence_score(t, references).score / 100, 6) for t in (item.response, opponent)]
        broken = [is_degenerate(t) for t in (item.response, opponent)]
        mine, theirs = (0.0 if bad else score for score, bad in zip(scores, broken, strict=True))
        value = round(mine - theirs, 6)
        if broken[0] != broken[1]:
            verdict = "loss" if broken[0] else "win"
        elif abs(value) <= self.margin:
            verdict = "tie"
        else:
            verdict = "win" if value > 0 else "loss"
        details = {
            "chrf": scores[0],
            "opponent_chrf": scores[1],
            "degenerate": broken[0],
            "opponent_degenerate": broken[1],
        }
        return Verdict(item.prompt, self.name, verdict, value, details)
