"""From records of the formats people have to the one row that we train on.

One idea: a row is a prompt (system turn or none, then user and assistant in turn, ending with user) and the one answer
to learn; a preference row also keeps its rejected answer. The format is recognised by the columns that hold
something; `columns` maps ours to the file's. A record that fits no format, or whose text is empty or out of order, is
a `RowError` naming file, row and kind of fault.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from mixmerge.data.account import RowError
from mixmerge.data.files import Record
from mixmerge.errors import DataError, did_you_mean

EMPTY, MISSING, ORDER = "empty text", "missing column", "roles out of order"  # kinds with several places


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One training example; `completion` is the chosen answer where the source holds a preference."""

    id: str
    lang: str
    prompt: list[Message]
    completion: str
    rejected: str | None = None


def to_row(record: Record, *, where: str, lang: str, columns: Mapping[str, str]) -> Row:
    """One record as a row; the id is the record's `id`, else the row number at the end of `where`.

    Raises:
        RowError: missing column, empty text, roles out of order, a preference between equal sides.
        DataError: `columns` maps a column that we do not know.
    """
    record = _rename(record, where, columns)
    filled = {key for key, value in record.items() if value is not None}
    fitting = [needs for needs in FORMATS if set(needs) <= filled]
    # A mapped column is a choice of format, so a file that also has `messages` is read as the user said.
    chosen = next((needs for needs in fitting if _uses(columns) & set(needs)), None) or next(iter(fitting), None)
    if chosen is None:
        empty = next((needs for needs in FORMATS if set(needs) <= record.keys()), None)
        if empty is not None:
            hole = next(name for name in empty if record[name] is None)
            raise RowError(f"{_label(hole, columns)} is empty", kind=EMPTY, where=where)
        raise RowError(
            f"{_lacking(record)}; columns found: {', '.join(sorted(record)) or 'none'}",
            kind=MISSING,
            where=where,
            do="map columns to ours, as in 'columns: {prompt: question, completion: answer}'",
        )
    prompt, completion, rejected = FORMATS[chosen](record, where, columns)
    _check_order(prompt, where)
    number = where.rsplit(":", 1)[-1]
    return Row(str(record["id"]) if record.get("id") is not None else number, lang, prompt, completion, rejected)


Parts = tuple[list[Message], str, str | None]


def _preference(record: Record, where: str, columns: Mapping[str, str]) -> Parts:
    sides: list[str] = []
    prompts: list[list[Message]] = []
    dialogues = _dialogues(record, where)
    for name in ("chosen", "rejected"):
        if name in dialogues or isinstance(record[name], list):
            messages = dialogues.get(name) or _messages(record[name], where, name)
            # Either the answer alone, with the prompt in its own column, or the whole conversation on each side.
            if len(messages) > 1 or record.get("prompt") is None:
                before, answer = _split_answer(messages, where)
                prompts.append(before)
            else:
                answer = _only_answer(messages, where)
            sides.append(answer)
        else:
            sides.append(_text(record, name, where, columns))
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        what = "the chosen and the rejected conversation differ before the answer"
        raise RowError(what, kind="two prompts in a preference", where=where)
    if not prompts:
        if record.get("prompt") is None:
            do = "a preference row needs prompt, chosen, rejected, or sides of 'Human:' and 'Assistant:' turns"
            raise RowError("missing column 'prompt'", kind=MISSING, where=where, do=do)
        prompts.append(_prompt(record, where, columns))
    chosen, rejected = sides
    if _seen(chosen) == _seen(rejected):
        what = "chosen and rejected are equal, so the row prefers nothing"
        raise RowError(what, kind="equal sides", where=where)
    return prompts[0], chosen, rejected


_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _dialogues(record: Record, where: str) -> dict[str, list[Message]]:
    """The sides of a row written as Anthropic's HH is: no prompt, but `Human:` and `Assistant:` turns as one text."""
    if record.get("prompt") is not None:
        return {}
    texts = {name: record[name] for name in ("chosen", "rejected") if isinstance(record[name], str)}
    told = {name: text for name, text in texts.items() if text.lstrip().startswith("Human:")}
    if len(told) == 1 and len(texts) == 2:
        (name,) = texts.keys() - told.keys()
        what = f"'{name}' does not begin with 'Human:', as the other side of the preference does"
        raise RowError(what, kind="not messages", where=where)
    found = {}
    for name, text in told.items():
        _, *turns = _HH_TURN.split(text.lstrip())
        turn_of = zip(turns[::2], turns[1::2], strict=True)
        found[name] = _messages([{"from": who.lower(), "value": said.strip()} for who, said in turn_of], where, name)
    return found


def _conversation(name: str) -> Callable[[Record, str, Mapping[str, str]], Parts]:
    def parts(record: Record, where: str, columns: Mapping[str, str]) -> Parts:
        return *_split_answer(_messages(record[name], where, name), where), None

    return parts


def _answered(name: str) -> Callable[[Record, str, Mapping[str, str]], Parts]:
    def parts(record: Record, where: str, columns: Mapping[str, str]) -> Parts:
        value = record[name]
        if isinstance(value, list):
            answer = _only_answer(_messages(value, where, name), where)
        else:
            answer = _text(record, name, where, columns)
        return _prompt(record, where, columns), answer, None

    return parts


def _alpaca(record: Record, where: str, columns: Mapping[str, str]) -> Parts:
    text = _text(record, "instruction", where, columns)
    extra = record.get("input")
    if isinstance(extra, str) and extra.strip():
        text = f"{text}\n\n{_text(record, 'input', where, columns)}"
    return [{"role": "user", "content": text}], _text(record, "output", where, columns), None


