"""What looks like a secret in a recipe, which is written into plans, records and reports and must hold none.

By name or by value, strings and numbers: `api_key`, `X-Api-Key`, `authToken`; `sk-...`, `hf_...`, `Bearer ...`. Names such as
`max_tokens`, `token_type` or `prompt_cache_key` are none. In a command the names are those of variables, options and headers; what
only refers to a secret (`$HF_TOKEN`, `--api-key-file key.txt`) is none.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(
    r"\b(secrets?|passwords?|passwd|pwd|passphrase|authorization|bearer|credentials?|api ?key"
    r"|(?:access|api|private|account|subscription|service|license|\w*ai|\w*face|\w*router) key"
    r"|(?:access|api|auth|session|id|refresh|hf|hub|hugging ?face|wandb|gh|git ?hub|git ?lab|bot) token"
    r"|(?:hf|wandb) key)\b"
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


_VARIABLE = re.compile(r"[A-Z0-9_]*_(?:TOKEN|KEY|SECRET|PASS|PASSWD|PASSWORD|CREDENTIALS)")
_PASSWORD_IN_URL = re.compile(r"://[^/\s@:]*:[^/\s@$]+@")
_REFERENCE = re.compile(r"[$@<{%].*")  # a variable, a file or a placeholder, which is filled in where the command runs
_ELSEWHERE = re.compile(r"[-_. ](?:file|path|env|var|variable|name)$", re.IGNORECASE)  # names where the secret is
_SCHEMES = ("bearer", "basic", "token")


def secret_in_command(command: str) -> bool:
    """Whether a command holds what looks like a secret, as a value, an option's, a variable's or a header's.

    >>> [secret_in_command(f"env HF_TOKEN={value} srun --ntasks 8") for value in ("hf_0123456789abcdefgh", "$HF_TOKEN")]
    [True, False]
    """
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close: whoever runs it says so
        words = command.split()
    option = ""
    for word in words:
        if word != command and " " in word.strip() and secret_in_command(word):  # a command in a command, a header
            return True
        if _PASSWORD_IN_URL.search(word):
            return True
        if option and word.lower() in _SCHEMES:
            continue
        if option and not word.startswith("-") and _hidden(option, word):
            return True
        for part in re.split(r"[,;]", word) if " " not in word.strip() else ():
            name, _, value = part.partition("=") if "=" in part else part.partition(":")
            if _hidden(name, value) or _hidden("", part):
                return True
        option = word if word.startswith("-") and "=" not in word else word[:-1] if word.endswith(":") else ""
    return False


def _hidden(name: str, value: str) -> bool:
    if _REFERENCE.fullmatch(value) or _ELSEWHERE.search(name):
        return False
    return is_secret(name, value) or (len(value) >= SHORTEST and _VARIABLE.fullmatch(name) is not None)
