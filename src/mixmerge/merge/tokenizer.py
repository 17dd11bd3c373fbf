"""The tokenizer of a merged model: one model's, or the union of all, written from `tokenizer.json` files alone.

The one idea: a union keeps every id of its first tokenizer and gives the others' new tokens the next ids, in their own
order; the first one's rules (normalising, splitting, decoding) hold, and the others' BPE merges follow its own.
Invariants: the same tokenizers give the same bytes; every token that a tokenizer adds keeps the id that is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixmerge.errors import ModelError
from mixmerge.merge.checkpoint import COPIED, as_json, files_like, read_json
from mixmerge.templates import default_template, template_environment

_FILE, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TOKENIZER = tuple(pattern for pattern in COPIED if "processor" not in pattern)
_KEPT = ("special_tokens_map.json", "chat_template*")  # beside these two, of a tokenizer whose tokens changed
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as its files say: `ids` are its tokens in the order of their ids; `changed` once it is another."""

    model: str
    folder: Path
    spec: Mapping[str, Any]
    settings: Mapping[str, Any]
    ids: Mapping[str, int] = field(repr=False)
    changed: bool = False

    @property
    def size(self) -> int:
        """The rows that an embedding needs for it."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        return {token["content"]: token for token in self.spec.get("added_tokens") or ()}


def read_tokenizer(folder: Path, model: str) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer.json, or one without a vocabulary.
    """
    if not (folder / _FILE).is_file():
        do = "load it with transformers.AutoTokenizer and save it there again with save_pretrained, or name another source"
        raise ModelError(f"{_FILE} is missing, and the tokens' rows cannot be found without it", where=model, do=do)
    spec = read_json(folder / _FILE)
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    try:
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        ids = {str(token): int(number) for token, number in vocabulary.items()}
        ids |= {entry["content"]: int(entry["id"]) for entry in spec.get("added_tokens") or ()}
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            ids.setdefault(entry["content"], int(number))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{_FILE} holds no vocabulary", where=model, do="save the tokenizer again") from error
    return Tokenizer(model, folder, spec, settings, dict(sorted(ids.items(), key=lambda item: item[1])))


def unite(tokenizers: Sequence[Tokenizer]) -> Tokenizer:
    """The union: the first one's ids, then the new tokens of each other in the order of its ids.

    Raises:
        ModelError: tokenizers whose tokens are spelt by different rules, so that one list cannot hold them.
    """
    first, *others = tokenizers
    ids, scores = dict(first.ids), _scores(first)
    added = dict(first.added)
    for other in others:
        _require_one_kind(first, other)
        theirs, their_added = _scores(other), other.added
        for token in other.ids:
            if token not in ids:
                ids[token] = max(len(ids), next(reversed(ids.values()), -1) + 1)
                scores[token] = theirs.get(token, 0.0)
            if token in their_added and token not in added:
                added[token] = {**their_added[token], "id": ids[token]}
    merges = _united_merges(first, others)
    if len(ids) == len(first.ids) and len(added) == len(first.added) and merges is None:
        return first
    return _rewritten(first, ids, added, scores, merges)


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """The tokenizer with these special tokens at its end, where it does not have them."""
    new = [token for token in tokens if token not in tokenizer.ids]
    if not new:
        return tokenizer
    ids, added = dict(tokenizer.ids), dict(tokenizer.added)
    for number, token in enumerate(new, start=tokenizer.size):
        ids[token] = number
        added[token] = {"id": number, "content": token, **_ADDED}
    return _rewritten(tokenizer, ids, added, _scores(tokenizer), None)


def files(tokenizer: Tokenizer) -> dict[str, bytes | Path]:
    """The files of a tokenizer for a model folder."""
    if not tokenizer.changed:
        return files_like(tokenizer.folder, TOKENIZER)
    found = files_like(tokenizer.folder, _KEPT)
    found[_FILE] = json.dumps(tokenizer.spec, ensure_ascii=False).encode()
    settings = dict(tokenizer.settings)
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        entries = sorted(tokenizer.added.values(), key=lambda entry: entry["id"])
        new = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
        settings["added_tokens_decoder"] = {**decoder, **new}
    if settings:
        found[_SETTINGS] = as_json(settings)
    return found


def choose_template(wanted: str, folders: Iterable[Path]) -> str:
    """A chat template: one of ours by name, the most frequent of these models' (the first of equals), or `wanted` itself.

    Raises:
        ModelError: `auto`, and none of the models has one.
    """
    if wanted != "auto":
        return TEMPLATES.get(wanted, wanted)
    held = [template for folder in folders if (template := _template(folder)) is not None]
    if not held:
        do = f"remove it, or name one: {', '.join(TEMPLATES)}"
        raise ModelError("chat_template is auto, and none of the models has a chat template", do=do)
    return Counter(held).most_common(1)[0][0]