# Required columns -> reader, the most telling first: a file with chosen and rejected is a preference file whatever else
# it holds, and `messages` says more than the `prompt` that many files repeat beside it.
FORMATS: dict[tuple[str, ...], Callable[[Record, str, Mapping[str, str]], Parts]] = {
    ("chosen", "rejected"): _preference,
    ("messages",): _conversation("messages"),
    ("conversations",): _conversation("conversations"),
    ("prompt", "completion"): _answered("completion"),
    ("prompt", "response"): _answered("response"),
    ("instruction", "output"): _alpaca,
}
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # categories of what nobody sees
# Characters of other categories that are blank too: fillers, the empty braille cell, variation selectors.
BLANK = frozenset(map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10))))
COLUMNS = sorted({name for needs in FORMATS for name in needs} | {"id", "input"})
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _rename(record: Record, where: str, columns: Mapping[str, str]) -> Record:
    renamed = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(f"'columns' maps an unknown column '{ours}'", where=where, do=did_you_mean(ours, COLUMNS))
        if theirs not in record:
            raise RowError(
                f"missing column '{theirs}' (mapped to {ours}); columns found: {', '.join(sorted(record)) or 'none'}",
                kind=MISSING,
                where=where,
                do="correct 'columns'",
            )
        renamed[ours] = record[theirs]
    return renamed


def _uses(columns: Mapping[str, str]) -> set[str]:
    # A mapped `prompt` or `id` alone does not tell one format from another.
    return set(columns) - {"id", "prompt"}


def _lacking(record: Record) -> str:
    """Say which one column is missing when a format is half there, else that nothing fits."""
    for needs in FORMATS:
        present = set(needs) & record.keys()
        if present and len(needs) == 2:
            missing = [name for other in FORMATS if present <= set(other) for name in other if name not in present]
            return "missing column " + " or ".join(f"'{name}'" for name in missing)
    return "no known format (messages, prompt/completion, [prompt/]chosen/rejected, instruction/output, conversations)"


def _label(name: str, columns: Mapping[str, str]) -> str:
    return f"'{columns[name]}' ({name})" if name in columns else f"'{name}'"


def _text(record: Record, name: str, where: str, columns: Mapping[str, str]) -> str:
    return _checked(record[name], _label(name, columns), where)


def _checked(value: Any, label: str, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{label} is {type(value).__name__}, expected text", kind="not text", where=where)
    if all(_is_blank(char) for char in value):
        raise RowError(f"{label} is empty", kind=EMPTY, where=where)
    if "\0" in value:
        raise RowError(f"{label} holds U+0000, which is no text", kind="U+0000", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{label} holds half a surrogate pair, which is no text"
        raise RowError(what, kind="half a surrogate pair", where=where) from error
    return value


def _is_blank(char: str) -> bool:
    return unicodedata.category(char) in INVISIBLE or char in BLANK


def _seen(text: str) -> str:
    """A text without the blanks around it, in one way to write its accents."""
    begin = next((at for at, char in enumerate(text) if not _is_blank(char)), len(text))
    end = next((at for at in range(len(text), begin, -1) if not _is_blank(text[at - 1])), begin)
    return unicodedata.normalize("NFC", text[begin:end])


def _prompt(record: Record, where: str, columns: Mapping[str, str]) -> list[Message]:
    if isinstance(record["prompt"], list):
        return _messages(record["prompt"], where, "prompt")
    return [{"role": "user", "content": _text(record, "prompt", where, columns)}]


def _messages(value: Any, where: str, label: str) -> list[Message]:
    if isinstance(value, Mapping):
        value = _turns(value)
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"'{label}' is not a list of messages", kind="not messages", where=where)
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        # Tables give every turn the keys of all, so a key may be there and empty.
        role_key, text_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
        if role_key not in turn or text_key not in turn:
            what = f"turn {number} of '{label}' has no {role_key} or no {text_key}"
            raise RowError(what, kind="not messages", where=where)
        if turn.get("tool_calls"):
            raise RowError(f"turn {number} of '{label}' calls tools", kind="tool calls", where=where)
        role = SHAREGPT_ROLES.get(str(turn[role_key]))
        if role is None:
            raise RowError(
                f"turn {number} of '{label}' has the role '{turn[role_key]!s:.40}'",
                kind="unknown role",
                where=where,
                do="known: system, user (human), assistant (gpt)",
            )
        messages.append({"role": role, "content": _checked(turn[text_key], f"turn {number} of '{label}'", where)})
    if not messages:
        raise RowError(f"'{label}' is empty", kind=EMPTY, where=where)
    return messages


def _turns(columns: Mapping[str, Any]) -> Any:
    """A list of turns from a mapping of lists, which is how `datasets` gives a sequence of structures."""
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return None
    sizes = {len(column) for column in columns.values()}
    return (
        [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
        if len(sizes) == 1
        else None
    )


def _split_answer(messages: list[Message], where: str) -> tuple[list[Message], str]:
    if messages[-1]["role"] != "assistant":
        what = f"the last turn is {messages[-1]['role']}'s, expected assistant's: no answer to learn"
        raise RowError(what, kind=ORDER, where=where)
    return messages[:-1], messages[-1]["content"]


def _only_answer(messages: list[Message], where: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(f"the answer is {roles}, expected one assistant turn", kind=ORDER, where=where)
    return messages[0]["content"]


def _check_order(prompt: list[Message], where: str) -> None:
    turns = [message["role"] for message in prompt]
    spoken = turns[1:] if turns[:1] == ["system"] else turns
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(spoken))]
    if spoken != expected or len(spoken) % 2 == 0:
        raise RowError(
            f"roles out of order: {', '.join([*turns, 'assistant'])}",
            kind=ORDER,
            where=where,
            do="expected system or none, then user and assistant in turn",
        )
