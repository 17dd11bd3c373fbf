"""What looks like a secret in a recipe, which is written into plans, records and reports and must hold none.

By name or by value, and strings alone: `api_key`, `X-Api-Key`, `authToken`; `sk-...`, `hf_...`, `Bearer ...`. Names such as
`max_tokens`, `token_type` or `prompt_cache_key` are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(
    r"\b(secrets?|passwords?|passwd|pwd|passphrase|authorization|bearer|credentials?|api ?key"
    r"|(?:access|api|private|account|subscription|service|license|\w*ai|\w*face|\w*router) key"
    r"|(?:access|api|auth|session|id|refresh) token)\b"
    r"|\b(?:auth|cookies?)$|^(?:token|key|x key)$"
)
# The beginnings that providers give their keys: OpenAI and others, Groq, xAI, Hugging Face, GitHub, Google, AWS, a JWT
_VALUES = re.compile(
    r"\b(?:(?:[sprg]k-|gsk_|xai-|hf_|gh[oprsu]_|github_pat_|AIza|AKIA|eyJ)[\w./+=-]{16,}|Bearer\s+\S{8,})",
    re.IGNORECASE,
)
SHORTEST = 6  # letters of a value that may be a secret: `auth: none` is a setting


def is_secret(name: str, value: Any) -> bool:
    """Whether a field looks like one.

    >>> is_secret("apiKey", "abcdef"), is_secret("max_tokens", "900000"), is_secret("note", "key=sk-0123456789abcdef0123")
    (True, False, True)
    """
    if not isinstance(value, str | int) or isinstance(value, bool) or len(str(value)) < SHORTEST:
        return False
    words = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)).lower()
    return bool(_NAMES.search(words) or _VALUES.search(str(value)))


def secret_field(fields: Mapping[Any, Any]) -> str | None:
    """The name of the first field, at whatever depth, that looks like a secret; a name that is one is not repeated."""
    for name, value in fields.items():
        if _VALUES.search(str(name)):
            return "a field's name"
        if (found := _inside(str(name), value)) is not None:
            return found
    return None


def _inside(name: str, value: Any) -> str | None:
    """The field in a value that looks like a secret, itself called `name`."""
    if isinstance(value, Mapping):
        found = secret_field(value)
        return None if found is None else f"{name}.{found}"
    if isinstance(value, list):
        return next((found for one in value if (found := _inside(name, one)) is not None), None)
    return name if is_secret(name, value) else None