def broken_template(template: str) -> str | None:
    """What is wrong with a template's jinja; None where nothing is."""
    from jinja2 import TemplateSyntaxError

    try:
        template_environment().from_string(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def set_template(found: Mapping[str, bytes | Path], template: str) -> dict[str, bytes | Path]:
    """A model folder's files with this chat template in place of its own."""
    changed = {name: content for name, content in found.items() if not name.startswith("chat_template")}
    held = changed.get(_SETTINGS, b"{}")
    settings = json.loads(held if isinstance(held, bytes) else held.read_bytes())
    if settings.pop("chat_template", None) is not None:
        changed[_SETTINGS] = as_json(settings)
    return {**changed, _TEMPLATE: template.encode()}


def _template(folder: Path) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    files = (folder / name for name in ("chat_template.json", _SETTINGS))
    held = (default_template(read_json(file).get("chat_template")) for file in files if file.is_file())
    return next((template for template in held if template is not None), None)


def _rewritten(
    tokenizer: Tokenizer,
    ids: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, float],
    merges: list[Any] | None,
) -> Tokenizer:
    """The tokenizer with other tokens. All of them stand in the model's vocabulary too: else a loader numbers them anew."""
    model = dict(tokenizer.spec["model"])
    if isinstance(model["vocab"], list):
        names = {number: token for token, number in ids.items()}
        if len(names) != len(ids) or set(names) != set(range(len(ids))):
            raise ModelError("its ids have gaps, which a Unigram tokenizer cannot keep", where=tokenizer.model)
        lowest = min(scores.values(), default=0.0)
        model["vocab"] = [[names[i], scores.get(names[i], lowest)] for i in range(len(names))]
    else:
        model["vocab"] = dict(ids)
    if merges is not None:
        model["merges"] = merges
    entries = sorted(added.values(), key=lambda entry: entry["id"])
    spec = {**tokenizer.spec, "added_tokens": entries, "model": model}
    return replace(tokenizer, spec=spec, ids=dict(ids), changed=True)


def _scores(tokenizer: Tokenizer) -> dict[str, float]:
    """Of a Unigram tokenizer: the score of each token."""
    vocabulary = tokenizer.spec["model"]["vocab"]
    return dict(vocabulary) if isinstance(vocabulary, list) else {}


def _united_merges(first: Tokenizer, others: Sequence[Tokenizer]) -> list[Any] | None:
    """The first one's BPE merges, then the others' new ones in their order; None where there are none."""
    own = list(first.spec["model"].get("merges") or ())
    seen = {_pair(merge) for merge in own}
    new: list[tuple[str, str]] = []
    for other in others:
        for merge in other.spec["model"].get("merges") or ():
            if (pair := _pair(merge)) not in seen:
                seen.add(pair)
                new.append(pair)
    if not new:
        return None
    if own and isinstance(own[0], str) and not any(" " in piece for pair in new for piece in pair):
        return own + [" ".join(pair) for pair in new]
    return [list(_pair(merge)) for merge in own] + [list(pair) for pair in new]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _require_one_kind(first: Tokenizer, other: Tokenizer) -> None:
    for what, kind in _KINDS.items():
        ours, theirs = kind(first.spec), kind(other.spec)
        if ours != theirs:
            said = f"the tokenizers of '{first.model}' and '{other.model}' differ in {what} ({ours} and {theirs})"
            do = "a union cannot hold both: set tokenizer_source to base or to one of the models"
            raise ModelError(said, do=do)


def _kind(spec: Mapping[str, Any]) -> str:
    model = spec["model"]
    return str(model.get("type") or ("BPE" if "merges" in model else "unknown"))


_KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "kind": _kind,
    "how bytes and spaces are spelt": lambda spec: (
        "byte level" if '"ByteLevel"' in json.dumps(spec.get("decoder")) else "plain"
    ),
    "how a word goes on": lambda spec: str(spec["model"].get("continuing_subword_prefix") or "no sign"),
    "how a word ends": lambda spec: str(spec["model"].get("end_of_word_suffix") or "no sign"),
}

# the formats as the model cards of their families describe them
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "llama3": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "gemma": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{{- message['content'] | trim + '<end_of_turn>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'assistant' %}"
        "{{- ' ' + message['content'] | trim + eos_token }}{%- else %}"
        "{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}{%- endif %}{%- endfor %}"
    ),
    "alpaca": (
        "{%- for message in messages %}{%- if message['role'] == 'system' %}{{- message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'user' %}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{%- else %}{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
    ),
}
