"""Ready-made ways to read known prompt sets, by name: what a recipe's `like:` stands for.

Each says the set's purpose, languages, columns and filter as its publishers' rows (or a pack of several sets in one file)
have them, and which check fits. The data themselves are not here: the user gives a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixmerge.errors import UserError, did_you_mean
from mixmerge.evaluate.prompts import Purpose


@dataclass(frozen=True, slots=True)
class ReadySet:
    """How to read one set; `check` is a kind of `evaluate.checks`, None where a judge has to read the answers."""

    purpose: Purpose
    covers: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    language_in_id: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    check: str | None = None
    turns: bool = False
    note: str = ""

    def reading(self) -> dict[str, Any]:
        """The keyword arguments of `read_prompts`."""
        return {
            "purpose": self.purpose,
            "covers": self.covers,
            "columns": dict(self.columns),
            "where": dict(self.where),
            "language_in_id": self.language_in_id,
            "splits": dict(self.splits),
            "turns": self.turns,
        }


@dataclass(frozen=True, slots=True)
class PromptReading:
    """How one prompt set of a recipe is read: its purpose, its check if it has one, and what `read_prompts` is told."""

    purpose: Purpose
    check: str | None
    threshold: float | None
    arguments: Mapping[str, Any]


def prompt_reading(spec: Mapping[str, Any], *, seed: int) -> PromptReading:
    """What a recipe's prompt set says, with the ready-made way that `like` names behind it; `seed` draws its dev share.

    spec: like, purpose, columns, where, languages, language_in_id, splits, dev, ask, check, threshold; what is empty or None
    is left to `like`.

    Raises:
        UserError: an unknown `like`, or a benchmark without a check.
    """
    like = spec.get("like")
    if like is not None and like not in READY:
        raise UserError(f"no ready-made prompt set '{like}'", do=did_you_mean(like, READY))
    known = ReadySet("general", ()) if like is None else READY[like]
    covers = spec.get("languages") or (None if like is None else known.covers)
    purpose, check = spec.get("purpose") or known.purpose, spec.get("check") or known.check
    if purpose == "benchmark" and check is None:
        raise UserError("a benchmark needs a check", do="say how right answers are known, e.g. check: exact")
    arguments = {
        "purpose": purpose,
        "columns": {**known.columns, **spec.get("columns", {})},
        "where": {**known.where, **spec.get("where", {})},
        "covers": covers,
        "language_in_id": spec.get("language_in_id") or known.language_in_id,
        "splits": {**known.splits, **spec.get("splits", {})},
        "dev_share": spec.get("dev"),
        "ask": spec.get("ask", {}),
        "turns": known.turns,
        "seed": seed,
    }
    return PromptReading(purpose, check, spec.get("threshold"), arguments)


_SIX = ("en", "fr", "hi", "es", "ru", "ar")
_FIVE = ("en", "fr", "es", "ru", "ar")
_PID = {"id": "pid"}
_ANSWER = {"reference": "answer"}
_IN_ID = "-{lang}-"

READY: Mapping[str, ReadySet] = {
    "xsafety": ReadySet("harmful", _SIX, _PID, {"set": "xsafety*"}, note="arXiv 2310.00905; parallel"),
    "multijail": ReadySet("harmful", ("en", "ar"), _PID, {"set": "multijail*"}, note="arXiv 2310.06474; parallel"),
    "ailuminate": ReadySet(
        "harmful", ("en", "fr"), {}, {"set": "ailuminate*"}, note="arXiv 2503.05731, demo prompts; not parallel"
    ),
    "jailbreakbench": ReadySet(
        "harmful", _FIVE, _PID, {"set": "jailbreakbench*"}, note="arXiv 2404.01318, translated; parallel, no Hindi"
    ),
    "polyrefuse-harmful": ReadySet(
        "harmful", _FIVE, _PID, {"set": "polyrefuse-harmful*"}, note="arXiv 2505.17306; parallel, no Hindi"
    ),
    "simple-safety-tests": ReadySet(
        "harmful", ("en",), {}, {"set": "simple-safety-tests"}, note="arXiv 2311.08370; English"
    ),
    "xstest-unsafe": ReadySet(
        "harmful", ("en",), {}, {"set": "xstest-unsafe"}, note="arXiv 2308.01263, the contrasts; English"
    ),
    "xstest": ReadySet(
        "harmless",
        ("en",),
        {},
        {"set": "xstest-safe"},
        splits={"*": "test"},
        note="arXiv 2308.01263, the safe prompts that look harmful; English",
    ),
    "polyrefuse-harmless": ReadySet(
        "harmless",
        _FIVE,
        _PID,
        {"set": "polyrefuse-harmless*"},
        splits={"*": "test"},
        note="plain instructions, not look-alikes; parallel, no Hindi",
    ),
    "vicuna": ReadySet(
        "general",
        ("en", "fr", "hi", "es", "ar"),
        {},
        {"set": "vicuna80"},
        _IN_ID,
        note="MultilingualSIFT's translations; parallel, no Russian, no references",
    ),
    "mt-bench": ReadySet(
        "general",
        ("en", "fr", "ru"),
        {},
        {"set": "mt-bench"},
        _IN_ID,
        turns=True,
        note="arXiv 2306.05685, first turns only; parallel, partly localised; few have references",
    ),
    "hplt50": ReadySet(
        "general",
        ("en", "fr", "hi", "es", "ru"),
        {},
        {"set": "hplt50*"},
        _IN_ID,
        note="parallel, no Arabic, no references",
    ),
    "multiq": ReadySet("general", _SIX, _PID, {"set": "multiq*"}, note="arXiv 2403.03814; parallel, no references"),
    "language-confusion": ReadySet(
        "general",
        ("fr", "hi", "es", "ru", "ar"),
        {},
        {"set": "language-confusion/crosslingual/*"},
        _IN_ID,
        note="arXiv 2406.20052, cross-lingual: asks in English for an answer in the row's language; no references",
    ),
    "marco-mif": ReadySet(
        "benchmark",
        _FIVE,
        {"id": "key", "instructions": "instruction_id_list", "arguments": "kwargs"},
        check="instructions",
        note="arXiv 2507.11882, IFEval localised; parallel, no Hindi",
    ),
    "mgsm": ReadySet(
        "benchmark",
        ("en", "fr", "es", "ru"),
        {**_PID, **_ANSWER},
        {"set": "mgsm*"},
        check="number",
        note="arXiv 2210.03057; parallel, no Hindi and no Arabic",
    ),
    "hawp": ReadySet("benchmark", ("hi",), _ANSWER, {"set": "hawp*"}, check="number", note="Hindi word problems"),
    "xquad": ReadySet(
        "benchmark",
        ("en", "hi", "es", "ru", "ar"),
        {**_PID, **_ANSWER},
        {"set": "xquad*"},
        check="span",
        note="arXiv 1910.11856; passage, then question; parallel, no French",
    ),
    "arcd": ReadySet(
        "benchmark", ("ar",), _ANSWER, {"set": "arcd*"}, check="span", note="arXiv 1906.05394; passage, then question"
    ),
    "mmlu": ReadySet(
        "benchmark",
        ("hi", "ar"),
        {**_PID, **_ANSWER, "prompt": "question", "choices": "choices"},
        {"set": "mmlu*"},
        check="choice",
        note="arXiv 2009.03300, machine-translated; parallel by subject and number",
    ),
}
