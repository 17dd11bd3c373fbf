"""What every HTML page of ours is made with: templates that escape everything, and a policy that allows our own parts only.

A page is one file that opens from disk and reaches for nothing: style and script stand inside, and are allowed by hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from mixmerge.report import tables, words


def environment() -> Any:
    """Jinja with everything escaped, and a missing variable an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_templates()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "minus": lambda text: re.sub(r"(?<![\w.])-(?=\d)", "\u2212", str(text)),
        "points": lambda fraction: words.percent(fraction, signed=True),
        "interval": lambda found: tables.interval_text(found, signed=True),
        "count": words.count,
        "reading": tables.reading,
        "share": words.share,
        "groupby_kind": lambda rows: [(kind, list(found)) for kind, found in groupby(rows, key=lambda row: row.kind)],
    }
    environment.filters |= filters
    return environment


def _templates() -> Path:
    return Path(__file__).parent / "templates"


def source(name: str) -> str:
    """The text of a style sheet or script of ours."""
    return (_templates() / name).read_text(encoding="utf-8")


def policy(style: str, script: str | None = None) -> str:
    """Nothing but our own style and script (or none), by hash; no DOM sink takes text as markup."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    scripts = "'none'" if script is None else digest(script)
    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
