"""A BPE tokenizer as its `tokenizer.json` has it, and the same tokenizer with fewer tokens.

The one idea: BPE always applies the lowest-ranked merge that fits. If every merge that fired on a text is still
there, in the old order, then it fires again, so the text gets the same pieces. `needed_by` therefore returns a
token with all the pieces on the way to it, and a kept set closed under it encodes what it covers unchanged.
Single characters and bytes are never dropped, so every other text is still encoded without loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import ModelError
from mixmerge.model.folder import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Rows that a family kept free for later: Gemma has 6,242 <unused12>, Llama 3 248 <|reserved_special_token_12|>.
PLACEHOLDER = re.compile(r"[<\[]\|?(unused|reserved)[a-z_]*\d+\|?[>\]]")


class BpeTokenizer:
    """The tokens, merges and added tokens of a BPE `tokenizer.json`."""

    def __init__(self, spec: dict[str, Any], where: str) -> None:
        model = spec.get("model") or {}
        # Files of tokenizers before 0.8 leave the type out; only BPE has merges.
        kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
        if kind != "BPE":
            raise ModelError(f"a {kind} tokenizer cannot be trimmed", where=where, do="only BPE tokenizers can")
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(affix):
                raise ModelError(f"a BPE tokenizer with a {affix} cannot be trimmed", where=where)
        self.where, self.spec = where, spec
        self.vocabulary: dict[str, int] = model["vocab"]
        self.added: dict[str, int] = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        self.ids: dict[str, int] = {**self.vocabulary, **self.added}
        self.tokens: dict[int, str] = {number: token for token, number in self.ids.items()}
        self.merges: list[tuple[str, str]] = [_pair(merge) for merge in model["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}

    @classmethod
    def read(cls, model: Path) -> BpeTokenizer:
        """Read the tokenizer of a model folder.

        Raises:
            ModelError: no `tokenizer.json`, or one that is not plain BPE.
        """
        path = model / "tokenizer.json"
        if not path.is_file():
            advice = "load it with transformers.AutoTokenizer and save it again with save_pretrained"
            raise ModelError("no tokenizer.json", where=str(model), do=advice)
        return cls(read_json(path), str(path))

    def open(self) -> Tokenizer:
        """The tokenizer at work."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self.spec, ensure_ascii=False))

    def always_kept(self) -> set[int]:
        """Ids that no trimming may drop: added (special) tokens but placeholders, bytes and single characters."""
        single = {number for token, number in self.vocabulary.items() if len(token) == 1 or BYTE.fullmatch(token)}
        named = {self.spec["model"].get("unk_token"), (self.spec.get("padding") or {}).get("pad_token")}
        added = {number for token, number in self.added.items() if not PLACEHOLDER.fullmatch(token)}
        return single | added | {self.ids[token] for token in named if token in self.ids}

    def without_letters(self) -> Iterator[int]:
        """Ids of tokens that are all punctuation, digits, marks and space, the lowest first."""
        engine = self.open()
        for number in sorted(self.tokens):
            text = engine.decode([number])
            # Part of a character decodes to U+FFFD, which is no letter either.
            if text and "\ufffd" not in text and not any(letter.isalpha() for letter in text):
                yield number

    def needed_by(self, number: int) -> set[int]:
        """A token's id and those of the pieces that BPE makes on the way to it."""
        pieces = list(self.tokens[number])
        made = {number}
        while len(pieces) > 1:
            ranked = [(self._ranks.get(pair, -1), at) for at, pair in enumerate(pairwise(pieces))]
            usable = [step for step in ranked if step[0] >= 0]
            if not usable:
                break
            _, at = min(usable)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            made.add(self.ids[pieces[at]])
        return made

    def trimmed(self, kept: Iterable[int]) -> tuple[dict[str, Any], dict[int, int]]:
        """The specification with only the tokens `kept`, and their new ids {old: new}, in the old order."""
        new = {old: at for at, old in enumerate(sorted(kept))}
        model = self.spec["model"]
        vocabulary = {token: new[old] for token, old in self.vocabulary.items() if old in new}
        merges = [
            given
            for given, (left, right) in zip(model["merges"], self.merges, strict=True)
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
        padding = self.spec.get("padding")
        return {
            **self.spec,
            "padding": padding and {**padding, "pad_id": new[padding["pad_id"]]},
            "added_tokens": [
                {**token, "id": new[token["id"]]} for token in self.spec.get("added_tokens") or () if token["id"] in new
            ],
            "post_processor": _renumber_processor(self.spec.get("post_processor"), new),
            "model": {**model, "vocab": vocabulary, "merges": merges},
        }, new


def write_trimmed(tokenizer: BpeTokenizer, kept: Iterable[int], out: Path) -> dict[int, int]:
    """Write the trimmed tokenizer over the files copied into `out`; gives the new ids {old: new}.

    Raises:
        ModelError: the written tokenizer does not give the tokens their new ids.
    """
    from tokenizers import Tokenizer

    spec, new = tokenizer.trimmed(kept)
    write_json(out / "tokenizer.json", spec, indent=None)
    for old_format in ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json"):
        (out / old_format).unlink(missing_ok=True)  # would still hold the whole vocabulary under the old ids
    settings_file = out / "tokenizer_config.json"
    if settings_file.is_file() and (settings := read_json(settings_file)).get("added_tokens_decoder"):
        decoder = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {
            str(new[int(old)]): token for old, token in decoder.items() if int(old) in new
        }
        write_json(settings_file, settings)
    # Added tokens outside the vocabulary get their ids by position when the file is read, so the result is checked.
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    wrong = [tokenizer.tokens[old] for old, at in new.items() if written.token_to_id(tokenizer.tokens[old]) != at]
    if wrong:
        what = f"{len(wrong)} tokens lose their place when the tokenizer is written, first {wrong[0]!r}"
        raise ModelError(what, where=tokenizer.where, do="save it again with transformers' save_pretrained")
    return new


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumber_processor(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor (bos, eos, separators) with new ids, whatever its kind."""
    if not isinstance(processor, dict):
        return processor
    out = dict(processor)
    if "processors" in out:
        out["processors"] = [_renumber_processor(inner, new) for inner in out["processors"]]
    if out.get("type") == "TemplateProcessing":
        out["special_tokens"] = {
            name: {**token, "ids": [new[old] for old in token["ids"]]} for name, token in out["special_tokens"].items()
        }
    for name in ("sep", "cls"):  # RobertaProcessing and BertProcessing: [token, id]
        if name in out:
            out[name] = [out[name][0], new[out[name][1]]]
    return out
