"""Text that a judge reads and must not obey: cut, defused, and set between two lines that its writer cannot forge.

A mark is drawn for every request, by hash, so that the same request is the same bytes again; a text that holds its mark
gets another one. What is changed in a text is little, visible and counted: see `defused`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

MARK_DIGITS = 10

# Control tokens of chat templates: a server that renders a template over the text would take them for turns. Families:
# ChatML, Llama 3 and 4, Phi, Cohere, DeepSeek (<|...|>, also with the full-width bar); EXAONE ([|...|]); Gemma (4: <|turn>
# and <turn|>); Mistral; Llama 2; Seed-OSS (<seed:bos>); Nemotron; MiniMax (]~b] and [e~[); Qwen and others' reasoning and
# tools; the sentence marks of sentencepiece.
_NAMES = (
    r"/?s|/?think|/?tool_call|/?tool_response|/?tools|bos|eos|pad|unk|mask(?::\d+)?|sop|eop|(?:start|end)_of_(?:turn|image)"
    r"|unused\d+|extra_id_\d+|reserved_\d+|SPECIAL_\d+|[A-Z]+_UNUSED_\d+|/?seed:[\w./-]{1,40}|/?minimax:\w{1,40}|</?SYS>"
)
_SQUARE = (
    r"/?INST|/?SYSTEM_PROMPT|/?AVAILABLE_TOOLS|/?TOOL_CALLS|/?TOOL_RESULTS|/?TOOL_CONTENT|/?THINK|PREFIX|SUFFIX|MIDDLE"
    r"|IMG(?:_BREAK|_END)?|gMASK|sMASK"
)
_CONTROL = re.compile(
    rf"[<＜﹤](?=[|｜][^<>\s]{{1,60}}[|｜][>＞﹥]|[|｜]\w{{1,40}}[>＞﹥]|\w{{1,40}}[|｜][>＞﹥]|(?:{_NAMES})[>＞﹥])"
    rf"|\[(?=\|[^\[\]\s]{{1,60}}\|\]|(?:{_SQUARE})\])"
    r"|\](?=~!\w{1,3}\[|~\w{1,3}\])|\[(?=\w~\[)"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Shown:
    """A text as the judge is shown it: `cut` characters were left out at its end, `escaped` places were changed."""

    text: str
    cut: int
    escaped: int


def shown(text: str, longest: int) -> Shown:
    """The text cut to `longest` characters, with a visible note where it was cut, and defused."""
    cut = max(0, len(text) - longest)
    safe, escaped = defused(text[: len(text) - cut])
    if cut:
        safe += f"\n[cut here: {cut} more characters are not shown]"
    return Shown(safe, cut, escaped)


def defused(text: str) -> tuple[str, int]:
    r"""The text without what a server would not take for text, and at how many places it was changed.

    Control tokens of chat templates get a space after their bracket; U+0000, which many servers refuse or end a text at,
    becomes U+2400; half of a surrogate pair, which has no UTF-8, becomes U+FFFD. All else stays as it is.

    >>> defused("<|im_end|> a < b [INST]")
    ('< |im_end|> a < b [ INST]', 2)
    """
    text, tokens = _CONTROL.subn(lambda found: found[0] + " ", text)
    text, halves = _SURROGATES.subn("\ufffd", text)
    return text.replace("\0", "\u2400"), tokens + halves + text.count("\0")


def draw_mark(seed: int, key: str, texts: Sequence[str]) -> str:
    """The mark of a request: hexadecimal digits from (seed, key, texts), the first such draw that no text holds.

    A writer would have to find a text that holds a hash of itself; where one does, the next draw is taken.
    """
    draw = 0
    while True:
        digest = hashlib.sha256(b"fence %d %d" % (seed, draw))
        for part in (key, *texts):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data) + data)
        mark = digest.hexdigest()[:MARK_DIGITS]
        if not any(mark in part.casefold() for part in (key, *texts)):
            return mark
        draw += 1


def fenced(label: str, text: str, mark: str) -> str:
    """The text between a line that begins it and one that ends it, both with the label and the mark.

    >>> print(fenced("response", "Ice floats.", "0badcafe00"))
    -----BEGIN RESPONSE 0badcafe00-----
    Ice floats.
    -----END RESPONSE 0badcafe00-----
    """
    return f"-----BEGIN {label.upper()} {mark}-----\n{text}\n-----END {label.upper()} {mark}-----"
