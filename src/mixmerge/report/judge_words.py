"""What the report says of a judge: what it is asked, how it judges, and what it cannot see.

The local judges have words of their own. A judge that the recipe names gets its words from its question and from what it
says of itself (`describe`), so that they hold for any model; what nobody has heard of gets none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge.report.words import count

HARMFUL = (
    "“Harmful” means “complied with a harmful request”: the judge tells refusals from answers, it cannot judge danger."
)


@dataclass(frozen=True, slots=True)
class JudgeWords:
    """A judge as a reader meets it: what it is called, what it measures, and what it cannot see."""

    title: str
    measures: str
    blind: tuple[str, ...]


JUDGES: Mapping[str, JudgeWords] = {
    "refusal": JudgeWords(
        "Refused or complied?",
        "A classifier reads the opening of each answer to a harmful or look-alike request and says whether it refuses.",
        (
            "The prompt: whatever is no refusal counts as complied. A base that only repeats the question counts as complied, and "
            "so does harmless nonsense. The last column below counts answers that open with the prompt.",
            "What follows the opening: an answer that turns into a refusal later counts as complied.",
            "The candidates' own style: it was measured on rows written for that purpose, and may do worse on their answers. "
            "Read some below.",
        ),
    ),
    "quality": JudgeWords(
        "Nearer to the reference answer?",
        "The candidate's answer and the base's are compared with the reference answer (of several, with the nearest) by chrF++, "
        "the overlap of characters and words; a small difference is a tie. No model judges.",
        (
            "That a different answer is also good, or that a similar one is wrong.",
            "Much in a single row: it is meant for shares over many prompts.",
        ),
    ),
    "check": JudgeWords(
        "Right by the prompt's own check?",
        "The answer is compared with the one right answer (exactly, as a number, as a letter, in SQuAD's words), or its "
        "instructions are verified one by one. No model judges.",
        (
            "An answer that is right in another form than the check reads: it counts as wrong, or as unparsed.",
            "How well a right answer is written.",
        ),
    ),
    "language": JudgeWords(
        "In the language of the prompt?",
        "fastText's language identification reads the prose of an answer.",
        (
            "Answers that are short, or mostly digits or code: they are unknown, counted, and left out of the share.",
            "How well the language is written.",
        ),
    ),
}
# Of each question a recipe's judge can be asked: its title, and what is said of an answer.
QUESTIONS: Mapping[str, tuple[str, str]] = {
    "harm": ("Is the answer harmful?", "harmful or safe"),
    "refusal": ("Refused or complied?", "refused or complied"),
    "quality": ("Which answer is better?", "better, worse or as good"),
}
PAIR_CHECK = JudgeWords(
    "Right where the base is wrong?",
    "The candidate's answer and the base's are put to the prompt's own check; both right, or both wrong, is a tie. No model "
    "judges.",
    JUDGES["check"].blind,
)


def judge_words(name: str, question: str | None, told: Mapping[str, Any], *, decides_harm: bool) -> JudgeWords | None:
    """The words for a judge; `told` is its description. None for one that is neither local nor of a kind that is known."""
    kind = told.get("kind")
    if name == "quality" and "compares" in told:
        return PAIR_CHECK
    if name in JUDGES:
        known = JUDGES[name]
        return JudgeWords(known.title, known.measures, (HARMFUL, *known.blind)) if decides_harm else known
    if question is None or question not in QUESTIONS or kind not in ("endpoint", "guard", "classifier"):
        return None
    title, says = QUESTIONS[question]
    measures, blind = _served(question, says, told) if kind == "endpoint" else _local(says, told)
    if question == "harm":
        blind.append(
            "More than its training taught it: what it calls harm is its makers' line, and may shift by language."
        )
    if question == "refusal" and decides_harm:
        blind.insert(0, HARMFUL)
    return JudgeWords(title, measures, tuple(blind))


def _served(question: str, says: str, told: Mapping[str, Any]) -> tuple[str, list[str]]:
    guarded, longest = told.get("guard"), told.get("longest")
    blind = []
    if question == "quality":
        measures = (
            f"A model behind a server ({told.get('model')}) compares the candidate's answer with the base's by a rubric, once "
            "in each order; where the orders disagree, it is a tie."
        )
        blind.append("Its own taste: models tend to favour long answers, and answers in their own style.")
    elif guarded:
        measures = (
            f"A guard behind a server ({told.get('model')}) reads the request and the answer, in the form that it was trained "
            f"on, and says: {says}."
        )
    else:
        measures = (
            f"A model behind a server ({told.get('model')}) reads the request and the answer by a rubric: {says}."
        )
    if isinstance(longest, int):
        blind.append(f"What it was not shown: of each text, the first {count(longest)} characters.")
    guarding = "defused" if guarded else "fenced and defused"
    blind.append(f"An answer's intent: texts are {guarding}, yet one that argues with the judge may still sway it.")
    return measures, blind


def _local(says: str, told: Mapping[str, Any]) -> tuple[str, list[str]]:
    form = str(told.get("reads"))
    alone = form == "response" or ("{response}" in form and "{prompt}" not in form)
    reads = "the answer alone" if alone else "the request and the answer"
    model, most = str(told.get("model")), told.get("max_tokens")
    if told["kind"] == "guard":
        measures = f"A guard model ({model}) reads {reads} and would say a word; the likelier word counts: {says}."
    elif model.startswith("logistic regression"):
        measures = f"A classifier over character n-grams, fitted on labelled rows, reads {reads}: {says}."
    else:
        what = "scikit-learn pipeline" if told.get("model_type") == "scikit-learn pipeline" else "classifier"
        measures = f"A {what} ({model}) reads {reads}: {says}."
    blind = []
    if alone:
        blind.append("The request: the same answer gets the same verdict whatever was asked.")
    if model.startswith("logistic regression"):
        blind.append("Meaning: it goes by wording, as its rows had it.")
    if isinstance(most, int):
        blind.append(f"More than {count(most)} tokens: a longer text is cut, and its row says so.")
    return measures, blind
