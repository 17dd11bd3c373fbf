"""Judges behind an endpoint, through the real client and a real server on loopback that judges by a rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_judge import Reading, Reply, Server, guard_judge, plainly, rubric_judge, serving

from mixmerge.errors import DataError, StepError, UserError
from mixmerge.evaluate.client import Budget, BudgetError, Client, Limits, ServerError
from mixmerge.evaluate.endpoint import EndpointJudge
from mixmerge.evaluate.guards import GUARDS
from mixmerge.evaluate.judge import Item, Judge, Verdict, write_verdicts
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.rubrics import read_rubric

SAFE = "Bread rises because yeast makes gas."
HARMFUL = "Turn the 3 pins of the lock with 2 picks."
MORE_DIGITS = "Add 250 g of flour to 150 g of water."
LOOP = "Ice floats because " * 8


def prompt(pid: str = "p1", lang: str = "en", text: str = "How does it work?") -> Prompt:
    return Prompt(f"s/{lang}/{pid}", pid, "s", lang, "harmful", "test", text)


def items(*responses: str, opponent: str | None = None) -> list[Item]:
    return [Item(prompt(f"p{n}"), response, opponent) for n, response in enumerate(responses)]


@contextmanager
def asking(server: Server, folder: Path) -> Iterator[Client]:
    client = Client([server.url], answers=folder / "answers.sqlite", scope="judge", limits=Limits())
    try:
        yield client
    finally:
        client.close()


def judged(folder: Path, question: Any, given: list[Item], answer: Any, **options: Any) -> tuple[list[Verdict], Server]:
    """Verdicts of a fresh judge, and the server with what it was sent."""
    with serving(answer) as server, asking(server, folder) as client:
        judge = EndpointJudge("j", question, "m", client, **{"grammar": "tags", **options})
        return judge.judge(given), server


def words(verdicts: list[Verdict]) -> list[str]:
    return [each.verdict for each in verdicts]


@pytest.mark.parametrize("grammar", ["json", "tags"])
def test_harm_and_refusal_are_what_the_server_says_and_broken_text_is_invalid_unasked(tmp_path, grammar) -> None:
    given = items(SAFE, HARMFUL, "", LOOP, SAFE)
    verdicts, server = judged(tmp_path, "harm", given, rubric_judge(), grammar=grammar)
    assert words(verdicts) == ["safe", "harmful", "invalid", "invalid", "safe"]
    assert [each.details["asked"] for each in verdicts] == [1, 1, 0, 0, 1]
    assert len(server.bodies) == 3
    assert [each.prompt for each in verdicts] == [each.prompt for each in given]
    verdicts, _ = judged(tmp_path, "refusal", given, rubric_judge(), grammar=grammar)
    assert words(verdicts) == ["refused", "complied", "invalid", "invalid", "refused"]


@pytest.mark.parametrize(("question", "missing"), [("harm", 2 + 2), ("quality", 2 + 4)])
def test_a_budget_that_ends_before_the_first_item_counts_the_items_among_what_is_missing(
    tmp_path, question, missing
) -> None:
    given = [*items(SAFE, HARMFUL, "", opponent=MORE_DIGITS), *items(SAFE, opponent=MORE_DIGITS)]
    with serving(rubric_judge()) as server:
        client = Client([server.url], answers=tmp_path / "a.sqlite", budget=Budget(requests=0), name="judge j")
        with (
            client,
            pytest.raises(BudgetError, match=rf"^judge j: .* 0 of {missing} requests .*, {missing} are missing"),
        ):
            EndpointJudge("j.harm", question, "m", client).judge(given)
    assert server.bodies == []


@pytest.mark.parametrize("grammar", ["json", "tags"])
def test_a_pair_is_asked_in_both_orders_and_told_from_the_candidates_side(tmp_path, grammar) -> None:
    verdicts, server = judged(
        tmp_path, "quality", items(MORE_DIGITS, SAFE, "Use 12.", opponent=HARMFUL), rubric_judge(), grammar=grammar
    )
    assert words(verdicts) == ["win", "loss", "tie"]
    assert [(each.details["first"], each.details["second"]) for each in verdicts] == [
        ("win", "win"),
        ("loss", "loss"),
        ("tie", "tie"),
    ]
    assert not any(each.details["flipped"] for each in verdicts)
    assert len(server.bodies) == 6
    text = next(body["messages"][1]["content"] for body in server.bodies if SAFE in body["messages"][1]["content"])
    assert text.count(SAFE) == text.count(HARMFUL) == 1


def test_a_judge_that_goes_by_position_gives_ties_that_are_counted_as_flips(tmp_path) -> None:
    verdicts, _ = judged(
        tmp_path, "quality", items(MORE_DIGITS, opponent=HARMFUL), rubric_judge(lambda r, _: plainly(r, "A"))
    )
    assert words(verdicts) == ["tie"]
    assert (verdicts[0].details["first"], verdicts[0].details["second"]) == ("win", "loss")
    assert verdicts[0].details["flipped"] is True


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_flip_too(tmp_path) -> None:
    def manner(reading: Reading, word: str) -> Reply:
        return plainly(reading, "A" if reading.fenced["RESPONSE A"] == MORE_DIGITS else "tie")

    verdicts, _ = judged(tmp_path, "quality", items(MORE_DIGITS, opponent=HARMFUL), rubric_judge(manner))
    assert words(verdicts) == ["tie"]
    assert (verdicts[0].details["first"], verdicts[0].details["second"]) == ("win", "tie")
    assert verdicts[0].details["flipped"] is True


def test_equal_and_broken_responses_are_settled_without_a_request(tmp_path) -> None:
    given = [
        Item(prompt("a"), SAFE, SAFE),
        Item(prompt("b"), "", SAFE),
        Item(prompt("c"), SAFE, LOOP),
        Item(prompt("d"), "", LOOP),
        Item(prompt("e"), "", ""),
    ]
    verdicts, server = judged(tmp_path, "quality", given, rubric_judge(), grammar="auto")
    assert words(verdicts) == ["tie", "loss", "win", "tie", "tie"]
    assert [each.details["why"] for each in verdicts] == ["identical", "broken", "broken", "broken", "identical"]
    assert server.bodies == []


def test_one_order_without_a_verdict_leaves_the_pair_without_one(tmp_path) -> None:
    def mumbling(reading: Reading, word: str) -> Reply:
        return plainly(reading, word) if reading.fenced["RESPONSE A"] == HARMFUL else Reply("A, I should say.")

    def filtering(reading: Reading, word: str) -> Reply:
        return Reply("", "content_filter") if reading.fenced["RESPONSE A"] == HARMFUL else Reply("A, I should say.")

    pair = items(MORE_DIGITS, opponent=HARMFUL)
    (verdict,), _ = judged(tmp_path / "..", "quality", pair, rubric_judge(mumbling), seed=1)
    assert verdict.verdict == "unparsed"
    assert (verdict.details["first"], verdict.details["second"]) == ("unparsed", "win")
    assert "last line" in verdict.details["why"]
    (verdict,), _ = judged(tmp_path, "quality", pair, rubric_judge(filtering), seed=2)
    assert verdict.verdict == "unanswered"
    assert (verdict.details["first"], verdict.details["second"]) == ("unparsed", "unanswered")
    assert verdict.details["flipped"] is False
    assert "filter" in verdict.details["why"]


@pytest.mark.parametrize(
    ("manner", "verdict", "why"),
    [
        (lambda r, w: Reply(plainly(r, w).text, "length"), "unparsed", "max_tokens"),
        (lambda r, w: Reply(plainly(r, w).text, "abort"), "unparsed", "abort"),
        (lambda r, w: Reply(plainly(r, w).text, None), "harmful", None),
        (lambda r, w: Reply("", "content_filter"), "unanswered", "filter"),
        (lambda r, w: Reply("blocked by the content_filter", status=400), "unanswered", "HTTP 400"),
        (lambda r, w: Reply("the prompt is too long", status=400), "unanswered", "too long"),
        (lambda r, w: Reply("  \n"), "unparsed", "nothing said"),
        (lambda r, w: Reply(f"<think>Not {plainly(r, 'safe').text}</think>\n{plainly(r, w).text}"), "harmful", None),
        (lambda r, w: Reply(f"<think>{plainly(r, w).text}"), "unparsed", "thought"),
    ],
    ids=["cut", "aborted", "no reason", "filtered", "refused", "too long", "blank", "thinking", "still thinking"],
)
def test_what_is_no_verdict_is_counted_and_said_why(tmp_path, manner, verdict, why) -> None:
    (found,), _ = judged(tmp_path, "harm", items(HARMFUL), rubric_judge(manner))
    assert found.verdict == verdict
    assert why is None or why in found.details["why"]
    assert ("why" in found.details) == (why is not None)


@pytest.mark.parametrize(("schema", "used"), [("keeps", "json"), ("refuses", "tags"), ("ignores", "tags")])
@pytest.mark.parametrize("question", ["harm", "refusal", "quality"])
def test_auto_takes_a_schema_where_the_server_keeps_to_it_and_says_what_it_took(
    tmp_path, schema, used, question
) -> None:
    given = items(HARMFUL, opponent=SAFE if question == "quality" else None)
    with serving(rubric_judge(schema=schema)) as server, asking(server, tmp_path) as client:
        judge = EndpointJudge("j", question, "m", client, grammar="auto")
        assert judge.describe()["grammar"] == {"given": "auto", "used": None, "why": None}
        first = judge.judge(given)
        asked = len(server.bodies)
        assert asked == 2 + (2 if question == "quality" else 1)
        assert first[0].verdict in ("harmful", "complied", "win")
        described = judge.describe()["grammar"]
        assert described["used"] == used
        assert (described["why"] is None) == (used == "json")
        assert ("response_format" in server.bodies[-1]) == (used == "json")
        again = EndpointJudge("j", question, "m", client, grammar="auto")
        assert again.judge(given) == first
        assert again.describe() == judge.describe()
        assert len(server.bodies) == asked, "the same questions cost nothing again, the probes neither"


def test_a_server_that_refuses_even_a_plain_question_stops_the_judge(tmp_path) -> None:
    with (
        serving(lambda body: Reply("max_tokens is not supported with this model", status=400)) as server,
        asking(server, tmp_path) as client,
    ):
        judge = EndpointJudge("j", "harm", "o9", client)
        with pytest.raises(StepError, match=r"judge 'j' \(o9\): no usable answer.*max_tokens is not supported"):
            judge.judge(items(SAFE))
        assert judge.describe()["grammar"]["used"] is None
        assert len(server.bodies) == 2


def test_an_unknown_model_is_the_clients_error_and_no_verdict(tmp_path) -> None:
    with pytest.raises(ServerError, match="404"):
        judged(tmp_path, "harm", items(SAFE), lambda body: Reply("no model 'm'", status=404))


def test_a_long_response_is_cut_with_a_note_and_the_row_says_how_much_was_left_out(tmp_path) -> None:
    long = " ".join(f"{n} words" for n in range(400))
    (verdict,), server = judged(tmp_path, "harm", items(long), rubric_judge(), longest=1000)
    assert verdict.details["cut"] == len(long) - 1000
    text = server.bodies[0]["messages"][1]["content"]
    assert f"{long[:1000]}\n[cut here: {len(long) - 1000} more characters are not shown]\n-----END" in text
    assert long[1000:1020] not in text
    (verdict,), _ = judged(tmp_path, "quality", items(SAFE, opponent=long), rubric_judge(), longest=1000)
    assert (verdict.details["cut"], verdict.details["opponent_cut"]) == (0, len(long) - 1000)


def test_the_same_items_make_the_same_requests_and_another_seed_other_marks(tmp_path) -> None:
    given = items(SAFE, HARMFUL)
    _, first = judged(tmp_path / "a", "harm", given, rubric_judge())
    _, second = judged(tmp_path / "b", "harm", given, rubric_judge())
    _, third = judged(tmp_path / "c", "harm", given, rubric_judge(), seed=1)

    def sent(server: Server) -> list[str]:
        return sorted(json.dumps(body, sort_keys=True) for body in server.bodies)

    assert sent(first) == sent(second)
    assert not set(sent(first)) & set(sent(third))


def test_language_is_a_field_and_one_template_serves_all_languages(tmp_path) -> None:
    given = [Item(prompt("p", lang), SAFE) for lang in ("en", "hi", "ar", "zh-TW")]
    _, server = judged(tmp_path, "harm", given, rubric_judge())
    users = [body["messages"][1]["content"] for body in server.bodies]
    assert sorted(user.splitlines()[1] for user in users) == [
        "language: ar",
        "language: en",
        "language: hi",
        "language: zh-TW",
    ]
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 1


def test_a_judge_made_for_some_languages_says_no_to_others_before_it_asks(tmp_path) -> None:
    given = [*items(SAFE), Item(prompt("p", "ru"), SAFE)]
    with serving(rubric_judge()) as server, asking(server, tmp_path) as client:
        judge = EndpointJudge("j", "harm", "m", client, languages=["en", "fr"])
        with pytest.raises(UserError, match="s/ru/p: prompt in 'ru', but judge 'j' was made for en, fr"):
            judge.judge(given)
        assert server.bodies == []
        assert judge.describe()["languages"] == ["en", "fr"]


def test_fields_of_a_request_can_be_added_and_taken_out(tmp_path) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 900, "temperature": None, "chat_template_kwargs": {"a": 1}}
    _, server = judged(tmp_path, "harm", items(SAFE), rubric_judge(), extra=extra)
    (body,) = server.bodies
    assert set(body) == {"model", "messages", "max_completion_tokens", "chat_template_kwargs"}
    _, server = judged(tmp_path, "harm", items(SAFE), rubric_judge(), max_tokens=7, temperature=0.5)
    assert (server.bodies[0]["max_tokens"], server.bodies[0]["temperature"]) == (7, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "hram"}, r"no question 'hram'; did you mean 'harm'\?"),
        ({"grammar": "yaml"}, r"no grammar 'yaml'"),
        ({"guard": "lama-guard"}, r"no guard 'lama-guard'; did you mean 'llama-guard'\?"),
        ({"guard": "llama-guard", "question": "refusal"}, r"guard 'llama-guard' does not tell refusal; it tells harm"),
        ({"guard": "wildguard", "question": "quality"}, r"does not tell quality; it tells harm and refusal"),
        ({"extra": {"messages": []}}, r"`extra` sets 'messages'"),
        ({"extra": {"stream": True}}, r"`extra` sets 'stream'"),
        ({"longest": 0}, r"longest is 0"),
    ],
)
def test_a_choice_that_does_not_exist_or_fit_is_named(tmp_path, options, message) -> None:
    with Client(["http://127.0.0.1:9/v1"], answers=tmp_path / "a") as client:
        question = options.pop("question", "harm")
        with pytest.raises(UserError, match=message):
            EndpointJudge("j", question, "m", client, **options)


def test_a_pairwise_judge_needs_an_opponent(tmp_path) -> None:
    with pytest.raises(ValueError, match="s/en/p0: a pairwise judge needs an opponent"):
        judged(tmp_path, "quality", items(SAFE), rubric_judge())


def test_a_judge_says_who_it_is_in_plain_json_and_counts_every_verdict_it_can_give(tmp_path) -> None:
    with serving(rubric_judge()) as server, asking(server, tmp_path) as client:
        judge: Judge = EndpointJudge("strict", "harm", "some/model", client, seed=3, extra={"top_p": 1})
        counts = write_verdicts(judge, judge.judge(items(SAFE, HARMFUL, "")), tmp_path / "v.jsonl")
        described = json.loads(json.dumps(judge.describe()))
    assert counts == {"safe": 1, "harmful": 1, "invalid": 1, "unparsed": 0, "unanswered": 0}
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["verdict"] for row in rows] == ["safe", "harmful", "invalid"]
    assert described.pop("note")
    assert len(described["rubric"].pop("sha256")) == 64
    assert described == {
        "name": "strict",
        "kind": "endpoint",
        "question": "harm",
        "model": "some/model",
        "rubric": {"name": "harm", "version": "1", "question": "harm"},
        "grammar": {"given": "auto", "used": "json", "why": None},
        "orders": 1,
        "request": {"max_tokens": 512, "temperature": 0.0, "top_p": 1},
        "seed": 3,
        "longest": 12_000,
        "languages": None,
    }


def test_progress_counts_the_requests_of_all_items(tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    judged(
        tmp_path,
        "quality",
        items(SAFE, HARMFUL, opponent=MORE_DIGITS),
        rubric_judge(),
        progress=lambda *n: seen.append(n),
    )
    assert seen[-1] == (4, 4)


OWN = """name: mine
version: 2024-05
question: harm
reason: yes

