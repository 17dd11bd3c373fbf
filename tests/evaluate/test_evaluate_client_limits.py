"""What the client may spend and whom it tells its key, against a real server on loopback that counts what it is asked."""

from __future__ import annotations

import json
import logging

import pytest
from asking import KEY, QUICK, many, texts
from hostile_server import hostile_server

from mixmerge.errors import UserError
from mixmerge.evaluate.client import Budget, BudgetError, Client, Limits, ServerError

# The budget


def test_a_budget_in_requests_is_never_exceeded_and_holds_for_the_life_of_the_file(server, tmp_path):
    path = tmp_path / "a.db"
    for _ in range(2):
        with Client([server.url], answers=path, budget=Budget(requests=25), limits=QUICK) as client:
            with pytest.raises(
                BudgetError, match=r"budget of 25 requests is spent: 25 of 40 .*15 are missing"
            ) as raised:
                client.ask(many(40))
            assert (raised.value.done, raised.value.missing) == (25, 15)
            assert server.requests() == 25
    with Client([server.url], answers=path, budget=Budget(requests=25), limits=QUICK) as client:
        assert len(client.ask(many(5))) == 5, "answers on disk cost nothing"
    with Client([server.url], answers=path, budget=Budget(requests=40), limits=QUICK) as client:
        assert len(client.ask(many(40))) == 40
    assert server.requests() == 40


def test_a_spent_budget_and_a_refusing_endpoint_are_called_by_the_name_that_is_given(server, tmp_path):
    scope = json.dumps(["m", [server.url], 0])
    with (
        Client(
            [server.url],
            answers=tmp_path / "a.db",
            scope=scope,
            name="judge gpt",
            budget=Budget(requests=3),
            limits=QUICK,
        ) as client,
        pytest.raises(BudgetError, match=r"^judge gpt: the budget of 3 requests is spent: 3 of 5") as raised,
    ):
        client.ask(many(5))
    told = raised.value.with_more(6).again(do="pay")
    assert (told.done, told.missing) == (3, 8)
    assert str(told) == (
        "judge gpt: the budget of 3 requests is spent: 3 of 11 requests are answered and kept, 8 are missing, "
        "about 120 tokens; pay"
    )
    server.plan(always="400")
    client = Client([server.url], answers=tmp_path / "b.db", scope=scope, name="judge gpt", limits=QUICK)
    with client, pytest.raises(ServerError, match=r"^judge gpt: every request so far was refused") as refused:
        client.ask(many(30))
    assert refused.value.of_model


@pytest.mark.parametrize(("name", "of_model"), [("401", False), ("402", False), ("403", True), ("404", True)])
def test_an_error_tells_whether_the_server_or_only_its_model_is_of_no_use(client, server, name, of_model):
    server.plan(always=name)
    with pytest.raises(ServerError) as raised:
        client.ask(many(1))
    assert raised.value.of_model == raised.value.within("here").of_model == of_model


def test_a_budget_in_tokens_stops_and_says_what_is_missing(server, tmp_path):
    with Client([server.url], answers=tmp_path / "a.db", budget=Budget(tokens=300), limits=QUICK) as client:
        with pytest.raises(BudgetError, match=r"budget of 300 tokens .* 20 are missing, about 300 tokens"):
            client.ask(many(40))
        assert client.stats()["spent"]["tokens_in"] == 200
        assert client.stats()["spent"]["tokens_out"] == 100


def test_a_budget_in_money_stops_and_says_what_is_missing(server, tmp_path):
    budget = Budget(money=0.01, price_in=20, price_out=60)  # an answer costs 0.0005
    with Client([server.url], answers=tmp_path / "a.db", budget=budget, limits=QUICK) as client:
        with pytest.raises(BudgetError, match=r"20 of 60 .*about 600 tokens or 0\.02 in money; raise the budget"):
            client.ask(many(60))
        assert client.stats()["spent"]["money"] == pytest.approx(0.01)


