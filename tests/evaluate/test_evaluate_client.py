"""The client against a real server on loopback that does everything a server should not, and counts what it is asked."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from asking import KEY, QUICK, body, many, texts
from hostile_server import hostile_server

from mixmerge.evaluate.answers import Answers, request_key
from mixmerge.evaluate.client import Client, Limits, ServerError

MENDED = [
    *("429", "429 seconds", "429 date", "429 nonsense", "408", "500", "502", "503", "529", "error inside"),
    *("drop", "reset", "drop mid-body", "long length", "short length", "bad length", "not http", "many headers"),
    *("bad chunks", "empty", "truncated", "html", "list", "no choices", "null message", "number", "not utf-8"),
    *("deep", "digits", "huge", "bomb", "bad zip"),
]


# What asking again mends


def test_whatever_a_server_does_once_is_mended_by_asking_once_more(server, tmp_path):
    server.plan(by_text={name: [name, "ok"] for name in MENDED})
    limits = Limits(timeout_s=60, patience_s=60, backoff_s=0.01, backoff_most_s=0.05, max_reply_bytes=2**20)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        answers = client.ask(texts(*MENDED))
        stats = client.stats()
    assert [answer.text for answer in answers] == [f"answer to {name}" for name in MENDED]
    counts = server.counts()
    assert counts["texts"] == dict.fromkeys(MENDED, 2)
    assert stats["sent"] >= counts["requests"] == 2 * len(MENDED)  # one may meet a connection that was just closed
    assert sum(stats["retried"].values()) == stats["sent"] - len(MENDED)
    assert stats["retried"]["rate_limit"] == 4
    assert stats["spent"]["answered"] == len(MENDED)


def test_a_server_that_hangs_or_drips_is_left_after_the_timeout(server, tmp_path):
    server.plan(by_text={"hang": ["hang", "ok"], "drip": ["drip", "ok"]})
    limits = Limits(timeout_s=2, patience_s=60, backoff_s=0.01)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        answers = client.ask(texts("hang", "drip"))
        assert client.stats()["retried"]["timeout"] >= 2
        assert client.stats()["lost"] >= 2  # the server may have done the work
    assert [answer.text for answer in answers] == ["answer to hang", "answer to drip"]


def test_retry_after_is_waited_for_in_seconds_and_as_a_date(client, server):
    for name, least in (("429 seconds", 0.19), ("503", 0.09)):
        server.plan(script=[name])
        began = time.monotonic()
        client.ask(texts(f"after {name}"))
        assert time.monotonic() - began >= least
    assert client.stats()["waited_s"] > 0.2


def test_a_bad_mixture_of_failures_costs_no_answer(server, tmp_path):
    server.plan(script=["500", "drop", "429", "truncated", "reset", "529", "html", "ok", "502", "drop mid-body"] * 8)
    limits = Limits(patience_s=60, attempts=80, backoff_s=0.01, backoff_most_s=0.05)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        answers = client.ask(many(60))
    assert [answer.text for answer in answers] == [f"answer to p{n}" for n in range(60)]
    assert set(server.counts()["answered"].values()) == {1}


def test_a_server_that_starts_late_is_waited_for(tmp_path):
    with hostile_server() as early:
        port = early.port
    started = []
    with Client([f"http://127.0.0.1:{port}/v1"], answers=tmp_path / "a.db", limits=QUICK) as client:
        late = threading.Thread(target=lambda: started.append(client.ask(many(5))))
        late.start()
        with hostile_server(port):
            late.join()
    assert [answer.text for answer in started[0]] == [f"answer to p{n}" for n in range(5)]


# What asking again does not mend


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("401", r"HTTP 401 .*check the key"),
        ("402", r"HTTP 402 .*top up the account"),
        ("403", r"HTTP 403 .*check the key"),
        ("404", r"HTTP 404 .*does not exist.*name of the model"),
        ("429 quota", r"insufficient_quota.*top up the account"),
        ("429 hour", r"none to be had for another 3\d\d\d s"),
    ],
)
def test_an_endpoint_that_will_never_answer_ends_the_call_at_once(client, server, name, error):
    server.plan(always=name)
    with pytest.raises(ServerError, match=error) as raised:
        client.ask(many(1))
    assert server.requests() == 1
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(server.url)


def test_what_a_server_says_cannot_steer_the_terminal(client, server):
    server.plan(always="terminal")
    with pytest.raises(ServerError) as raised:
        client.ask(many(1))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["429", "500", "529", "drop", "503"])
def test_patience_with_a_server_that_keeps_failing_ends(server, tmp_path, name):
    server.plan(always=name)
    limits = Limits(patience_s=0.5, backoff_s=0.05)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        with pytest.raises(ServerError, match=r"no answer.* 0 of 30 requests .* run again to carry on"):
            client.ask(many(30))
        server.plan()
        assert len(client.ask(many(30))) == 30, "the next call starts afresh"


def test_a_server_that_is_not_there_is_named(tmp_path):
    with hostile_server() as gone:
        url = gone.url
    with Client([url], answers=tmp_path / "a.db", limits=Limits(patience_s=0.3, backoff_s=0.05)) as client:
        with pytest.raises(ServerError, match=rf"{url}: no answer.*ConnectError"):
            client.ask(many(3))
        assert client.stats()["spent"]["lost"] == 0, "nothing was sent, so nothing is charged"


def test_a_host_that_no_name_server_knows_ends_the_call_at_once(tmp_path):
    url = "http://no-such-host.invalid/v1"
    with Client([url], answers=tmp_path / "a.db") as client:  # as patient as it is by default
        with pytest.raises(ServerError, match=rf"^{url}: its host is not found .* 0 of 3 .*; check the address$"):
            client.ask(many(3))
        assert client.stats()["spent"]["lost"] == 0


def test_a_host_that_is_not_found_is_left_out_where_an_equal_server_answers(server, tmp_path):
    told = []
    with Client([server.url, "http://no-such-host.invalid/v1"], answers=tmp_path / "a.db", limits=QUICK) as client:
        client.tell = told.append
        assert [answer.error for answer in client.ask(many(20))] == [None] * 20
    assert told == []


def test_a_silence_of_a_server_that_fails_is_told_once_with_its_reason(server, tmp_path):
    with hostile_server() as gone:
        url = gone.url
    told, limits = [], Limits(patience_s=1.5, silent_s=0.1, backoff_s=0.02, backoff_most_s=0.1)
    with Client([url], answers=tmp_path / "a.db", limits=limits) as client:
        client.tell = told.append
        with pytest.raises(ServerError):
            client.ask(many(3))
        [line] = told
        assert line.startswith(f"{url}: no answer for 0 s: ConnectError")
        assert line.endswith("; it is tried for up to 1 s more")
        with pytest.raises(ServerError):
            client.ask(many(3))
    assert len(told) == 2, "every call has its own silences"


def test_a_silence_says_what_a_failing_server_says_but_not_the_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.plan(by_text={"p0": ["500"] * 12 + ["ok"]})
    told, limits = [], Limits(silent_s=0.05, attempts=99, backoff_s=0.02, backoff_most_s=0.05)
    with Client([server.url], answers=tmp_path / "a.db", key_env="JUDGE_KEY", limits=limits) as client:
        client.tell = told.append
        assert client.ask(many(1))[0].text == "answer to p0"
    [line] = told
    assert "HTTP 500 (x: oh no); it is tried for up to 15 min more" in line
    assert KEY not in line


def test_a_server_that_is_only_slow_is_let_be_for_longer(server, tmp_path):
    server.plan(by_text={"p0": ["hang", "ok"]})
    told, limits = [], Limits(timeout_s=2, silent_s=0.1, backoff_s=0.01)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        client.tell = told.append
        client.ask(many(1))
    assert told[0].endswith("s: 1 requests are under way")
    assert len(told) <= 2, "and once more where it fails in the end"


def test_a_server_that_answers_gives_nothing_to_tell(client, server):
    told = []
    client.tell = told.append
    client.ask(many(30))
    assert told == []


def test_a_web_page_instead_of_an_endpoint_is_found_out_before_patience_ends(client, server):
    server.plan(always="html")
    with pytest.raises(ServerError, match=r"a web page, not JSON.*check the address"):
        client.ask(many(3))
    assert server.requests() < 3 * QUICK.attempts + 3


def test_one_poisonous_request_does_not_end_the_call(client, server):
    server.plan(by_text={"p1": ["500"], "p2": ["truncated"]})
    answers = client.ask(many(40))
    assert sum(answer.error is None for answer in answers) == 38
    assert "HTTP 500" in answers[1].error
    assert "not whole JSON" in answers[2].error
    assert server.counts()["texts"]["p1"] == QUICK.attempts
    server.plan()
    assert client.ask(many(3))[1].error == answers[1].error
    assert server.requests() == 0, "it is on disk with its reason"


@pytest.mark.parametrize(
    ("name", "finish", "error"),
    [
        ("400", "error", "HTTP 400 (invalid_request: this model does not know that parameter)"),
        ("400 filter", "content_filter", "HTTP 400 (content_filter: The response was filtered)"),
        ("403 flagged", "content_filter", "HTTP 403 (x: your input was flagged by moderation)"),
        ("413", "error", "HTTP 413 (x: too long)"),
        ("422", "error", 'HTTP 422 ({"detail": [{"loc": ["body"], "msg": "bad"}]})'),
        ("filtered", "content_filter", "the server's content filter stopped the answer"),
    ],
)
def test_a_request_that_is_refused_is_an_answer_with_the_reason(client, server, name, finish, error):
    server.plan(by_text={"bad": [name]})
    good, bad = client.ask(texts("good", "bad"))
    assert good.error is None
    assert (bad.text, bad.finish, bad.error, bad.cached) == ("", finish, error, False)
    good, bad = client.ask(texts("good", "bad"))
    assert (bad.text, bad.finish, bad.error, bad.cached) == ("", finish, error, True)
    assert server.counts()["texts"] == {"good": 1, "bad": 1}


def test_a_server_that_refuses_every_request_is_named_and_nothing_is_kept(client, server):
    server.plan(always="400")
    with pytest.raises(ServerError, match=r"every request so far was refused: HTTP 400.*response format"):
        client.ask(many(200))
    assert server.requests() < 100
    server.plan()
    assert all(answer.error is None for answer in client.ask(many(20)))


def test_a_refused_first_try_is_answered_and_may_be_tried_again(client, server):
    """A caller asks whether a server has a feature; the server may have it tomorrow."""
    server.plan(always="400")
    assert client.ask(many(1))[0].error
    server.plan()
    assert client.ask(many(1))[0].text == "answer to p0"


# What is in an answer


@pytest.mark.parametrize(
    ("name", "text", "finish"),
    [
        ("nul", "answer\0to nul", "stop"),
        ("surrogate", "half \ufffd of a pair, \ufffd\ufffd", "stop"),
        ("parts", "the answer", "stop"),
        ("refusal", "I will not.", "stop"),
        ("null", "", "stop"),
        ("length", "cut", "length"),
        ("no finish", "x", "unknown"),
        ("zipped", "answer to zipped", "stop"),
        ("cookie", "answer to cookie", "stop"),
    ],
)
def test_odd_answers_are_read_alike_from_the_wire_and_from_disk(client, server, name, text, finish):
    server.plan(always=name)
    for cached in (False, True):
        (answer,) = client.ask(texts(name))
        assert (answer.text, answer.finish, answer.error, answer.cached) == (text, finish, None, cached)
        answer.text.encode("utf-8")
    assert server.requests() == 1


@pytest.mark.parametrize("name", ["usage lies", "usage list"])
def test_impossible_token_counts_are_none_and_the_budget_guesses(client, server, name):
    server.plan(always=name)
    (answer,) = client.ask(texts(name))
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)
    assert client.stats()["uncounted"] == 1
    assert 0 < client.stats()["spent"]["tokens_in"] < 100


def test_prompts_with_unpaired_surrogates_and_nul_can_be_sent(client):
    prompts = ["\ud800 half", "nul \0", "नमस्ते", "\U0001f600"]
    assert [a.text for a in client.ask(texts(*prompts))] == [
        f"answer to {p}".replace("\ud800", "\ufffd") for p in prompts
    ]
    assert [a.cached for a in client.ask(texts(*prompts))] == [True] * 4


def test_a_server_cannot_make_the_client_carry_cookies(client, server):
    server.plan(always="cookie")
    client.ask(many(5))
    assert "cookie" not in server.counts()["headers"]


# Paid for once


def test_answers_keep_the_order_of_the_bodies_and_equal_ones_are_asked_once(client, server):
    names = ["b", "a", "b", "c", "a", "b"]
    seen = []
    answers = client.ask(texts(*names), progress=lambda done, of: seen.append((done, of)))
    assert [answer.text for answer in answers] == [f"answer to {name}" for name in names]
    assert server.counts()["texts"] == {"a": 1, "b": 1, "c": 1}
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    assert seen == sorted(seen)


def test_samples_are_asked_for_by_seed(client, server):
    client.ask([body("a", seed=n) for n in (1, 2, 3, 3)])
    assert server.counts()["texts"] == {"a": 3}


def test_answers_are_found_by_scope_and_whole_body_in_any_order_of_keys(server, tmp_path):
    path = tmp_path / "new" / "folder" / "a.db"
    with Client([server.url], answers=path, scope="judge", limits=QUICK) as client:
        client.ask(many(3))
    with Client(["http://127.0.0.1:9/v1"], answers=path, scope="judge", limits=QUICK) as client:
        answers = client.ask([dict(reversed(b.items())) for b in many(3)])
        assert [answer.cached for answer in answers] == [True] * 3
        assert client.stats()["cached"] == 3
    with Client([server.url], answers=path, limits=QUICK) as client:
        assert not client.ask(many(1))[0].cached, "another scope"
    assert server.requests() == 4
    assert request_key("s", {"a": 1}) != request_key("s", {"a": 1.5})


ASK = """
import sys, json
from pathlib import Path
from mixmerge.evaluate.client import Client, Limits
url, path, first, last, at_once = sys.argv[1:]
bodies = [{"model": "m", "messages": [{"role": "user", "content": f"p{n}"}], "max_tokens": 8}
          for n in range(int(first), int(last))]
