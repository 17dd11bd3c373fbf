"""A broken base: named by file and recipe line, in one line with exit 2, before anything is started."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixmerge.errors import ModelError, UserError
from mixmerge.model.check import check_model


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def retype(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "truncated weights": (
        lambda b: cut(b / "model.safetensors"),
        r"base/model\.safetensors: the file has \d+ bytes where its header promises \d+; copy or download it again",
    ),
    "bad header": (
        lambda b: (b / "model.safetensors").write_bytes(b"\xff" * 80),
        r"base/model\.safetensors: the file is cut short or is no safetensors file; .+",
    ),
    "no tokenizer": (
        lambda b: (b / "tokenizer.json").unlink(),
        r"base: no tokenizer\.json; load it with transformers\.AutoTokenizer .+",
    ),
    "tokenizer that is no JSON": (
        lambda b: (b / "tokenizer.json").write_text("xx"),
        r"base/tokenizer\.json: not JSON: .+",
    ),
    "tokenizer that is JSON and no tokenizer": (
        lambda b: (b / "tokenizer.json").write_text('{"model": {"type": "nothing"}}'),
        r"base/tokenizer\.json: not a tokenizer: .+",
    ),
    "tokenizer settings that are no JSON": (
        lambda b: (b / "tokenizer_config.json").write_text("{"),
        r"base/tokenizer_config\.json: not JSON: .+",
    ),
    "unknown model type": (
        lambda b: retype(b / "config.json", model_type="lama"),
        r"base/config\.json: transformers has no language model of type 'lama'; did you mean 'llama'\?",
    ),
    "no model type": (lambda b: (b / "config.json").write_text("{}"), r"base/config\.json: no 'model_type'; .+"),
    "configuration that is no JSON": (
        lambda b: (b / "config.json").write_text('{"model_type": "llam'),
        r"base/config\.json: not (valid )?JSON.*",
    ),
    "chat template that is no Jinja": (
        lambda b: (b / "chat_template.jinja").write_text("{% if %}"),
        r"base/chat_template\.jinja:1: the chat template does not render: .+",
    ),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_check_names_what_is_broken_in_a_base(mixmerge, study, own_base, harm):
    make, line = BROKEN[harm]
    make(own_base)
    status, out, err = mixmerge("check", study.recipe, "--out", study.out)
    assert (status, out) == (2, ""), err
    assert re.fullmatch(rf"error: {study.recipe}:2: base: {study.folder}/{line}\n", err), err


@pytest.mark.parametrize(
    ("jinja", "line"),
    [
        ("{% for %}", r"t\.jinja:1: the chat template does not render: .+"),
        ("{{ messages[7]['content'] }}", r"t\.jinja: the chat template does not render: .+"),
        ("nothing", r"t\.jinja: the chat template leaves out the question or the answer"),
    ],
)
def test_a_broken_template_of_the_user_is_named_as_the_recipe_names_it(mixmerge, study, jinja, line):
    (study.folder / "t.jinja").write_text(jinja)
    study.edit("base: ./base", "base: {path: ./base, chat_template: ./t.jinja}")
    status, _, err = mixmerge("check", study.recipe, "--out", study.out)
    assert status == 2
    assert re.fullmatch(rf"error: {study.recipe}:2: base\.chat_template: \./{line}\n", err), err


def test_a_template_that_marks_its_answers_for_training_is_accepted(own_base):
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}"
    (own_base / "chat_template.jinja").write_text(marked)
    check_model(own_base)


def test_a_template_inside_the_tokenizer_settings_is_checked_too(own_base):
    (own_base / "chat_template.jinja").unlink()
    retype(own_base / "tokenizer_config.json", chat_template="{% endfor %}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:1: the chat template does not render"):
        check_model(own_base)


def test_a_whole_base_passes_and_a_folder_of_pickles_does_not(own_base):
    check_model(own_base)
    (own_base / "model.safetensors").rename(own_base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        check_model(own_base)
