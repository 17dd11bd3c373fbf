"""Chat templates: what they write, which token stops generation, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from mixmerge.errors import ModelError, UserError
from mixmerge.model.chat import CHAT_TEMPLATES, own_chat_template, set_chat_template

GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
LLAMA3_TOKENS = ("<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
TURNS = [
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


def folder_with(path: Path, tokens: tuple[str, ...]) -> Path:
    """A model folder as far as chat templates look: a tokenizer with these special tokens, and configurations."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "llama",
        "eos_token_id": tokenizer.token_to_id("<eos>"),
        "bos_token_id": tokenizer.token_to_id("<bos>"),
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "tokens", "end", "text"),
    [
        (
            "gemma",
            GEMMA_TOKENS,
            "<end_of_turn>",
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "chatml",
            CHATML_TOKENS,
            "<|im_end|>",
            "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            LLAMA3_TOKENS,
            "<|eot_id|>",
            "<bos><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_transformers_writes_the_turns_of_a_named_template(
    name: str, tokens: tuple[str, ...], end: str, text: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", tokens)
    assert not own_chat_template(folder)
    assert set_chat_template(folder, name) == end
    assert own_chat_template(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == text
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stops == [tokenizer.convert_tokens_to_ids("<eos>"), tokenizer.convert_tokens_to_ids(end)]


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_the_prompt_of_a_named_template_begins_the_whole_exchange(name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", tuple(dict.fromkeys(GEMMA_TOKENS + LLAMA3_TOKENS + CHATML_TOKENS)))
    set_chat_template(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(TURNS[:2], tokenize=False).startswith(prompt + "Hello.")


def test_gemma_puts_a_system_text_before_the_first_question_and_refuses_roles_out_of_order(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    set_chat_template(folder, "gemma")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n"
    with pytest.raises(Exception, match="Roles must alternate"):
        tokenizer.apply_chat_template([TURNS[0], TURNS[0]], tokenize=False)


def test_setting_a_template_twice_changes_nothing_more(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    set_chat_template(folder, "gemma")
    once = {file.name: file.read_bytes() for file in folder.iterdir()}
    set_chat_template(folder, "gemma")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == once


def test_a_new_template_replaces_one_inside_the_tokenizer_settings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "old"}))
    assert own_chat_template(folder)
    set_chat_template(folder, "gemma")
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("{{ bos_token }}")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_stops_that_the_model_has_already_are_kept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "top_k": 64}))
    set_chat_template(folder, "gemma")
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<end_of_turn>")
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [3, 4, end]
    assert written["top_k"] == 64


def test_a_template_file_is_taken_and_its_end_of_turn_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", CHATML_TOKENS)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}")
    assert set_chat_template(folder, str(file)) == "<eos>"
    assert (folder / "chat_template.jinja").read_text() == file.read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [json.loads((folder / "config.json").read_text())["eos_token_id"]]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
            r"lacks: <\|im_end\|>, <\|im_start\|>",
        ),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "nothing would stop generation"),
        ("{% for m in messages %}{{ m.content }", "does not render: unexpected"),
        ("{{ raise_exception('no chat here') }}", "does not render: no chat here"),
        ("{{ messages[0].content }}<eos>", "leaves out the question or the answer"),
    ],
)
def test_a_template_that_cannot_work_is_refused_and_the_folder_left_alone(
    template: str, message: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        set_chat_template(folder, str(tmp_path / "bad.jinja"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_named_template_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    with pytest.raises(
        UserError, match=r"'chatml' needs tokens that the tokenizer lacks: <\|im_end\|>, <\|im_start\|>"
    ):
        set_chat_template(folder, "chatml")


def test_an_unknown_name_gets_a_suggestion_and_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", GEMMA_TOKENS)
    with pytest.raises(UserError, match="no chat template 'gema'; did you mean 'gemma'"):
        set_chat_template(folder, "gema")
    with pytest.raises(UserError, match=r"mine\.jinja: no such chat template file"):
        set_chat_template(folder, "mine.jinja")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: cannot read the file"):
        set_chat_template(tmp_path, "gemma")
