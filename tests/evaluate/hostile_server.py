"""A chat completion server in a process of its own, which behaves as badly as it is told and counts what it is asked.

    python hostile_server.py        prints its port, serves until standard input ends

`POST /_plan` sets the behaviour (JSON, see `PLAN`) and zeroes the counts; `GET /_counts` gives them. It answers a prompt with
`answer to <prompt>`. Sockets by hand: an HTTP library would not let it break the protocol.
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

PLAN = {
    "script": [],  # behaviours of the first requests, in order
    "by_text": {},  # behaviours of requests with this prompt, in order; the last one stays
    "always": "ok",  # of every other request
    "latency_s": 0.0,
    "slots": None,  # requests that it works on at once
    "style": "queue",  # or "refuse": 429 beyond its slots
    "retry_after": None,  # sent with that 429
    "usage": [10, 5],
    "key": None,  # asked for in the Authorization header
}


def completion(text: object, finish: object = "stop", usage: object = None, **message: object) -> dict:
    """The JSON of an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


def reply(status: int, body: bytes | dict, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    """A reply as it goes over the wire; `length` lies about the body's."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Content-Type": "application/json", "Content-Length": str(len(content) if length is None else length)}
    lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in {**head, **(headers or {})}.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> bytes:
    return reply(status, {"error": {"message": message, "code": code, "type": "x"}}, headers)


def spoken(name: str, text: str, key: str, usage: dict | None) -> bytes | None:
    """The reply that a behaviour gives; None where it is about the connection and not about a reply."""
    good = completion(f"answer to {text}", usage=usage)
    whole = json.dumps(good).encode()
    date = email.utils.formatdate(time.time() + 1, usegmt=True)
    replies = {
        "ok": lambda: reply(200, whole),
        "429": lambda: error(429, "slow down", "rate_limit_exceeded"),
        "429 seconds": lambda: error(429, "slow down", headers={"Retry-After": "0.2"}),
        "429 date": lambda: error(
            429, "slow down", headers={"Retry-After": date, "Date": email.utils.formatdate(usegmt=True)}
        ),
        "429 nonsense": lambda: error(429, "slow down", headers={"Retry-After": "soon"}),
        "429 hour": lambda: error(429, "slow down", headers={"Retry-After": "3600"}),
        "429 quota": lambda: error(429, "You exceeded your current quota", "insufficient_quota"),
        "500": lambda: error(500, "oh no"),
        "502": lambda: reply(502, b"<html>bad gateway</html>"),
        "503": lambda: error(503, "busy", headers={"Retry-After": "0.1"}),
        "529": lambda: error(529, "overloaded"),
        "408": lambda: error(408, "too slow"),
        "empty": lambda: reply(200, b""),
        "truncated": lambda: reply(200, whole[: len(whole) // 2]),
        "html": lambda: reply(200, b"<!doctype html><title>Sign in</title>"),
        "list": lambda: reply(200, b"[1, 2, 3]"),
        "no choices": lambda: reply(200, {"choices": []}),
        "null message": lambda: reply(200, {"choices": [{"message": None}]}),
        "number": lambda: reply(200, completion(17)),
        "error inside": lambda: reply(200, {"error": {"code": 502, "message": "upstream"}}),
        "not utf-8": lambda: reply(200, b'{"choices": "\xff\xfe"}'),
        "deep": lambda: reply(200, b"[" * 200_000 + b"]" * 200_000),
        "digits": lambda: reply(200, b'{"choices": ' + b"9" * 10_000 + b"}"),
        "huge": lambda: reply(200, b'{"choices": "' + b"x" * 3_000_000),
        "bomb": lambda: reply(200, gzip.compress(b" " * 30_000_000, 9), {"Content-Encoding": "gzip"}),
        "zipped": lambda: reply(200, gzip.compress(whole), {"Content-Encoding": "gzip"}),
        "bad zip": lambda: reply(200, gzip.compress(whole)[:-9], {"Content-Encoding": "gzip"}),
        "long length": lambda: reply(200, whole, length=len(whole) + 50),
        "short length": lambda: reply(200, whole, length=20),
        "bad length": lambda: reply(200, whole, {"Content-Length": "-5"}),
        "not http": lambda: b"220 mail.example.org ESMTP\r\n",
        "many headers": lambda: b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"y" * 300_000 + b"\r\n\r\n",
        "bad chunks": lambda: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        "cookie": lambda: reply(200, whole, {"Set-Cookie": "a=" + "b" * 3000}),
        "nul": lambda: reply(200, completion(f"answer\0to {text}")),
        "surrogate": lambda: reply(200, completion("half \ud83d of a pair, \udc00\ud800")),
        "usage lies": lambda: reply(200, completion("x", usage={"prompt_tokens": -5, "completion_tokens": 10**30})),
        "usage list": lambda: reply(200, completion("x", usage=[True])),
        "parts": lambda: reply(
            200, completion([{"type": "thinking", "thinking": [1]}, {"type": "text", "text": "the answer"}])
        ),
        "refusal": lambda: reply(200, completion(None, refusal="I will not.")),
        "null": lambda: reply(200, completion(None)),
        "length": lambda: reply(200, completion("cut", "length")),
        "filtered": lambda: reply(200, completion("par", "content_filter", usage)),
        "no finish": lambda: reply(200, completion("x", None)),
        "400": lambda: error(400, "this model does not know that parameter", "invalid_request"),
        "400 filter": lambda: error(400, "The response was filtered", "content_filter"),
        "413": lambda: error(413, "too long"),
        "422": lambda: reply(422, {"detail": [{"loc": ["body"], "msg": "bad"}]}),
        "401": lambda: error(401, f"Incorrect API key provided: {key}", "invalid_api_key"),
        "402": lambda: error(402, "Insufficient credits"),
        "403": lambda: error(403, "you may not use this model"),
        "403 flagged": lambda: error(403, "your input was flagged by moderation"),
        "404": lambda: error(404, "The model `m` does not exist", "model_not_found"),
        "echo key": lambda: reply(
            200, completion(f"your key is {key}, spelt {escaped(key)}", usage=usage), {"X-Echo": key, "Server": key}
        ),
        "echo escaped key": lambda: reply(200, whole.replace(b"answer to", escaped(key).encode())),
        "terminal": lambda: error(401, "\x1b[2J\x1b]0;owned\x07 \u202e evil\nsecond line"),
    }
    return replies[name]() if name in replies else None


def escaped(text: str) -> str:
    """JSON's other spelling of the same text."""
    return "".join(f"\\u{ord(char):04x}" for char in text)


class Hostile:
    """The server's state; one event loop, so no locks."""

    def __init__(self) -> None:
        self.set({})

    def set(self, plan: dict) -> None:
        self.plan = {**PLAN, **plan}
        self.script = list(self.plan["script"])
        self.by_text = {text: list(names) for text, names in self.plan["by_text"].items()}
        self.texts: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.behaved: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self.headers: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.busy = self.peak = self.open = self.refused = 0
        slots = self.plan["slots"]
        self.slots = asyncio.Semaphore(slots) if slots and self.plan["style"] == "queue" else None

    def counts(self) -> dict:
        return {
            "requests": self.texts.total(),
            "texts": self.texts,
            "answered": self.answered,
            "behaved": self.behaved,
            "keys": self.keys,
            "headers": self.headers,
            "paths": self.paths,
            "peak": self.peak,
            "refused": self.refused,
        }

    def behaviour(self, text: str) -> str:
        if text in self.by_text:
            names = self.by_text[text]
            return names.pop(0) if len(names) > 1 else names[0]
        return self.script.pop(0) if self.script else self.plan["always"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection is to be kept."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/_plan":
            self.set(json.loads(body))
            writer.write(reply(200, b"{}"))
        elif path == "/_counts":
            writer.write(reply(200, self.counts()))
        else:
            return await self.complete(method + " " + path, headers, json.loads(body), writer)
        await writer.drain()
        return True

    async def complete(self, path: str, headers: dict[str, str], body: dict, writer: asyncio.StreamWriter) -> bool:
        text, plan = body["messages"][-1]["content"], self.plan
        key = headers.get("authorization", "").removeprefix("Bearer ")
        self.texts[text] += 1
        self.keys[key] += 1
        self.paths[path] += 1
        self.headers.update(headers.keys())
        name = self.behaviour(text)
        self.behaved[name] += 1
        if plan["slots"] and plan["style"] == "refuse" and self.busy >= plan["slots"]:
            self.refused += 1
            after = {} if plan["retry_after"] is None else {"Retry-After": str(plan["retry_after"])}
            writer.write(error(429, "too many at once", headers=after))
            return True
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            if self.slots:
                await self.slots.acquire()
            self.busy += 1
            try:
                return await self.work(name, text, key, writer)
            finally:
                self.busy -= 1
                if self.slots:
                    self.slots.release()
        finally:
            self.open -= 1

    async def work(self, name: str, text: str, key: str, writer: asyncio.StreamWriter) -> bool:
        latency = self.plan["latency_s"]
        if latency:
            await asyncio.sleep(latency)
        if self.plan["key"] not in (None, key):
            writer.write(spoken("401", text, key, None) or b"")
            return True
        usage = self.plan["usage"] and dict(
            zip(("prompt_tokens", "completion_tokens"), self.plan["usage"], strict=True)
        )
        content = spoken(name, text, key, usage)
        if content is not None:
            if name == "ok":
                self.answered[text] += 1
            writer.write(content)
            await writer.drain()
            return name in {"ok", "cookie", "truncated"} or name[0].isdigit()
        good = spoken("ok", text, key, usage) or b""
        if name == "drop":  # before the headers
            return False
        if name == "reset":
            writer.transport.abort()
        elif name == "drop mid-body":
            writer.write(good[:-30])
            await writer.drain()
        elif name == "hang":
            await asyncio.sleep(3600)
        elif name == "drip":
            for byte in good:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        elif name.startswith("redirect "):
            writer.write(reply(307, b"", {"Location": name.removeprefix("redirect ")}))
            await writer.drain()
        else:
            raise KeyError(name)
        return False


async def main() -> None:
    hostile = Hostile()
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


class Remote:
    """The server, seen from a test."""

    def __init__(self, port: int, process: subprocess.Popen) -> None:
        self.port, self.process = port, process
        self.url = f"http://127.0.0.1:{port}/v1"

    def plan(self, **plan: object) -> Remote:
        """Set the behaviour and zero the counts."""
        self._call("/_plan", plan)
        return self

    def counts(self) -> dict:
        return self._call("/_counts")

    def requests(self) -> int:
        return self.counts()["requests"]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def _call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.loads(response.read())


@contextmanager
def hostile_server(port: int = 0):
    """Start the server in a process of its own."""
    command = [sys.executable, str(Path(__file__)), str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    remote = Remote(int(process.stdout.readline()), process)
    try:
        yield remote
    finally:
        remote.stop()


if __name__ == "__main__":
    asyncio.run(main())
