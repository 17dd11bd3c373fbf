"""What all pages are made with: a policy that lets nothing foreign in, templates that escape."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.report.document import environment, policy


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def directives(text: str) -> dict[str, str]:
    return dict(part.strip().split(" ", 1) for part in text.split(";"))


def test_a_policy_names_our_style_and_script_by_hash() -> None:
    found = directives(policy("a { color: red }", "let x = 1"))
    assert found["default-src"] == "'none'"
    assert found["style-src"] == digest("a { color: red }")
    assert found["script-src"] == digest("let x = 1")


def test_a_page_without_a_script_allows_none() -> None:
    found = directives(policy("a { color: red }"))
    assert found["script-src"] == "'none'"
    assert found["require-trusted-types-for"] == "'script'"


@given(st.text())
def test_templates_escape_whatever_they_are_given(text: str) -> None:
    shown = environment().from_string("<p>{{ text }}</p>").render(text=text)
    assert not re.search(r"[<>\"']", shown.removeprefix("<p>").removesuffix("</p>"))


def test_a_variable_that_is_missing_is_an_error_and_not_an_empty_place() -> None:
    with pytest.raises(Exception, match="'absent' is undefined"):
        environment().from_string("{{ absent }}").render()
