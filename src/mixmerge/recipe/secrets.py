"""What looks like a secret in a recipe, which is written into plans, records and reports and must hold none.

By name or by value, and strings alone: `api_key`, `X-Api-Key`, `authToken`; `sk-...`, `hf_...`, `Bearer ...`. Names such as
`max_tokens`, `token_type` or `prompt_cache_key` are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(
    r"\b(secrets?|passwords?|passwd|pwd|passphrase|authorization|auth|bearer|credentials?|cookie|api ?key"
    r"|(?:access|api|private|account|subscription|service|license) key|(?:access|api|auth|session|id|refresh) token)\b"
    r"|^(?:token|key|x key)$"
)
# The beginnings that providers give their keys: OpenAI and others, Groq, xAI, Hugging Face, GitHub, Google, AWS, a JWT
_VALUES = re.compile(
    r"(?:[sprg]k-|gsk_|xai-|hf_|gh[oprsu]_|github_pat_|AIza|AKIA|eyJ)[\w./+=-]{16,}|Bearer\s+\S{8,}", re.IGNORECASE
)


def is_secret(name: str, value: Any) -> bool:
    """Whether a field looks like one.

    >>> is_secret("apiKey", "x"), is_secret("max_tokens", "9"), is_secret("note", "sk-0123456789abcdef0123")
    (True, False, True)
    """
    if not isinstance(value, str) or not value:
        return False
    words = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)).lower()
    return bool(_NAMES.search(words) or _VALUES.fullmatch(value.strip()))


def secret_field(fields: Mapping[Any, Any]) -> str | None:
    """The name of the first field, at whatever depth, that looks like a secret."""
    for name, value in fields.items():
        inside = value if isinstance(value, list) else [value]
        for one in inside:
            if isinstance(one, Mapping) and (found := secret_field(one)) is not None:
                return f"{name}.{found}"
            if is_secret(str(name), one):
                return str(name)
    return None
