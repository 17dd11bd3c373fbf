"""The side-by-side browser's data: every prompt and every candidate's answer to it, as JSON inside the page.

A model's text is hostile until shown to be harmless: here it becomes JSON in which nothing can end a script element, and
on the page it goes through textContent alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixmerge.errors import DataError
from mixmerge.report.words import PURPOSES, language

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def browser_data(
    candidates: Iterable[Mapping[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
    responses: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Prompts and answers, compact: an answer stands in its candidate's list at its prompt's place, None where missing.

    prompts: [set, language, pid, split, text, reference]; answers: [text, finish, tokens, {judge: verdict}].

    Raises:
        DataError: a response to a prompt, or of a candidate, that is not in the study.
    """
    rows = [entry["prompt"] for entry in prompts]
    places = {prompt.id: i for i, prompt in enumerate(rows)}
    kinds = {entry["name"]: entry["kind"] for entry in candidates}
    answers: dict[str, list[Any]] = {name: [None] * len(rows) for name in kinds}
    for row in responses:
        if row["prompt_id"] not in places or row["candidate"] not in answers:
            raise DataError(
                f"a response of '{row['candidate']}' to a prompt that is not in the study", where=row["prompt_id"]
            )
        found = [row["text"], row["finish"], row["tokens"], dict(row.get("verdicts") or {})]
        answers[row["candidate"]][places[row["prompt_id"]]] = found
    return {
        "candidates": [[name, kind] for name, kind in kinds.items()],
        "languages": [[code, language(code)] for code in dict.fromkeys(prompt.lang for prompt in rows)],
        "sets": [[name, purpose, PURPOSES[purpose]] for name, purpose in {p.set: p.purpose for p in rows}.items()],
        "prompts": [[p.set, p.lang, p.pid, p.split, p.text, " / ".join(p.references) or None] for p in rows],
        "answers": list(answers.values()),
    }


def embedded(data: Any) -> str:
    """JSON that can stand in a script element of any page, read back by JSON.parse as it was.

    A lone surrogate, which no UTF-8 file can hold, becomes U+FFFD.

    >>> embedded("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_ESCAPES)
