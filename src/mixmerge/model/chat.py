"""Chat templates: how messages become text, and which token ends the model's turn.

The one idea: a template is only as good as the tokens it leans on. It is rendered once on a short exchange;
every control token in the result must be a token of the tokenizer, and the one after the answer becomes a token
that stops generation. A template that would train or generate without end is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.errors import UserError, did_you_mean
from mixmerge.model.folder import read_json, write_json, write_text
from mixmerge.templates import default_template, template_environment

# Gemma has no system role: Google's own template puts the text before the first user turn, and so does this one.
_GEMMA = """\
{{ bos_token }}
{%- set opening = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (opening if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHAT_TEMPLATES: dict[str, str] = {"gemma": _GEMMA, "chatml": _CHATML, "llama3": _LLAMA3}
CHOICES = f"{', '.join(sorted(CHAT_TEMPLATES))}, or a Jinja file"

_TEMPLATE_FILE = "chat_template.jinja"
Message = Mapping[str, object]

_CONTROL = re.compile(r"</?[A-Za-z_][A-Za-z0-9_]*>|<\|[^<>|\s]+\|>")
_QUESTION, _ANSWER = "a question of some words", "an answer of some words"


def own_chat_template(model: Path) -> tuple[str, Path] | None:
    """The chat template that transformers would use and the file that it stands in; None where there is none.

    Raises:
        ModelError: a file that is not JSON.
    """
    file = model / _TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace"), file
    for file in (model / "chat_template.json", model / "tokenizer_config.json"):
        found = default_template(read_json(file).get("chat_template")) if file.is_file() else None
        if found is not None:
            return found, file
    return None


def check_chat_template(model: Path, jinja: str, template: str) -> str:
    """The end-of-turn token of a template that fits the model folder; `template` is what the user calls it.

    Raises:
        UserError: it does not render, needs tokens that the tokenizer lacks, or ends its turns with no token that could
            stop generation.
        ModelError: no `tokenizer.json` or `tokenizer_config.json`.
    """
    text = _render(jinja, read_json(model / "tokenizer_config.json"), template)
    return _end_of_turn(text, _added_tokens(model), template, str(model))


def set_chat_template(model: Path, template: str) -> str:
    """Give the model folder a chat template, in place, and make its end-of-turn token stop generation.

    `template` is a name of `CHAT_TEMPLATES` or the path of a Jinja file. Gives the end-of-turn token; raises as
    `check_chat_template`, and a UserError where there is no such template.
    """
    return put_chat_template(model, template_text(template), template)


def put_chat_template(model: Path, jinja: str, template: str) -> str:
    """As `set_chat_template`, of the template's text; `template` is what the user calls it."""
    end = check_chat_template(model, jinja, template)
    settings = read_json(model / "tokenizer_config.json")
    generation = _stopping_at(_added_tokens(model)[end], model)
    # Everything is checked; only now is the folder touched.
    write_text(model / _TEMPLATE_FILE, jinja)
    if "chat_template" in settings:
        write_json(model / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "chat_template"})
    (model / "chat_template.json").unlink(missing_ok=True)
    write_json(model / "generation_config.json", generation)
    return end


def template_text(template: str) -> str:
    """The Jinja text of a named template or of a file; raises UserError where there is neither."""
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template]
    path = Path(template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix or len(path.parts) > 1:
        raise UserError("no such chat template file", where=template)
    raise UserError(f"no chat template {template!r}", do=did_you_mean(template, CHAT_TEMPLATES))


def compile_template(jinja: str, settings: Mapping[str, Any], template: str) -> Callable[[Sequence[Message]], str]:
    """A function from messages to text, in transformers' own kind of environment; `settings` has the special tokens.

    Raises:
        UserError: the template is not Jinja; the function raises it where messages cannot be rendered.
    """
    from jinja2 import TemplateError

    def failed(error: Exception) -> UserError:
        line = getattr(error, "lineno", None)
        where = template if line is None else f"{template}:{line}"
        return UserError(f"the chat template does not render: {error}", where=where)

    tokens = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    try:
        compiled = template_environment().from_string(jinja)
    except TemplateError as error:
        raise failed(error) from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return compiled.render(messages=list(messages), add_generation_prompt=False, **tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise failed(error) from error

    return render


def _render(jinja: str, settings: Mapping[str, Any], template: str) -> str:
    """The template's text for one question and its answer."""
    exchange = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = compile_template(jinja, settings, template)(exchange)
    if _QUESTION not in text or _ANSWER not in text:
        raise UserError("the chat template leaves out the question or the answer", where=template)
    return text


def _added_tokens(model: Path) -> dict[str, int]:
    return {token["content"]: token["id"] for token in read_json(model / "tokenizer.json").get("added_tokens") or ()}


def _end_of_turn(text: str, added: dict[str, int], template: str, model: str) -> str:
    lacking = sorted(set(_CONTROL.findall(text)) - added.keys())
    if lacking:
        what = f"chat template {template!r} needs tokens that the tokenizer lacks: {', '.join(lacking)}"
        raise UserError(what, where=model, do="choose the template that belongs to this model family")
    after = text.rpartition(_ANSWER)[2].lstrip()
    ends = [token for token in added if token and after.startswith(token)]
    if not ends:
        raise UserError(
            "no special token follows an answer, so nothing would stop generation",
            where=template,
            do="end assistant turns with the tokenizer's end-of-turn or eos token",
        )
    return max(ends, key=len)


def _stopping_at(end: int, model: Path) -> dict[str, Any]:
    """The generation settings with `end` among the ids that stop."""
    path = model / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    config = read_json(model / "config.json")
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    for name in ("bos_token_id", "pad_token_id"):  # without a file, transformers takes these from config.json
        if name not in generation and config.get(name) is not None:
            generation[name] = config[name]
    return {**generation, "eos_token_id": [*listed, *([end] if end not in listed else [])]}


def _content(token: Any) -> Any:
    """A special token's text; old folders store it as a mapping."""
    return token["content"] if isinstance(token, dict) else token