limits = Limits(concurrency=int(at_once), backoff_s=0.01)
with Client([url], answers=Path(path), scope="s", limits=limits) as client:
    answers = client.ask(bodies)
    print(json.dumps([[a.text for a in answers], client.stats()]))
"""


def start(server, path: Path, first: int, last: int, at_once: int) -> subprocess.Popen:
    arguments = [server.url, str(path), str(first), str(last), str(at_once)]
    return subprocess.Popen([sys.executable, "-c", ASK, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_asks_again_only_what_was_in_flight(server, tmp_path):
    path, at_once, total = tmp_path / "a.db", 8, 150
    server.plan(latency_s=0.02)
    for least in (20, 60, 100):
        process = start(server, path, 0, total, at_once)
        while server.requests() < least:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = Answers(path)
    keys = {request_key("s", b): b["messages"][0]["content"] for b in many(total)}
    on_disk = {keys[key] for key in kept.find(list(keys))}
    kept.close()
    assert 0 < len(on_disk) < total
    before = server.counts()["texts"]
    process = start(server, path, 0, total, at_once)
    found, stats = json.loads(process.communicate()[0])
    assert found == [f"answer to p{n}" for n in range(total)]
    after = server.counts()["texts"]
    assert {name for name in after if after[name] > before.get(name, 0)} == set(after) - on_disk
    assert stats["sent"] == total - len(on_disk)
    assert stats["cached"] == len(on_disk)
    assert sum(after.values()) <= total + 3 * at_once, "a kill costs what was in flight"


def test_two_processes_share_one_file(server, tmp_path):
    path = tmp_path / "a.db"
    server.plan(latency_s=0.01)
    processes = [start(server, path, first, first + 60, 4) for first in (0, 30)]
    results = [json.loads(process.communicate()[0]) for process in processes]
    for first, (found, _) in zip((0, 30), results, strict=True):
        assert found == [f"answer to p{n}" for n in range(first, first + 60)]
    answers = Answers(path)
    assert answers.spent("s").answered == server.requests() == sum(stats["sent"] for _, stats in results)
    answers.close()
    assert set(server.counts()["texts"]) == {f"p{n}" for n in range(90)}


def test_an_answer_is_on_disk_before_progress_counts_it(client, tmp_path):
    other = Answers(tmp_path / "answers.db")
    keys = [request_key(client.scope, b) for b in many(20)]
    found = []
    client.ask(many(20), progress=lambda done, _: found.append((done, len(other.find(keys)))))
    other.close()
    assert len(found) == 21
    assert all(done <= on_disk for done, on_disk in found)


def test_answers_survive_a_caller_that_breaks_off(client, server):
    def stop(done: int, _: int) -> None:
        if done >= 10:
            raise KeyError("enough")

    with pytest.raises(KeyError, match=r"enough"):
        client.ask(many(40), progress=stop)
    asked = server.requests()
    assert len(client.ask(many(40))) == 40
    assert server.requests() <= 40 + asked - 10


# Several servers, and how much they take


def test_equal_servers_share_the_work_and_one_that_dies_is_left_out(server, tmp_path):
    server.plan(latency_s=0.01)
    with hostile_server() as second, hostile_server() as third:
        second.plan(latency_s=0.01)
        third.plan(always="401")
        urls = [server.url, second.url + "/", third.url + "/chat/completions"]
        with Client(urls, answers=tmp_path / "a.db", scope="s", limits=QUICK) as client:
            client.ask(many(60))
            shares = [server.requests(), second.requests()]
            assert sum(shares) == 60
            assert min(shares) >= 15
            assert 1 <= third.requests() <= 8
            second.process.kill()
            answers = client.ask(texts(*(f"q{n}" for n in range(60))))
        assert [answer.error for answer in answers] == [None] * 60
        assert set(server.counts()["paths"]) == {"POST /v1/chat/completions"}


@pytest.mark.parametrize("style", ["queue", "refuse"])
def test_a_server_with_few_slots_answers_everything_once(server, tmp_path, style):
    server.plan(slots=12, style=style, latency_s=0.1)
    with Client([server.url], answers=tmp_path / "a.db", limits=QUICK) as client:
        client.ask(many(240))
        found = client.stats()["concurrency"][server.url]
    counts = server.counts()
    assert found >= 8
    assert counts["refused"] <= 40
    assert set(counts["answered"].values()) == {1}


def test_a_fixed_concurrency_is_kept_to(server, tmp_path):
    server.plan(latency_s=0.02)
    limits = Limits(concurrency=3)
    with Client([server.url], answers=tmp_path / "a.db", limits=limits) as client:
        client.ask(many(20))
    assert server.counts()["peak"] == 3


# The way in


def test_the_client_can_be_used_where_a_loop_runs_already(client):
    async def notebook() -> list:
        return client.ask(many(3))

    assert [answer.text for answer in asyncio.run(notebook())] == [f"answer to p{n}" for n in range(3)]


def test_bodies_that_cannot_be_asked_are_refused_before_anything_is_sent(client, server):
    with pytest.raises(ValueError, match=r"a stream"):
        client.ask([body("a", stream=True)])
    with pytest.raises(ValueError, match=r"JSON compliant"):
        client.ask([body("a", temperature=float("nan"))])
    assert client.ask([]) == []
    assert server.requests() == 0
