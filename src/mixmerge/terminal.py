"""Text that others wrote, made safe to print: what would steer a terminal is shown as its escape.

Shared by all layers; knows none of them.
"""

from __future__ import annotations

import unicodedata

# Spelling in Hindi, Persian and emoji; everything else that is unprintable may move the cursor, hide or reverse text.
_JOINERS = "\u200c\u200d"


def visible(text: str, *, keep: str = "") -> str:
    """The text with control, bidirectional and unpaired characters as escapes; `keep` are left as they are.

    Spaces of any width stay.

    >>> visible("a" + chr(27) + "[2J" + chr(0x202E) + "b")
    'a\\\\x1b[2J\\\\u202eb'
    """
    if text.isprintable():
        return text
    return "".join(char if _harmless(char, keep) else char.encode("unicode_escape").decode("ascii") for char in text)


def _harmless(char: str, keep: str) -> bool:
    return char.isprintable() or char in keep or char in _JOINERS or unicodedata.category(char) == "Zs"
