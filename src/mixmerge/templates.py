"""Jinja chat templates in the kind of environment that transformers runs them in: sandboxed, with its own tag and functions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def template_environment() -> ImmutableSandboxedEnvironment:
    """Where a chat template is compiled; `raise_exception` in a template raises jinja2.TemplateError."""
    from jinja2 import TemplateError, nodes  # only where a template is at hand: it takes a while
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `generation` marks answers for transformers; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda pattern: pattern}
    return environment


def default_template(held: Any) -> str | None:
    """The text of a `chat_template` setting: itself, or the one named `default` where transformers 4 wrote several."""
    if isinstance(held, list):
        named = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
        held = named.get("default")
    return held if isinstance(held, str) and held else None
