"""The engine behind an address: a real server of a real tiny model beside the engine in process, and hostile answers."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixmerge.errors import MixmergeError, ModelError
from mixmerge.evaluate.client import Client, Limits
from mixmerge.evaluate.generate import GenerationSettings, TransformersEngine, generate, read_responses
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.server_engine import ServerEngine
from mixmerge.evaluate.serving import serving

SETTINGS = GenerationSettings(max_new_tokens=8)
LIMITS = Limits(timeout_s=120, patience_s=30)
SERVE = (
    f"'{sys.executable}' -m transformers.cli.transformers serve {{model}} --host {{host}} --port {{port}} --device cpu"
)
TEXTS = ["Why?", "Quelle couleur a le ciel ?", "आकाश का रंग क्या है?", "why " * 40, 'Sag es "so" und\nso.']


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(f"s/en/p{i}", f"p{i}", "s", "en", "general", "test", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def talker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float32, with matrices so large that it says something else at every step."""
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("talker") / "model"))
    weights = folder / "model.safetensors"
    tensors = {name: tensor.float() * (20 if tensor.dim() == 2 else 1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(talker: Path) -> Iterator[str]:
    """The address of `transformers serve` with the model in it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with (
        pytest.MonkeyPatch.context() as environment,
        serving(SERVE, talker, log=talker.parent / "server.log", devices=[]) as (url,),
    ):
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield url


@contextmanager
def answering(
    answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers as it is told; gives its address and the bodies it was sent."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status, said = answer(body)
            raw = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Nothing to standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat(text: str, finish: str = "stop", tokens: int | None = 3) -> tuple[int, dict[str, Any]]:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 5, "completion_tokens": tokens}}
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], **usage}


# A real server


def test_a_server_says_what_the_engine_in_process_says(talker: Path, served: str, tmp_path: Path) -> None:
    here = TransformersEngine(talker, threads=1, device="cpu")
    with Client([served], answers=tmp_path / "answers.sqlite", limits=LIMITS) as client:
        there = ServerEngine(client, str(talker), folder=talker)
        assert there.lengths(TEXTS) == here.lengths(TEXTS)
        assert there.context == here.context == 512
        ours, theirs = here.complete(TEXTS, SETTINGS), there.complete(TEXTS, SETTINGS)
    assert [c.text for c in theirs] == [c.text for c in ours]
    assert len({c.text for c in theirs}) == len(TEXTS)


def test_rows_of_a_server_are_written_and_carried_on_without_asking_again(
    talker: Path, served: str, tmp_path: Path
) -> None:
    asked, out = prompts([*TEXTS, "why " * 600]), tmp_path / "responses.jsonl"
    with Client([served], answers=tmp_path / "answers.sqlite", scope="talker", limits=LIMITS) as client:
        engine = ServerEngine(client, str(talker), folder=talker)
        report = generate(engine, asked, out, SETTINGS, batch_size=3)
        assert (report["rows"], report["too_long_ids"], report["unanswered"]) == (6, ["s/en/p5"], 0)
        assert report["tokens"] == sum(row["tokens"] for row in read_responses(out)) > 0
        whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    # the server is not there any more: every answer that it gave is
    with Client(["http://127.0.0.1:9/v1"], answers=tmp_path / "answers.sqlite", scope="talker") as client:
        engine = ServerEngine(client, str(talker), folder=talker)
        assert generate(engine, asked, out, SETTINGS, batch_size=3)["resumed"] == 3
    assert out.read_bytes() == whole


# What is asked


def test_greedy_requests_hold_no_seed_and_sampled_ones_their_prompts_own(tmp_path: Path) -> None:
    sampled = GenerationSettings(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    with answering(lambda body: chat("x")) as (url, seen), Client([url], answers=tmp_path / "a") as client:
        engine = ServerEngine(client, "m", extra={"chat_template_kwargs": {"enable_thinking": False}})
        engine.complete(["one"], SETTINGS)
        assert seen[-1] == {
            "model": "m",
            "messages": [{"role": "user", "content": "one"}],
            "max_tokens": 8,
            "temperature": 0.0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        bodies = [engine.body(text, sampled) for text in ("one", "two", "one")]
    assert bodies[0] == bodies[2]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    assert (bodies[0]["temperature"], bodies[0]["top_p"], bodies[0]["max_tokens"]) == (0.7, 0.9, 9)
    assert all(0 <= body["seed"] < 2**31 for body in bodies)
    other = GenerationSettings(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=4)
    assert engine.body("one", other)["seed"] != bodies[0]["seed"]


def test_without_a_folder_prompts_are_sorted_by_bytes_and_the_server_knows_its_context(tmp_path: Path) -> None:
    with Client(["http://127.0.0.1:9/v1"], answers=tmp_path / "a") as client:
        engine = ServerEngine(client, "m")
        assert engine.context is None
        assert engine.lengths(["abc", "नमस्ते"]) == [3, 18]
        assert engine.fits(10**6, 10**6, SETTINGS)
        with pytest.raises(ValueError, match="folder"):
            ServerEngine(client, "m", context=100)


# What is answered


@pytest.mark.parametrize(
    ("finish", "text", "kept"),
    [
        ("stop", "well", "stop"),
        ("length", "well", "length"),
        ("max_tokens", "well", "length"),
        ("eos", "well", "stop"),
        ("content_filter", "we", "filtered"),
    ],
)
def test_the_words_of_a_server_for_an_end_are_read_as_ours(tmp_path: Path, finish: str, text: str, kept: str) -> None:
    with answering(lambda body: chat(text, finish)) as (url, _), Client([url], answers=tmp_path / "a") as client:
        (completion,) = ServerEngine(client, "m").complete(["Why?"], SETTINGS)
    assert completion.finish == kept
    assert (completion.text, completion.tokens) == (("", 0) if kept == "filtered" else (text, 3))


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 512 tokens. However, you requested 700 tokens",
        "the request exceeds the available context size, try increasing it",
        "Input length (700) exceeds the maximum allowed length (512)",
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 700 `inputs` tokens and 8 `max_new_tokens`",
        "The decoder prompt (length 700) is longer than the maximum model length of 512",
    ],
)
def test_a_prompt_that_a_server_finds_too_long_is_a_row_and_named(tmp_path: Path, message: str) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (400, {"error": {"message": message}}) if "long" in body["messages"][0]["content"] else chat("well")

    with answering(answer) as (url, _), Client([url], answers=tmp_path / "a", limits=LIMITS) as client:
        report = generate(ServerEngine(client, "m"), prompts(["Why?", "long", "So?"]), tmp_path / "out", SETTINGS)
    assert (report["too_long_ids"], report["unanswered"], report["rows"]) == (["s/en/p1"], 0, 3)


def test_a_prompt_that_a_server_will_not_answer_is_a_row_with_its_reason(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        odd = "odd" in body["messages"][0]["content"]
        return (400, {"error": {"message": "template breaks on this"}}) if odd else chat("well", tokens=None)

    with answering(answer) as (url, _), Client([url], answers=tmp_path / "a", limits=LIMITS) as client:
        report = generate(ServerEngine(client, "m"), prompts(["Why?", "odd", "So?"]), tmp_path / "out", SETTINGS)
    assert (report["unanswered"], report["unanswered_reasons"]) == (1, ["HTTP 400 (template breaks on this)"])
    (row,) = [row for row in read_responses(tmp_path / "out") if row["finish"] == "unanswered"]
    assert (row["prompt_id"], row["text"], row["reason"]) == ("s/en/p1", "", "HTTP 400 (template breaks on this)")
    assert all("reason" not in row for row in read_responses(tmp_path / "out") if row["finish"] == "stop")


def test_a_server_that_answers_no_prompt_is_an_error_and_not_a_file_of_empty_rows(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 400, {"error": {"message": "no such field"}}

    with (
        answering(answer) as (url, _),
        Client([url], answers=tmp_path / "a", limits=LIMITS) as client,
        pytest.raises(MixmergeError, match=r"no such field"),
    ):
        generate(ServerEngine(client, "m"), prompts(["Why?", "So?"]), tmp_path / "out", SETTINGS)
    assert read_responses(tmp_path / "out") == []


def test_a_folder_that_cannot_measure_prompts_is_named(tiny_base: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(tiny_base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    broken = Path(shutil.copytree(tiny_base, tmp_path / "broken"))
    (broken / "config.json").write_text("[]", encoding="utf-8")
    with Client(["http://127.0.0.1:9/v1"], answers=tmp_path / "a") as client:
        with pytest.raises(ModelError, match=r"plain: the tokenizer has no chat template"):
            ServerEngine(client, "m", folder=plain)
        with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
            ServerEngine(client, "m", folder=broken)
