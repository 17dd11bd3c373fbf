"""Chat templates: what the environment gives them, and which of several is meant."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from mixmerge.templates import default_template, template_environment

MESSAGES = [{"role": "user", "content": "नमस्ते"}, {"role": "assistant", "content": "hi"}]


def render(template: str) -> str:
    return template_environment().from_string(template).render(messages=MESSAGES)


def test_the_tag_of_transformers_changes_no_text():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %},{% break %}{% endfor %}"
    assert render(template) == "नमस्ते,"


def test_json_keeps_its_letters_as_transformers_writes_them():
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "नमस्ते"}'


def test_a_template_that_refuses_raises_its_own_words():
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(SecurityError):
        render("{{ messages.__class__.__mro__ }}")
    with pytest.raises(SecurityError):
        render("{{ messages.append(1) }}")


@pytest.mark.parametrize(
    ("held", "meant"),
    [
        ("text", "text"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}, "odd"], None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_of_several_templates_the_default_is_meant(held, meant):
    assert default_template(held) == meant