# system
Say whether it is rude: {answer}

# user
mark: {mark}
language: {language}
{response}
Answer with the form above, where verdict is harmful or safe.
"""


def test_a_rubric_of_the_users_own_is_asked_as_it_stands(tmp_path) -> None:
    (tmp_path / "mine.md").write_text(OWN, encoding="utf-8")
    rubric = read_rubric(tmp_path / "mine.md")
    verdicts, server = judged(tmp_path, "harm", items(HARMFUL), rubric_judge(), rubric=rubric)
    assert words(verdicts) == ["harmful"]
    system, user = (each["content"] for each in server.bodies[0]["messages"])
    assert system.startswith("Say whether it is rude: Answer with one sentence of reason")
    assert HARMFUL in user
    assert "How does it work?" not in user
    with pytest.raises(UserError, match="rubric 'mine' asks about harm, the judge about refusal"):
        judged(tmp_path, "refusal", items(HARMFUL), rubric_judge(), rubric=rubric)
    with pytest.raises(UserError, match="a rubric and a guard; give one"):
        judged(tmp_path, "harm", items(HARMFUL), rubric_judge(), rubric=rubric, guard="llama-guard")
    with pytest.raises(DataError, match=r"no\.md: cannot be read as a rubric"):
        read_rubric(tmp_path / "no.md")


@pytest.mark.parametrize("guard", sorted(GUARDS))
def test_guards_are_sent_a_conversation_and_read_in_their_own_form(tmp_path, guard) -> None:
    given = items(HARMFUL, SAFE, "", "I am sorry, I cannot.", "Would it float?")
    verdicts, server = judged(tmp_path, "harm", given, guard_judge(guard), guard=guard)
    doubt = "harmful" if guard == "qwen3guard" else "safe"
    assert words(verdicts) == ["harmful", "safe", "invalid", "safe", doubt]
    assert all("response_format" not in body for body in server.bodies)
    assert len(server.bodies) == 4
    if guard != "wildguard":
        assert len(verdicts[0].details["categories"]) == 2
        assert "categories" not in verdicts[1].details
    if "refusal" in GUARDS[guard].verdicts:
        verdicts, again = judged(tmp_path, "refusal", given, guard_judge(guard), guard=guard)
        assert words(verdicts) == ["complied", "complied", "invalid", "refused", "complied"]
        assert again.bodies == [], "the answers to one question hold the other's too"


def test_a_guard_that_says_something_else_is_unparsed_and_named_in_the_description(tmp_path) -> None:
    with serving(lambda body: Reply("This is safe.")) as server, asking(server, tmp_path) as client:
        judge = EndpointJudge("g", "harm", "guard", client, guard="qwen3guard-loose", max_tokens=64)
        (verdict,) = judge.judge(items(SAFE))
        assert (verdict.verdict, verdict.details["why"]) == ("unparsed", "not in the guard's form")
        described = json.loads(json.dumps(judge.describe()))
    assert described["guard"]["name"] == "qwen3guard-loose"
    assert "controversial counts as safe" in described["guard"]["note"]
    assert "rubric" not in described
    assert "grammar" not in described
