"""Requests to ask of the hostile server, and a client that does not wait long for it."""

from __future__ import annotations

from mixmerge.evaluate.client import Limits

KEY = "sk-test-9f3c1a77d2b84e60"
QUICK = Limits(timeout_s=60, patience_s=20, backoff_s=0.01, backoff_most_s=0.05)


def body(text: str, **more: object) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def texts(*names: str) -> list[dict]:
    return [body(name) for name in names]


def many(count: int) -> list[dict]:
    return texts(*(f"p{n}" for n in range(count)))
