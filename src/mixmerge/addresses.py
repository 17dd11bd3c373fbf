"""Addresses of servers, checked before anything is sent to one; shared by `recipe/` and `evaluate/`.

One idea: a mistake is found by reading alone, and told without repeating what may be a secret.
"""

from __future__ import annotations

from urllib.parse import urlsplit

EXAMPLE = "http://localhost:8000/v1"
REQUESTS = "/chat/completions"  # what requests add to an address


def secret_in(address: str) -> bool:
    """Whether it holds a name, a password or a query: a key may stand there.

    >>> secret_in("http://me:pw@host/v1"), secret_in("http://host/v1")
    (True, False)
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return "@" in address or "?" in address
    return "@" in parts.netloc or bool(parts.query or parts.fragment)


def fault_of(address: str) -> str | None:
    """Why it cannot be the address of a server; None where it can.

    >>> fault_of("http://localhost:8000/v1")
    >>> fault_of("http://127.0.0.1 :8000/v1"), fault_of("http://127.0.0.1:99999/v1")
    ('it holds a blank', 'no port has that number')
    """
    if any(c.isspace() or not c.isprintable() for c in address.strip()):
        return "it holds a blank"
    try:
        parts = urlsplit(address.strip())
        host = parts.hostname
    except ValueError:
        return "its brackets do not hold an address"
    if parts.scheme not in ("http", "https"):
        return "it does not begin with http:// or https://"
    if not host:
        return "it names no host"
    try:
        if parts.port == 0:
            return "no port has that number"
        host.encode("idna")
    except UnicodeError:
        return "its host is no name"
    except ValueError:
        return "no port has that number"
    return None


def without_requests(address: str) -> str:
    """The address up to which requests are the same: `/chat/completions` is taken off its end.

    >>> without_requests("http://host/v1/chat/completions/"), without_requests("http://host/v1/")
    ('http://host/v1', 'http://host/v1/')
    """
    bare = address.strip().rstrip("/")
    return bare.removesuffix(REQUESTS).rstrip("/") if bare.endswith(REQUESTS) else address
