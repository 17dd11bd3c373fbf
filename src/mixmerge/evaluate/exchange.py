"""One request and what came of it: sent, read within bounds, and told apart by what is to be done about it.

Five things can come of a request. An `Answer`; a `Refused`, an answer too: this request will never get a better one; an
`Again`, which asking again may mend; a `Hopeless`, which no request to this server will mend; or our own bug, which is
raised. Nothing that a server sends is trusted: sizes, times, encodings, shapes and numbers are checked, and our key, where
a server repeats it, is blacked out before anyone sees the reply.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixmerge.errors import reason
from mixmerge.evaluate.answers import Reply

if TYPE_CHECKING:
    import httpx2

GIVEN_UP = 0  # the status under which a request is filed that failed by itself again and again; the body says why
SECRET = 6  # a shorter key is a placeholder such as EMPTY: blacking it out would spoil answers
BLACKED = "[key]"
MOST_TOKENS = 10**9  # a server that reports more tokens for one request reports nonsense
LONGEST_QUOTE = 160  # characters of a server's own message
# The loggers of the transport that may print what a server sent
LOGGERS = (
    "httpx2",
    "httpcore2.connection",
    "httpcore2.http11",
    "httpcore2.http2",
    "httpcore2.proxy",
    "httpcore2.socks",
)
# What a provider says in a 400 or 403 that is about the content of one request
CONTENT = re.compile(r"content[ _-]?(filter|policy|management)|moderat|flagged|ResponsibleAI", re.IGNORECASE)
BROKE = re.compile(r"insufficient[ _-]?(quota|credit|balance|fund)|billing|exceeded your current quota", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to one request.

    `text` is encodable as UTF-8 and "" where `error` is set; `error` says why there is no usable answer, a reason that
    asking again has not mended or will not; `cached`: it was on disk before this call.
    """

    text: str
    finish: str
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply to keep, with its answer."""

    reply: Reply
    answer: Answer


@dataclass(frozen=True, slots=True)
class Again:
    """Asking again may mend it. `wait_s` is what the server asks for."""

    kind: str  # rate_limit, overload, server_error, timeout, connection, bad_reply
    why: str
    wait_s: float | None = None
    charged: bool = False  # sent whole, and the server may have done the work
    nowhere: bool = False  # the host's name has no address


@dataclass(frozen=True, slots=True)
class Hopeless:
    """No request to this server will fare better."""

    why: str
    do: str
    of_model: bool = False  # to this model: the server may have others


Outcome = Answered | Again | Hopeless


@dataclass(frozen=True, slots=True)
class Line:
    """A way to one server: its address, and our key, which shows up nowhere."""

    url: str
    client: httpx2.AsyncClient = field(repr=False)
    key: str | None = field(repr=False)
    timeout_s: float
    most_bytes: int

    async def ask(self, body: bytes) -> Outcome:
        """Send one request; the timeout holds for all of it, so that a body in drips ends too."""
        import httpx2

        sent = False

        async def trace(event: str, _: Mapping[str, Any]) -> None:
            nonlocal sent
            sent = sent or event.endswith("send_request_body.complete")

        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._exchange(body, trace)
        except (TimeoutError, httpx2.TimeoutException):
            return Again("timeout", f"no whole answer within {self.timeout_s:g} s", charged=sent)
        except (httpx2.TransportError, httpx2.StreamError) as error:
            why = self._black(reason(error))
            dropped = (
                isinstance(error, httpx2.NetworkError | httpx2.ProxyError) or "disconnected" in why or "closed" in why
            )
            kind = "connection" if dropped else "bad_reply"
            return Again("connection" if not sent else kind, why, charged=sent, nowhere=_has_no_address(error))

    async def _exchange(self, body: bytes, trace: Any) -> Outcome:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        async with self.client.stream(
            "POST", f"{self.url}/chat/completions", content=body, headers=headers, extensions={"trace": trace}
        ) as response:
            raw = bytearray()
            async for part in response.aiter_raw():
                raw += part
                if len(raw) > self.most_bytes:
                    return Again("bad_reply", f"a body of more than {self.most_bytes} bytes", charged=True)
            content = bytes(raw)
            if response.headers.get("content-encoding", "identity").lower() in ("gzip", "deflate", "x-gzip"):
                unpacked = _unpack(content, self.most_bytes)  # though we asked for none
                if unpacked is None:
                    return Again("bad_reply", "a compressed body that is damaged or too large", charged=True)
                content = unpacked
            return weigh(Reply(response.status_code, black_out(content, self.key)), response.headers)

    def _black(self, text: str) -> str:
        return text.replace(self.key, BLACKED) if self.key and len(self.key) >= SECRET else text


def weigh(reply: Reply, headers: Mapping[str, str]) -> Outcome:
    """What to do about a whole reply."""
    status, parsed = reply.status, _load(reply.body)
    if status == 200 and isinstance(parsed, dict) and "choices" not in parsed and parsed.get("error"):
        # routers answer 200 and put the status of the model's server inside
        code = parsed["error"].get("code") if isinstance(parsed["error"], dict) else None
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    if status == 200:
        answer = read(reply)
        if answer is None:
            return Again("bad_reply", _what_it_is(reply.body, parsed), charged=True)
        return Answered(reply, answer)
    said = _quote(reply.body, parsed)
    why = f"HTTP {status}" + (f" ({said})" if said else "")
    if status in (408, 409, 425, 429) or status >= 500:
        if status == 429 and BROKE.search(said):
            return Hopeless(why, "top up the account or give another endpoint; what was answered is kept")
        kind = {408: "timeout", 429: "rate_limit", 503: "overload", 529: "overload"}.get(status, "server_error")
        return Again(kind, why, retry_after(headers))
    if status in (400, 403, 413, 422, 451) and (status not in (403,) or CONTENT.search(said)):
        return Answered(Reply(status, reply.body), read(Reply(status, reply.body)) or Answer("", "error", why))
    if status in (401, 403):
        do = "check the key and its rights (`key` in the recipe names the environment variable that holds it)"
        return Hopeless(why, do, of_model=status == 403)
    if status == 402:
        return Hopeless(why, "top up the account or give another endpoint; what was answered is kept")
    if 300 <= status < 400:
        return Hopeless(
            f"HTTP {status}: it redirects, and a key is not carried elsewhere", "give the address it leads to"
        )
    if status in (404, 405, 410, 501):
        do = "check the address (it ends in /v1 as a rule) and the name of the model"
        return Hopeless(why, do, of_model=status in (404, 410))
    return Answered(reply, Answer("", "error", why))


def read(reply: Reply) -> Answer | None:
    """The answer in a reply; None where there is none to be read. Reading a kept reply again gives the same answer."""
    parsed = _load(reply.body)
    if reply.status == GIVEN_UP:
        return Answer("", "error", reply.body.decode("utf-8", "replace"))
    if reply.status != 200:
        said = _quote(reply.body, parsed)
        if CONTENT.search(said):
            return Answer("", "content_filter", f"HTTP {reply.status} ({said})")
        return Answer("", "error", f"HTTP {reply.status}" + (f" ({said})" if said else ""))
    try:
        choice = parsed["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    if isinstance(content, list):  # parts, of which the thinking ones are no answer
        texts = [part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else 0
    if content is None:
        content = refusal if isinstance(refusal, str) else ""
    if not isinstance(content, str):
        return None
    finish = choice.get("finish_reason")
    finish = _text(finish) if isinstance(finish, str) and finish else "unknown"
    usage = parsed.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
    if finish == "content_filter":
        return Answer("", finish, "the server's content filter stopped the answer", *tokens)
    if finish == "error":
        return None  # a router's word for a model that broke down half way
    return Answer(_text(content), finish, None, *tokens)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `Retry-After` as seconds or as a date, by the server's own clock; None: nothing usable."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
            now = email.utils.parsedate_to_datetime(headers.get("date") or email.utils.formatdate(usegmt=True))
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def black_out(body: bytes, key: str | None) -> bytes:
    """The body without our key, whether it stands there plainly or by JSON's escapes."""
    if key is None or len(key) < SECRET:
        return body
    body = body.replace(key.encode("ascii"), BLACKED.encode())
    if b"\\" in body and (parsed := _load(body)) is not None:
        plain = json.dumps(parsed, ensure_ascii=True)
        if key in plain:
            return plain.replace(key, BLACKED).encode("ascii")
    return body