def test_a_budget_counts_what_was_lost_on_the_way(server, tmp_path):
    server.plan(always="truncated")
    with Client([server.url], answers=tmp_path / "a.db", budget=Budget(requests=4), limits=QUICK) as client:
        with pytest.raises(BudgetError, match=r"0 of 1 requests"):
            client.ask(many(1))
        assert client.stats()["spent"]["lost"] == 4
    assert server.requests() == 4


def test_a_budget_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"needs price_in and price_out"):
        Budget(money=1)
    with pytest.raises(ValueError, match=r"tokens -1"):
        Budget(tokens=-1)
    with pytest.raises(ValueError, match=r"timeout_s 0"):
        Limits(timeout_s=0)


# The key


def test_the_key_is_sent_and_is_found_nowhere_else(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "a.db"
    client = Client([server.url], answers=path, key_env="JUDGE_KEY", limits=QUICK)
    server.plan(by_text={"plain": ["echo key"], "escaped": ["echo escaped key"], "400": ["ok"]})
    answers = client.ask(texts("plain", "escaped", "good"))
    server.plan(always="401")
    with pytest.raises(ServerError, match=r"Incorrect API key provided: \[key\]") as raised:
        client.ask(texts("refused"))
    assert list(server.counts()["keys"]) == [KEY]
    assert "[key]" in answers[0].text
    seen = [repr(client), repr(vars(client)), repr(answers), json.dumps(client.stats()), caplog.text]
    seen += [str(raised.value), repr(raised.value), repr(raised.value.__cause__), repr(raised.value.__context__)]
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())  # the log of SQLite among them
    assert len(list(tmp_path.iterdir())) == 3
    client.close()
    assert "receive_response_headers" in caplog.text, "the transport logged"
    for text in seen:
        assert KEY not in text
    assert KEY.encode() not in files
    assert b"your key is [key]" in files
    assert KEY.encode() not in path.read_bytes()


def test_a_missing_key_is_named_before_anything_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with Client([server.url], answers=tmp_path / "a.db", key_env="JUDGE_KEY", limits=QUICK) as client:
        with pytest.raises(UserError, match=r"variable JUDGE_KEY holds no key; run `export JUDGE_KEY"):
            client.ask(many(3))
        monkeypatch.setenv("JUDGE_KEY", "two words")
        with pytest.raises(UserError, match=r"JUDGE_KEY holds what cannot be a key") as raised:
            client.ask(many(3))
        assert "two words" not in str(raised.value)
    assert server.requests() == 0


def test_keys_of_the_environment_that_nobody_named_stay_at_home(client, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nor does a proxy see what is for this machine
    client.ask(many(2))
    assert server.counts()["keys"] == {"": 2}
    assert "authorization" not in server.counts()["headers"]


def test_a_redirect_does_not_carry_the_key_to_another_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with hostile_server() as thief:
        server.plan(always=f"redirect {thief.url}/chat/completions")
        client = Client([server.url], answers=tmp_path / "a.db", key_env="JUDGE_KEY", limits=QUICK)
        with client, pytest.raises(ServerError, match=r"HTTP 307: it redirects"):
            client.ask(many(3))
        assert thief.requests() == 0


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("localhost:8000", "does not begin with http"),
        ("ftp://host/v1", "does not begin with http"),
        ("", "does not begin with http"),
        ("http://", "names no host"),
        ("http://h:99999/v1", "no port"),
        ("http://h:0/v1", "no port"),
        ("http://h:8o/v1", "no port"),
        ("http://127.0.0.1 :80/v1", "holds a blank"),
        ("http://h/v\n1", "holds a blank"),
        ("http://[::1/v1", "brackets"),
        ("http://a..b/v1", "no name"),
    ],
)
def test_what_is_no_address_is_named(tmp_path, url, fault):
    with pytest.raises(UserError, match=rf"not the address of a server: .*{fault}.*; give one such as"):
        Client([url], answers=tmp_path / "a.db")


def test_a_secret_in_an_address_is_refused_and_not_quoted(tmp_path):
    for url in (f"http://me:{KEY}@host/v1", f"https://host/v1?api_key={KEY}"):
        with pytest.raises(UserError, match=r"address of host holds .*`key`") as raised:
            Client([url], answers=tmp_path / "a.db")
        assert KEY not in str(raised.value)
