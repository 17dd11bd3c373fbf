"""What a judge is asked: rubrics as versioned files, one a question, and the messages made from them.

A rubric is a file with a head (`name`, `version`, `question`, `reason`), a part `# system` and a part `# user`. Its
placeholders are filled in one pass, so what a response holds is never filled in. The language is a field, and one file
serves every language; the user's own file is held to the same rules as ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mixmerge.errors import DataError, did_you_mean, reason
from mixmerge.evaluate.fence import Shown, draw_mark, fenced
from mixmerge.evaluate.verdicts import WORDS, Grammar, verdict_form

Question = Literal["quality", "harm", "refusal"]
HEAD = ("name", "version", "question", "reason")
JUDGED = {"quality": ("response_a", "response_b"), "harm": ("response",), "refusal": ("response",)}

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Rubric:
    """A question to a judge; `reason` says whether it gives one before its verdict, `sha256` is that of the file's text."""

    name: str
    version: str
    question: Question
    reason: bool
    system: str
    user: str
    sha256: str

    def describe(self) -> dict[str, Any]:
        """Which rubric it is, JSON-serialisable."""
        return {"name": self.name, "version": self.version, "question": self.question, "sha256": self.sha256}


def shipped_rubric(question: Question) -> Rubric:
    """The rubric of ours for a question."""
    file = files("mixmerge.evaluate").joinpath("rubrics", f"{question}.md")
    return parse_rubric(file.read_text(encoding="utf-8"), where=f"{question}.md")


def read_rubric(path: Path) -> Rubric:
    """The rubric in a file of the user's.

    Raises:
        DataError: a file that cannot be read, or is no rubric: see `parse_rubric`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as a rubric: {reason(error)}", where=str(path)) from error
    return parse_rubric(text, where=str(path))


def parse_rubric(text: str, *, where: str) -> Rubric:
    """A rubric from its text.

    Placeholders: the judged text ({response}; of quality {response_a} and {response_b}) and {answer}, which says the form
    of a verdict, once each; {request} at most once; {language} and {mark} wherever they are wanted. What others wrote
    stands in the user part only.

    Raises:
        DataError: an unknown or missing line of the head, a part that is missing or empty, a placeholder that is unknown,
            missing, repeated or out of place; names the file.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() in ("# system", "# user")]
    if [lines[i].strip() for i in starts] != ["# system", "# user"]:
        raise DataError(
            "a rubric has a line `# system` and after it a line `# user`, once each", where=where, do="see harm.md"
        )
    head = _head(lines[: starts[0]], where)
    system, user = "\n".join(lines[starts[0] + 1 : starts[1]]).strip(), "\n".join(lines[starts[1] + 1 :]).strip()
    if not system:
        raise DataError("nothing stands under `# system`", where=where)
    question = cast(Question, head["question"])
    _check_placeholders(system, user, question, where)
    digest = hashlib.sha256("\n".join(lines).rstrip().encode("utf-8", "surrogatepass")).hexdigest()
    return Rubric(head["name"], head["version"], question, head["reason"] == "yes", system, user, digest)


@dataclass(frozen=True, slots=True)
class Asked:
    """Messages to a judge and the mark that its verdict must carry."""

    messages: list[dict[str, str]]
    mark: str


def ask_by_rubric(
    rubric: Rubric, grammar: Grammar, *, seed: int, key: str, language: str, request: Shown, judged: Sequence[Shown]
) -> Asked:
    """The messages of one request: a system part, the same for all, and a user part with the fenced texts.

    key: the prompt's id. judged: the response; of quality those called A and B.
    """
    mark = draw_mark(seed, key, [language, request.text, *(each.text for each in judged)])
    words = WORDS[rubric.question]
    values = {
        "mark": mark,
        "language": language,
        "request": fenced("request", request.text, mark),
        "answer": verdict_form(grammar, words, mark, reason=rubric.reason),
    }
    for name, each in zip(JUDGED[rubric.question], judged, strict=True):
        values[name] = fenced(name.replace("_", " "), each.text, mark)
    parts = {"system": rubric.system, "user": rubric.user}
    return Asked([{"role": role, "content": _filled(part, values)} for role, part in parts.items()], mark)


def _filled(part: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], part)


def _head(lines: list[str], where: str) -> dict[str, str]:
    head: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or key not in HEAD:
            raise DataError(
                f"{line.strip()!r} is no line of a rubric's head", where=f"{where}:{number}", do=did_you_mean(key, HEAD)
            )
        if key in head or not value:
            raise DataError(f"{key!r} has {'two values' if key in head else 'no value'}", where=f"{where}:{number}")
        head[key] = value
    missing = [key for key in HEAD if key not in head]
    if missing:
        raise DataError(f"the head has no {missing[0]!r}", where=where, do=f"add a line '{missing[0]}: ...' at the top")
    for key, known in (("question", get_args(Question)), ("reason", ("yes", "no"))):
        if head[key] not in known:
            raise DataError(f"{key} is {head[key]!r}", where=where, do=did_you_mean(head[key], known))
    return head


def _check_placeholders(system: str, user: str, question: Question, where: str) -> None:
    judged = JUDGED[question]
    known = {*judged, "request", "answer", "language", "mark"}
    there = {"# system": _PLACEHOLDER.findall(system), "# user": _PLACEHOLDER.findall(user)}
    for part, names in there.items():
        for name in names:
            if name not in known:
                raise DataError(f"unknown placeholder {{{name}}} in {part}", where=where, do=did_you_mean(name, known))
    for name in ("request", *judged):
        if name in there["# system"]:
            raise DataError(f"{{{name}}} is in # system", where=where, do="what others wrote belongs in # user")
    names = there["# system"] + there["# user"]
    for name in (*judged, "answer", "request"):
        if names.count(name) > 1 or (name != "request" and name not in names):
            found = "no" if name not in names else str(names.count(name))
            raise DataError(f"{found} {{{name}}} in a rubric of {question}", where=where, do=f"put {{{name}}} in once")
