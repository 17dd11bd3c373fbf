"""What the report says in sentences: the best set, the front, and candidates that are one model under several names."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.findings import alike, best_set_words, front_words
from mixmerge.report.page import render

if TYPE_CHECKING:
    from conftest import Study


def twins(study: Study, name: str, other: str) -> list[dict[str, Any]]:
    """The study's responses, with those of `other` given by `name` too."""
    texts = {row["prompt_id"]: row["text"] for row in study.responses if row["candidate"] == other}
    return [row | {"text": texts[row["prompt_id"]]} if row["candidate"] == name else row for row in study.responses]


def test_candidates_with_the_same_answers_are_named_as_one_model_with_the_cause(study: Study) -> None:
    (found,) = alike(study.scores, twins(study, "slerp", "linear"), {"slerp": {"parallel_share": 1.0}})
    assert found.names == ["linear", "slerp"]
    assert (
        f"linear and slerp gave the same answers, letter for letter, to all {len(study.prompts)} prompts"
        in found.sentence
    )
    assert "every tensor of the models in slerp is nearly parallel" in found.sentence


def test_one_other_letter_makes_another_model(study: Study) -> None:
    responses = twins(study, "slerp", "linear")
    last = max(i for i, row in enumerate(responses) if row["candidate"] == "slerp")
    responses[last] = responses[last] | {"text": responses[last]["text"] + "."}
    assert alike(study.scores, responses, {}) == []
    assert alike(study.scores, study.responses, {}) == []


def test_three_alike_are_one_group_and_a_cause_is_named_only_where_it_was_measured(study: Study) -> None:
    responses = twins(study, "slerp", "linear")
    texts = {row["prompt_id"]: row["text"] for row in responses if row["candidate"] == "linear"}
    responses = [row | {"text": texts[row["prompt_id"]]} if row["candidate"] == "ties" else row for row in responses]
    (found,) = alike(study.scores, responses, {"ties": {"kept_share": 0.5}})
    assert found.names == ["linear", "slerp", "ties"]
    assert "The cause" not in found.sentence


def test_the_page_names_twins_at_the_answer_in_their_rows_and_shows_every_parallel_share(study: Study) -> None:
    arguments = study.report_arguments() | {"responses": twins(study, "slerp", "linear")}
    page = render(**arguments)
    assert page.index("linear and slerp gave the same answers") < page.index('id="results"')
    assert "same as linear</span>" in page
    assert "same as slerp</span>" in page
    assert "25 % of tensors nearly parallel, merged linearly" in page
    assert "same as" not in render(**study.report_arguments())


def test_the_best_set_says_who_is_out_who_is_hardly_in_and_that_intervals_are_not_the_test(study: Study) -> None:
    said = " ".join(best_set_words(study.scores))
    assert "With 95 % probability the truly best of the 9 is one of these" in said
    assert "whether two of them overlap is not this test" in said
    assert "with 8 prompts a set" in said
    for name, found in study.scores["balance"].items():
        if name not in study.scores["best_set"]:
            assert f"{name}, by {100 * found['behind']:.1f} points where bad luck makes up to" in said
    assert ("Out: " in said) == (len(study.scores["best_set"]) < 9)


def test_a_candidate_off_the_front_with_a_larger_share_than_one_on_it_is_explained(study: Study) -> None:
    scores = copy.deepcopy(study.scores)
    scores["pareto"] |= {
        "front": ["mix-15", "ties"],
        "share": {"mix-15": 0.84, "ties": 0.49, "dare-ties": 0.61, "base": 0.1},
        "beaten_by": {"dare-ties": ["mix-15"], "base": ["mix-15", "ties"]},
    }
    said = front_words(scores)
    assert said[1:] == [
        "Just off it: dare-ties. As measured, mix-15 did at least as well on every axis, but so narrowly that 61 % of the draws "
        "put dare-ties on the front, more than ties."
    ]


@pytest.mark.parametrize("order", ["answer", "results"])
def test_no_share_stands_as_a_label_without_its_explanation(study: Study, order: str) -> None:
    page = render(**study.report_arguments())
    start = page.index(f'<section id="{order}"')
    section = page[start : page.index("</section>", start)]
    assert ("of draws" in section or "draws of the prompts" in section) == (order == "answer")
