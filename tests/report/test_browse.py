"""What the browser gets: every prompt and answer in its place, in JSON that no text can break out of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.errors import DataError
from mixmerge.evaluate.prompts import Prompt
from mixmerge.report.browse import browser_data, embedded

if TYPE_CHECKING:
    from conftest import Study


def names(study: Study) -> list[str]:
    return [entry["name"] for entry in study.spec["candidates"]]


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_comes_back_and_nothing_in_it_can_end_the_element(text: str) -> None:
    found = embedded({"text": text})
    assert not set("<>&\u2028\u2029") & set(found)
    found.encode("utf-8")  # a file can hold it
    read = json.loads(found)["text"]
    assert read == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize(
    "text", ["</script>", "<!--<script>", "]]>", "\u2028", "&lt;", "\x00\x1b[31m", "\u202egnp.exe"]
)
def test_hostile_texts_come_back_as_they_were(text: str) -> None:
    assert json.loads(embedded(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert json.loads(embedded("a\ud800b")) == "a\ufffdb"


def test_not_a_number_is_refused_because_no_browser_reads_it() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        embedded(float("nan"))


def test_every_answer_stands_at_its_prompts_place(study: Study) -> None:
    data = browser_data(study.scores["candidates"], study.prompts, reversed(study.responses))
    assert [name for name, _ in data["candidates"]] == names(study)
    texts = {(r["candidate"], r["prompt_id"]): r for r in study.responses}
    for (name, _), answers in zip(data["candidates"], data["answers"], strict=True):
        assert len(answers) == len(study.prompts)
        for entry, (text, finish, tokens, verdicts) in zip(study.prompts, answers, strict=True):
            row = texts[name, entry["prompt"].id]
            assert (text, finish, tokens, verdicts) == (row["text"], row["finish"], row["tokens"], row["verdicts"])


def test_every_right_answer_to_a_prompt_is_shown() -> None:
    asked = Prompt("s/en/p", "p", "s", "en", "benchmark", "test", "Where?", "New York City", also=("NYC", "New York"))
    found = browser_data([{"name": "base", "kind": "base"}], [{"set": "s", "prompt": asked}], [])
    assert found["prompts"][0][-1] == "New York City / NYC / New York"


def test_references_travel_with_general_prompts_alone(study: Study) -> None:
    data = browser_data(study.scores["candidates"], study.prompts, study.responses)
    assert {name for name, *_, reference in data["prompts"] if reference is not None} == {"general"}
    assert {name for name, *_, reference in data["prompts"] if reference is None} == {"harmful", "harmless"}


def test_a_missing_answer_is_none_and_verdicts_may_be_missing(study: Study) -> None:
    rows = [{k: v for k, v in row.items() if k != "verdicts"} for row in study.responses if row["candidate"] == "ties"]
    data = browser_data(study.scores["candidates"], study.prompts, rows)
    answers = dict(zip([name for name, _ in data["candidates"]], data["answers"], strict=True))
    assert set(answers["base"]) == {None}
    assert all(verdicts == {} for _, _, _, verdicts in answers["ties"])


@pytest.mark.parametrize("change", [{"prompt_id": "general/en/none"}, {"candidate": "nobody"}])
def test_an_answer_to_nothing_is_refused(study: Study, change: dict[str, str]) -> None:
    with pytest.raises(DataError, match="not in the study"):
        browser_data(study.scores["candidates"], study.prompts, [study.responses[0] | change])
