"""A model behind an OpenAI-compatible chat endpoint as a judge of quality, harm or refusal: any model, or a guard.

It asks by a rubric (`rubrics`) in a strict grammar (`verdicts`), or in a guard's own form (`guards`), with every text that
others wrote defused and fenced (`fence`). Pairs are asked in both orders. What needs no question is not asked: broken
text, equal responses. An answer without a verdict is `unparsed`, no answer `unanswered`; both are counted, neither guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from mixmerge.errors import StepError, UserError, did_you_mean
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.fence import Shown, shown
from mixmerge.evaluate.guards import GUARDS
from mixmerge.evaluate.judge import NO_VERDICT, Item, Verdict
from mixmerge.evaluate.limits import BudgetError
from mixmerge.evaluate.rubrics import Question, Rubric, ask_by_rubric, shipped_rubric
from mixmerge.evaluate.verdicts import FINISHED, STORED, WORDS, Grammar, read_verdict, verdict_schema

if TYPE_CHECKING:
    from mixmerge.evaluate.client import Answer, Client

LONGEST = 12_000  # characters of a text that a judge is shown
OURS = ("model", "messages", "response_format", "stream", "n")  # parts of a request that `extra` cannot change
# A request to find out whether a server keeps to a schema; the same bytes whatever is judged, so paid for once.
PROBE = ("What is the capital of France?", "The capital of France is Paris.", "Paris lies on the Seine.")

_SEEN = {"A": ("win", "loss"), "B": ("loss", "win"), "tie": ("tie", "tie")}  # by the candidate, as A and as B
_NOTE = "a model's opinion; measure it against labelled rows before relying on it"


class EndpointJudge:
    """Verdicts of a served model: quality (win, loss, tie, from the candidate's side), harm or refusal.

    Quality: both orders are asked; where they disagree the verdict is a tie, `flipped` is true, and `first` and `second`
    say what each order gave. Equal responses tie; a broken one loses to a sound one, two broken ones tie. Harm and
    refusal: a broken response is `invalid`. None of these is asked: `asked` counts the requests behind a verdict.
    Rows also say how many characters at the end were not shown (`cut`, `opponent_cut`), at how many places a text was
    `escaped`, a guard's own `label` and `categories`, and `why` there is no verdict. `value` is None.

    rubric: by default ours for the question. guard: a key of `GUARDS`, instead of a rubric.
    grammar: json asks for a schema, tags for a line of text, auto finds out which with two requests of its own.
    extra: further fields of every request; None takes one out (`{"max_tokens": None, "max_completion_tokens": 900}`).
    longest: characters of each text that the judge is shown. languages: what it was made for; None is any.

    Raises:
        UserError: a question, guard, grammar or field that does not exist or does not fit.
    """

    def __init__(
        self,
        name: str,
        question: Question,
        model: str,
        client: Client,
        *,
        rubric: Rubric | None = None,
        guard: str | None = None,
        languages: Sequence[str] | None = None,
        seed: int = 0,
        max_tokens: int = 512,
        temperature: float | None = 0.0,
        extra: Mapping[str, Any] | None = None,
        grammar: Literal["auto", "json", "tags"] = "auto",
        longest: int = LONGEST,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_choices(name, question, rubric, guard, grammar, extra or {}, longest)
        self.name, self.question, self.verdicts = name, question, STORED[question]
        self._model, self._client, self._progress = model, client, progress
        self._guard = None if guard is None else GUARDS[guard]
        self._rubric = rubric or shipped_rubric(question)
        self._fields = {"max_tokens": max_tokens, "temperature": temperature, **(extra or {})}
        self._languages = None if languages is None else tuple(languages)
        self._seed, self._longest = seed, longest
        self._given_grammar, self._guard_name = grammar, guard
        self._grammar: Grammar | None = None if grammar == "auto" else grammar
        self._grammar_why: str | None = None

    def describe(self) -> dict[str, Any]:
        """Who judges, what it is asked, and how; `grammar.used` is None until `auto` has asked."""
        said: dict[str, Any] = {"name": self.name, "kind": "endpoint", "question": self.question, "model": self._model}
        if self._guard is not None:
            said["guard"] = {"name": self._guard_name} | self._guard.describe()
        else:
            said["rubric"] = self._rubric.describe()
            said["grammar"] = {"given": self._given_grammar, "used": self._grammar, "why": self._grammar_why}
        return said | {
            "orders": 2 if self.question == "quality" else 1,
            "request": {key: value for key, value in self._fields.items() if value is not None},
            "seed": self._seed,
            "longest": self._longest,
            "languages": None if self._languages is None else list(self._languages),
            "note": _NOTE,
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            UserError: a prompt in a language that this judge was not made for.
            StepError: the server answers nothing of use to a plain question.
            ValueError: quality of an item without an opponent.
            What the client raises: a server out of reach, a budget that is spent.
        """
        for item in items:
            self._check(item)
        found = [self._known(item) for item in items]
        unknown = [item for item, verdict in zip(items, found, strict=True) if verdict is None]
        if unknown and self._guard is None:
            try:
                self._settle_grammar()
            except BudgetError as error:  # what comes after the two questions about its grammar is missing too
                raise error.with_more(self._count(unknown)) from None
        requests = [self._requests(item) for item in unknown]
        bodies = [request.body for of_item in requests for request in of_item]
        answers = iter(self._client.ask(bodies, self._progress) if bodies else ())
        said = [[self._read(request, next(answers)) for request in of_item] for of_item in requests]
        judged = iter(map(self._verdict, unknown, requests, said))
        return [next(judged) if verdict is None else verdict for verdict in found]

    def _check(self, item: Item) -> None:
        if self._languages is not None and item.prompt.lang not in self._languages:
            raise UserError(
                f"prompt in {item.prompt.lang!r}, but judge {self.name!r} was made for {', '.join(self._languages)}",
                where=item.prompt.id,
            )
        if self.question == "quality" and item.opponent is None:
            raise ValueError(f"{item.prompt.id}: a pairwise judge needs an opponent's response")

    def _known(self, item: Item) -> Verdict | None:
        """The verdict that needs no question."""
        mine = is_degenerate(item.response)
        if self.question != "quality":
            return Verdict(item.prompt, self.name, "invalid", None, {"asked": 0, "why": "broken"}) if mine else None
        theirs = is_degenerate(item.opponent or "")
        if item.response == item.opponent:
            verdict, why = "tie", "identical"
        elif mine or theirs:
            verdict, why = "tie" if mine and theirs else "loss" if mine else "win", "broken"
        else:
            return None
        return Verdict(item.prompt, self.name, verdict, None, {"asked": 0, "why": why})

    def _requests(self, item: Item) -> list[_Request]:
        """One request; for a pair two, the candidate's response first in the first of them."""
        texts = [item.response] if self.question != "quality" else [item.response, item.opponent or ""]
        request, *judged = (shown(text, self._longest) for text in (item.prompt.text, *texts))
        orders = [judged] if len(judged) == 1 else [judged, judged[::-1]]
        grammar = self._grammar or "tags"  # a guard has none, and pays it no heed
        return [self._request(item.prompt.id, item.prompt.lang, request, order, grammar) for order in orders]

    def _count(self, items: Sequence[Item]) -> int:
        """How many requests the items come to; equal ones are asked once."""
        return len({repr(request.body) for item in items for request in self._requests(item)})

    def _request(self, key: str, language: str, request: Shown, judged: Sequence[Shown], grammar: Grammar) -> _Request:
        body = {"model": self._model} | {name: value for name, value in self._fields.items() if value is not None}
        texts = (request, *judged)
        if self._guard is not None:
            return _Request(body | {"messages": self._guard.messages(request.text, judged[0].text)}, "", grammar, texts)
        asked = ask_by_rubric(
            self._rubric, grammar, seed=self._seed, key=key, language=language, request=request, judged=judged
        )
        if grammar == "json":
            body["response_format"] = verdict_schema(WORDS[self.question], reason=self._rubric.reason)
        return _Request(body | {"messages": asked.messages}, asked.mark, grammar, texts)

    def _settle_grammar(self) -> None:
        """Let `auto` take json where the server answers a plain question by the schema, and tags where it does not.

        Both are asked at once: a client keeps a refusal of the schema once the server has answered something.
        """
        if self._grammar is not None:
            return
        request, *others = (shown(text, self._longest) for text in PROBE)
        judged = others[: 2 if self.question == "quality" else 1]
        probes = {grammar: self._request("probe", "en", request, judged, grammar) for grammar in get_args(Grammar)}
        answers = dict(zip(probes, self._client.ask([probe.body for probe in probes.values()]), strict=True))
        if all(answer.error is not None for answer in answers.values()):
            raise StepError(
                f"no usable answer to a plain question: {answers['tags'].error}",
                where=f"judge '{self.name}' ({self._model})",
                do="check the model's name and the fields in `extra`",
            )
        said = self._read(probes["json"], answers["json"])
        self._grammar = "tags" if said.verdict in NO_VERDICT else "json"
        self._grammar_why = f"json: {said.verdict}, {said.why}" if said.verdict in NO_VERDICT else None

    def _read(self, request: _Request, answer: Answer) -> _Said:
        if answer.error is not None or answer.finish == "content_filter":
            return _Said("unanswered", answer.error or "content filter")
        if answer.finish not in FINISHED:
            return _Said(
                "unparsed", "cut off at max_tokens" if answer.finish == "length" else f"ended: {answer.finish}"
            )
        if self._guard is not None:
            reading, details = self._guard.read(answer.text, self.question)
            return _Said(reading.word or "unparsed", reading.why, details)
        words = WORDS[self.question]
        reading = read_verdict(answer.text, request.grammar, words, request.mark, reason=self._rubric.reason)
        return _Said(reading.word or "unparsed", reading.why)

    def _verdict(self, item: Item, requests: list[_Request], said: list[_Said]) -> Verdict:
        texts = requests[0].texts
        details: dict[str, Any] = {"asked": len(said), "cut": texts[1].cut}
        if self.question == "quality":
            details["opponent_cut"] = texts[2].cut
        details["escaped"] = sum(text.escaped for text in texts)
        details |= said[0].details
        seen = [each.verdict for each in said]
        if self.question == "quality":
            seen = [_SEEN[word][side] if word in _SEEN else word for side, word in enumerate(seen)]
            flipped = seen[0] != seen[1] and not set(seen) & set(NO_VERDICT)
            details |= {"first": seen[0], "second": seen[1], "flipped": flipped}
            seen = ["tie"] if flipped else seen
        verdict = next((none for none in NO_VERDICT if none in seen), seen[0])
        if verdict in NO_VERDICT:
            details["why"] = next(each.why for each in said if each.verdict == verdict)
        return Verdict(item.prompt, self.name, verdict, None, details)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request, how its answer is read (a guard's by neither mark nor grammar), and its texts, the prompt's first."""

    body: dict[str, Any]
    mark: str
    grammar: Grammar
    texts: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class _Said:
    """The word that one answer gives, or one of NO_VERDICT and why."""

    verdict: str
    why: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def _check_choices(
    name: str,
    question: str,
    rubric: Rubric | None,
    guard: str | None,
    grammar: str,
    extra: Mapping[str, Any],
    longest: int,
) -> None:
    where = f"judge '{name}'"
    for value, known, what in ((question, STORED, "question"), (grammar, ("auto", "json", "tags"), "grammar")):
        if value not in known:
            raise UserError(f"no {what} {value!r}", where=where, do=did_you_mean(value, known))
    if rubric is not None and rubric.question != question:
        raise UserError(f"rubric {rubric.name!r} asks about {rubric.question}, the judge about {question}", where=where)
    if guard is not None:
        if rubric is not None:
            raise UserError("a rubric and a guard", where=where, do="give one: a guard has a form of its own")
        if guard not in GUARDS:
            raise UserError(f"no guard {guard!r}", where=where, do=did_you_mean(guard, GUARDS))
        if question not in GUARDS[guard].verdicts:
            answers = " and ".join(GUARDS[guard].verdicts)
            raise UserError(f"guard {guard!r} does not tell {question}", where=where, do=f"it tells {answers}")
    if taken := [key for key in extra if key in OURS]:
        raise UserError(f"`extra` sets {taken[0]!r}", where=where, do="it is ours; the model has a field of its own")
    if longest < 1:
        raise UserError(f"longest is {longest}, and a judge must be shown something", where=where)
