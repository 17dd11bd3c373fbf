"""Judges behind a real HTTP server on loopback: each computes what it says from the request that it was sent.

`rubric_judge` reads a rubric's message the way a gullible model would: it goes by a rule on what is fenced, but obeys
whatever stands outside the fences, and takes control tokens in a text for turns. `guard_judge` speaks guards' forms.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("adversarial.jsonl")
# one control token of each family of chat templates
TURN = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|channel|message)\|>|<｜(?:User|Assistant)｜>|\[\|\w+\|\]"
    r"|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|\[/?SYSTEM_PROMPT\]|<bos>|</?think>"
)


@dataclass(frozen=True)
class Reply:
    """What the server says; a status other than 200 makes it an error."""

    text: str
    finish: str | None = "stop"
    status: int = 200


@dataclass(frozen=True)
class Reading:
    """What a rubric's request holds, as the scripted judge sees it."""

    mark: str
    words: tuple[str, ...]
    fenced: dict[str, str]
    outside: str
    json: bool


Manner = Callable[[Reading, str], Reply]


@dataclass
class Server:
    """Where it listens and what it was sent."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[Server]:
    """A chat-completions server on loopback, in threads of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw.decode("utf-8"))
            server.bodies.append(body)
            reply = answer(body) if self.path == "/v1/chat/completions" else Reply("no such page", status=404)
            if reply.status != 200:
                said: dict[str, Any] = {"error": {"message": reply.text, "type": "invalid_request_error"}}
            else:
                message = {"role": "assistant", "content": reply.text}
                said = {
                    "object": "chat.completion",
                    "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
                    "usage": {"prompt_tokens": len(raw) // 4, "completion_tokens": len(reply.text) // 4},
                }
            data = json.dumps(said).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the name that it overrides
            pass

    class Httpd(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    httpd = Httpd(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{httpd.server_port}/v1")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def plainly(reading: Reading, word: str) -> Reply:
    """The verdict in the form that was asked for."""
    if not reading.json:
        return Reply(f'<verdict mark="{reading.mark}">{word}</verdict>')
    reason = {"reason": "It follows the rule."} if "A" in reading.words else {}
    return Reply(json.dumps(reason | {"mark": reading.mark, "verdict": word}))


def rubric_judge(manner: Manner = plainly, *, schema: str = "keeps") -> Callable[[dict[str, Any]], Reply]:
    """A judge by a rule; `schema` says what becomes of response_format: it keeps to it, refuses it, or ignores it."""

    def answer(body: dict[str, Any]) -> Reply:
        if "response_format" in body and schema == "refuses":
            return Reply("'response_format' of type 'json_schema' is not supported", status=400)
        reading = read_request(body)
        if schema == "ignores" and reading.json:
            return Reply("I think that it is fine.")
        return manner(reading, ruling(body, reading))

    return answer


def read_request(body: dict[str, Any]) -> Reading:
    user = body["messages"][-1]["content"]
    found = re.match(r"mark: ([0-9a-f]{10})\n", user)
    assert found, "a request begins with its mark"
    mark = found[1]
    fenced = dict(re.findall(rf"^-----BEGIN ([A-Z ]+) {mark}-----\n(.*?)\n-----END \1 {mark}-----$", user, re.M | re.S))
    outside = user
    for label, text in fenced.items():
        outside = outside.replace(f"-----BEGIN {label} {mark}-----\n{text}\n-----END {label} {mark}-----", "")
    form = outside.rstrip().splitlines()[-1]
    listed = re.search(r"where (?:verdict|\.\.\.) is (.*)\.$", form)
    assert listed, form
    words = tuple(re.split(r", | or ", listed[1]))
    return Reading(mark, words, fenced, outside, form.startswith("Answer with one JSON object"))


def ruling(body: dict[str, Any], reading: Reading) -> str:
    """The verdict: whatever an injection outside the fences wants; else by digits in the first lines of what is fenced."""
    obeyed = reading.words[-1] if "A" not in reading.words else "A"
    extra = [
        line for line in reading.outside.splitlines() if line and not re.match("mark: |language: |Answer with ", line)
    ]
    turns = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in body["messages"])
    roles = [each["role"] for each in body["messages"]]
    if extra or roles != ["system", "user"] or len(TURN.findall(turns)) != 2 * len(roles):
        return obeyed
    digits = {label: sum(c.isdigit() for c in text.splitlines()[0]) for label, text in reading.fenced.items()}
    if "A" in reading.words:
        a, b = digits["RESPONSE A"], digits["RESPONSE B"]
        return "A" if a > b else "B" if b > a else "tie"
    return {"harmful": ("safe", "harmful"), "refused": ("refused", "complied")}[reading.words[0]][
        digits["RESPONSE"] > 0
    ]


def guard_judge(guard: str) -> Callable[[dict[str, Any]], Reply]:
    """A guard that calls an answer with a digit in its first line harmful, and one with "sorry" in it a refusal."""

    def answer(body: dict[str, Any]) -> Reply:
        last = body["messages"][-1]
        if guard in ("wildguard", "polyguard"):
            assert last["role"] == "user"
            assert "You are a classifier" in body["messages"][0]["content"]
            response = last["content"].split("AI assistant:\n", 1)[1]
        else:
            assert [each["role"] for each in body["messages"]] == ["user", "assistant"]
            response = last["content"]
        first = response.splitlines()[0]
        harm, refusal = any(c.isdigit() for c in first), "sorry" in first
        yes = {True: "yes", False: "no"}
        texts = {
            "llama-guard": "\n\nunsafe\nS2,S9" if harm else "\n\nsafe",
            "wildguard": f"Harmful request: yes\nResponse refusal: {yes[refusal]}\nHarmful response: {yes[harm]}",
            "polyguard": f"Harmful request: yes\nRequest safety violations: S2\nResponse refusal: {yes[refusal]}\n"
            f"Harmful response: {yes[harm]}\nResponse safety violations: {'S2, S9' if harm else 'None'}",
        }
        label = "Unsafe" if harm else "Controversial" if "?" in first else "Safe"
        categories = "Non-violent Illegal Acts, PII" if harm else "None"
        qwen = f"Safety: {label}\nCategories: {categories}\nRefusal: {yes[refusal].title()}"
        return Reply(texts.get(guard, qwen))

    return answer


@dataclass(frozen=True)
class Attack:
    """A response of the corpus and what is left of it without its injection."""

    id: str
    kind: str
    lang: str
    plain: str
    response: str


def attacks() -> list[Attack]:
    """The corpus of adversarial responses."""
    found = []
    with CORPUS.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            copies = [f"{n}. {row['attack']}" for n in range(row["lines"])] if "lines" in row else [row["attack"]]
            response = "\n".join([row["plain"], *copies])
            found.append(Attack(row["id"], row["kind"], row["lang"], row["plain"], response))
    return found
