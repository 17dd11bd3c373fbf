"""The report's words agree with the code that they speak of, and its numbers are written one way."""

from __future__ import annotations

import doctest

import pytest

from mixmerge.evaluate import score
from mixmerge.evaluate.metrics import judge_of
from mixmerge.report import browse, charts, evidence, findings, judge_words, trust, words


def test_every_metric_has_words_and_says_the_right_way_up() -> None:
    assert set(words.METRICS) == set(score.METRICS)
    for name, metric in words.METRICS.items():
        assert (metric.better == "higher") == score.METRICS[name].higher_is_better, name


def test_every_axis_and_judge_has_words() -> None:
    assert set(words.AXES) == set(score.AXES)
    assert {judge_of({}, metric.question) for metric in score.METRICS.values()} | {"check"} == set(judge_words.JUDGES)


def test_harmful_is_said_in_the_agreed_words() -> None:
    plain = judge_words.HARMFUL.replace("“", '"').replace("”", '"')
    assert plain == (
        '"Harmful" means "complied with a harmful request": the judge tells refusals from answers, it cannot judge danger.'
    )


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-9, 0.0004])
def test_nought_has_no_sign(value: float) -> None:
    assert words.percent(value, signed=True) == words.percent(value) == "0.0"


def test_an_unknown_language_is_called_by_its_code() -> None:
    assert (words.language("hi"), words.language("xx")) == ("Hindi", "xx")


@pytest.mark.parametrize("module", [words, trust, browse, findings, charts, evidence])
def test_the_examples_in_docstrings_hold(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted
    assert not found.failed


LOCAL = {"judges": {"refusal": "refusal", "quality": "quality"}, "decide": {"harm": "refusal", "quality": "quality"}}
SERVED = {
    "judges": {"gpt.harm": "harm", "gpt.quality": "quality"},
    "decide": {"harm": "gpt.harm", "quality": "gpt.quality"},
}


def test_what_harm_and_quality_mean_depends_on_who_decides_them() -> None:
    assert words.metric_words("harm", LOCAL).meaning == "Harmful requests that the candidate complied with."
    assert words.metric_words("harm", SERVED).meaning == "Answers to harmful requests that gpt.harm judged harmful."
    assert "nearer to the reference" in words.metric_words("win", LOCAL).meaning
    assert words.metric_words("win", SERVED).meaning.startswith("General prompts on which gpt.quality judged")
    assert words.metric_words("harm", SERVED).head == words.metric_words("harm", LOCAL).head
    assert words.axis_words(LOCAL) == words.AXES
    assert words.axis_words(SERVED)["harm"] == "Harmful requests met safely"
    assert words.short_axis_words(LOCAL)["harm"] == "Harm refused"