class BlackOut(logging.Filter):
    """Keeps our key out of what the transport logs, should a server repeat it in a header."""

    def __init__(self, key: str | None) -> None:
        super().__init__()
        self._key = key if key and len(key) >= SECRET else None

    def filter(self, record: logging.LogRecord) -> bool:
        if self._key and self._key in (text := record.getMessage()):
            record.msg, record.args = text.replace(self._key, BLACKED), ()
        return True

    def __enter__(self) -> BlackOut:
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)


def _has_no_address(error: BaseException) -> bool:
    """Whether a host's name could not be resolved, which the transport's error only has as its cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _load(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8 is a ValueError too, and so is a number of 5,000 digits
        return None


def _text(text: str) -> str:
    """Unpaired surrogates as U+FFFD: JSON can carry them, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _quote(body: bytes, parsed: Any) -> str:
    """The server's own words about an error, short."""
    found = parsed
    for name in ("error", "message"):
        found = found.get(name, found) if isinstance(found, dict) else found
    if isinstance(found, dict | list) and found:
        found = json.dumps(found, ensure_ascii=True)
    if isinstance(parsed, dict) and isinstance(error := parsed.get("error"), dict):
        code = error.get("code") or error.get("type")
        found = f"{code}: {found}" if isinstance(code, str) else found
    text = found if isinstance(found, str) else body.decode("utf-8", "replace")
    text = " ".join(_text(text).split())
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."


def _what_it_is(body: bytes, parsed: Any) -> str:
    if not body.strip():
        return "an empty body"
    if parsed is None:
        page = body.lstrip()[:1] == b"<"
        return "a web page, not JSON" if page else f"a body of {len(body)} bytes that is not whole JSON"
    return "JSON that is not a chat completion (no choices[0].message.content)"


def _unpack(body: bytes, most: int) -> bytes | None:
    try:
        unpacker = zlib.decompressobj(wbits=47)
        plain = unpacker.decompress(body, most + 1)
    except zlib.error:
        return None
    return plain if unpacker.eof and len(plain) <= most else None
