"""One vocabulary for all models of a merge: their embedding and output rows put in the order of the output's tokens.

The one idea: a row belongs to a token, not to a number. Every model's tensors with a row per token are read through
`Rows`, so all of them have the output's shape before any method sees them. A model that lacks a token takes the only row
that there is, else the base's, else the mean of all; a token that no model has gets zeros, which is said.
Invariants: found from the headers and tokenizer.json files alone, before a byte is written; no table of architectures.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from mixmerge.errors import ModelError, did_you_mean
from mixmerge.merge.adapters import FoldedCheckpoint, sources_of, vocab_size, with_vocab_size
from mixmerge.merge.block import Float32
from mixmerge.merge.checkpoint import Checkpoint, read_json
from mixmerge.merge.sources import Files, Raw, Source, read_decoded
from mixmerge.merge.tokenizer import Tokenizer, files, read_tokenizer, unite, with_tokens

if TYPE_CHECKING:
    from mixmerge.merge.settings import MergeConfig

_POSITIONS = re.compile(r"(^|[._])(w?pe|pos|position\w*)([._]|$)")
MOST_PADDING = 1 << 16
_BLOCK = ("source", "tokens", "pad_to_multiple_of")
ROLES = ("base", "union")  # sources that are no models
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
ZERO, MEAN, PADDING = -1, -2, -3  # where a row comes from, beside the number of a model


class Refuse(Protocol):
    """Raises a RecipeError for what stands at a path of the configuration."""

    def __call__(self, what: str, *path: str | int, do: str | None = None) -> NoReturn: ...


@dataclass(frozen=True, slots=True)
class RowMap:
    """For each row of the output: the number of the model that it comes from (or ZERO, MEAN, PADDING), and its row there."""

    origin: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    averages: Mapping[int, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Where a token's row comes from: a model's row of that token, of `token` or of number `token_id`; or zeros."""

    model: str | None  # None: zeros
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class VocabularyChoice:
    """The `tokenizer:` block: `source` is base, union or a model."""

    source: str
    tokens: Mapping[str, TokenChoice] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> frozenset[str]:
        """Those that it names, merged or not."""
        named = {choice.model for choice in self.tokens.values() if choice.model is not None}
        return frozenset(named | ({self.source} - set(ROLES)))

    def to_mergekit(self) -> dict[str, Any]:
        tokens = {}
        for token, choice in self.tokens.items():
            origin: Any = choice.model or {"kind": "zero"}
            number = {"token": choice.token} if choice.token is not None else {"token_id": choice.token_id}
            if choice.model is not None and number != {"token_id": None}:
                origin = {"kind": "model_token", "model": choice.model, **number}
            tokens[token] = {"source": origin} | ({"force": True} if choice.force else {})
        padding = {} if self.pad_to_multiple_of is None else {"pad_to_multiple_of": self.pad_to_multiple_of}
        return {"source": self.source} | ({"tokens": tokens} if tokens else {}) | padding


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the output's vocabulary is, and how each model's rows come to it."""

    tokenizer: Tokenizer
    rows: int
    tensors: frozenset[str]  # those with a row per token
    models: tuple[Checkpoint, ...]  # by number; those of the merge first
    maps: Mapping[str, RowMap]  # by name, of those of the merge
    numbering: Numbering
    notes: tuple[str, ...]

    @property
    def outside(self) -> tuple[Checkpoint, ...]:
        """Models that only give rows, and are not merged."""
        return tuple(model for model in self.models if model.name not in self.maps)

    def files(self) -> dict[str, bytes | Path]:
        return files(self.tokenizer)

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json's content with these tokens' ids and number of rows."""
        return with_vocab_size(self.numbering.renumbered(config, self.numbering.config), self.rows)

    def fingerprint(self) -> str:
        """A hash of every row's origin and of the tokenizer that is written."""
        said = [self.rows, self.tokenizer.spec, self.tokenizer.settings, self.numbering.config]
        digest = hashlib.sha256(json.dumps([*said, [model.fingerprint() for model in self.outside]]).encode())
        for rows in self.maps.values():
            digest.update(rows.origin.tobytes() + rows.row.tobytes())
            digest.update(json.dumps(sorted(rows.averages.items())).encode())
        return digest.hexdigest()

    def put_into(self, sources: Mapping[str, Mapping[str, Source]], files: Files) -> dict[str, dict[str, Source]]:
        """The same sources, by model and tensor, with the tensors of the vocabulary in the output's order."""
        known = dict(sources) | {model.name: sources_of(model, files) for model in self.outside}
        found = {model: dict(tensors) for model, tensors in sources.items()}
        for model, rows in self.maps.items():
            for name in self.tensors & set(found[model]):
                donors = [known[other.name].get(name) for other in self.models]
                found[model][name] = Rows(sources[model][name], donors, rows)
        return found


def plan_vocabulary(
    config: MergeConfig, opened: Mapping[str, Checkpoint], open_other: Callable[[str], Checkpoint]
) -> Vocabulary | None:
    """Find the output's tokens and the origin of each row of each model; None where the configuration asks for nothing.

    `opened`: the models of the merge; `open_other` opens one that only gives rows or the tokenizer.

    Raises:
        ModelError: a tokenizer or a row that is missing, or tokenizers that cannot be united.
    """
    choice = config.vocabulary
    if choice is None:
        return None
    folders = {name: _tokenizer_folder(model) for name, model in opened.items()}
    donor = opened[config.donor]
    models = list(opened.values())
    others = {one.model for one in choice.tokens.values() if one.model is not None} - set(opened)
    models += [open_other(name) for name in sorted(others)]
    tokenizers = {name: read_tokenizer(folder, name) for name, folder in folders.items()}
    tokenizers |= {model.name: read_tokenizer(_tokenizer_folder(model), model.name) for model in models[len(opened) :]}
    chosen, numbering = _chosen(choice.source, donor, opened, tokenizers, open_other)
    written = with_tokens(chosen, choice.tokens)
    multiple = choice.pad_to_multiple_of or 1
    rows = -(-written.size // multiple) * multiple
    tables = [_Table(model, tokenizers[model.name]) for model in models]
    base = next((number for number, model in enumerate(models) if model.name == config.base_model), None)
    given, notes = _given(choice, tables), []
    maps = {}
    for number, table in enumerate(tables[: len(opened)]):
        maps[table.model.name], nowhere = _row_map(number, tables, len(opened), base, written, rows, choice, given)
        if nowhere:
            listing = ", ".join(nowhere[:5]) + (f" and {len(nowhere) - 5} more" if len(nowhere) > 5 else "")
            notes.append(f"no model has a row for {listing}: filled with zeros")
    tensors = frozenset(vocabulary_tensors(list(opened.values())))
    if not tensors:
        raise ModelError("no tensor has a row for each token", where=donor.name, do="remove the tokenizer settings")
    return Vocabulary(written, rows, tensors, tuple(models), maps, numbering, tuple(dict.fromkeys(notes)))


def _chosen(
    source: str,
    donor: Checkpoint,
    opened: Mapping[str, Checkpoint],
    tokenizers: Mapping[str, Tokenizer],
    open_other: Callable[[str], Checkpoint],
) -> tuple[Tokenizer, Numbering]:
    """The tokenizer that a source stands for, and what it makes of the ids in the donor's configuration files."""
    own = tokenizers[donor.name]
    kept = Numbering(own, own, {}, {})
    if source == "union":
        return unite([own, *(tokenizers[name] for name in opened if name != donor.name)]), kept
    if source in ("base", donor.name):
        return own, kept
    giver = opened.get(source) or open_other(source)
    written = tokenizers.get(giver.name) or read_tokenizer(_tokenizer_folder(giver), giver.name)
    generation = giver.folder / "generation_config.json"
    held = read_json(generation) if generation.is_file() else giver.config
    return written, Numbering(own, written, giver.config, held)


def parse_vocabulary(raw: Any, refuse: Refuse, reference: Callable[..., str]) -> VocabularyChoice:
    """Check the `tokenizer:` block; `refuse(what, *path, do=...)` raises, `reference(value, *path)` checks a model."""
    if not isinstance(raw, dict):
        refuse(f"must be a mapping of {', '.join(_BLOCK)}, got {raw!r}", "tokenizer", do="or write tokenizer_source")
    _require_keys(raw, _BLOCK, refuse, "tokenizer")
    if "source" not in raw:
        refuse("'source' is missing", "tokenizer", do="set it to union, base or a model")
    tokens = raw.get("tokens") or {}
    if not isinstance(tokens, dict):
        refuse(f"must be a mapping of tokens to {{source, force}}, got {tokens!r}", "tokenizer", "tokens")
    multiple = raw.get("pad_to_multiple_of")
    if multiple is not None and (
        not isinstance(multiple, int) or isinstance(multiple, bool) or not 1 <= multiple <= MOST_PADDING
    ):
        refuse(
            f"must be a whole number from 1 to {MOST_PADDING:,}, got {multiple!r}", "tokenizer", "pad_to_multiple_of"
        )
    chosen = {token: _parse_token(token, one, refuse, reference) for token, one in tokens.items()}
    return VocabularyChoice(reference(raw["source"], "tokenizer", "source"), chosen, multiple)


def _parse_token(token: Any, raw: Any, refuse: Refuse, reference: Callable[..., str]) -> TokenChoice:
    path = ("tokenizer", "tokens", token)
    if not isinstance(token, str) or not token:
        refuse(f"a token is a text, got {token!r}", *path, do="put it in quotation marks")
    if not isinstance(raw, dict) or "source" not in raw:
        refuse(f"must be {{source, force}}, got {raw!r}", *path)
    _require_keys(raw, ("source", "force"), refuse, *path)
    force, source, here = raw.get("force", False), raw["source"], (*path, "source")
    if not isinstance(force, bool):
        refuse(f"'force' must be true or false, got {force!r}", *path, "force")
    if not isinstance(source, dict):
        return TokenChoice(reference(source, *here), force=force)
    kind = source.get("kind")
    if kind not in _KINDS:
        refuse(f"unknown kind {kind!r}", *here, do=did_you_mean(str(kind), _KINDS))
    _require_keys(source, _KINDS[kind], refuse, *here)
    if kind == "zero":
        return TokenChoice(None, force=force)
    if "model" not in source or ("token" in source) == ("token_id" in source):
        refuse("a model_token needs 'model' and one of 'token' and 'token_id'", *here)
    name, number = source.get("token"), source.get("token_id")
    if "token" in source and (not isinstance(name, str) or not name):
        refuse(f"a token is a text, got {name!r}", *here, "token")
    if "token_id" in source and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        refuse(f"a token_id is a whole number of at least 0, got {number!r}", *here, "token_id")
    return TokenChoice(reference(source["model"], *here, "model"), name, number, force)


def _require_keys(raw: Mapping[str, Any], known: Sequence[str], refuse: Refuse, *path: str) -> None:
    for key in raw:
        if key not in known:
            refuse(f"unknown key '{key}'", *path, key, do=did_you_mean(str(key), known))


def vocabulary_tensors(models: Sequence[Checkpoint]) -> list[str]:
    """The tensors with a row per token: outside of the layers, as long as the vocabulary in every model that has them."""
    names = {name for model in models for name in model.tensors}
    return sorted(
        name for name in names if all(_is_per_token(name, model) for model in models if name in model.tensors)
    )


def _is_per_token(name: str, model: Checkpoint) -> bool:
    shape = model.tensors[name].shape
    outside = not any(part.isdecimal() for part in name.split(".")) and not _POSITIONS.search(name)
    matrix = len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))
    return outside and matrix and shape[0] == vocab_size(model.config)


@dataclass(frozen=True, slots=True)
class Numbering:
    """What the ids in the donor's configuration files mean, and what they become: `old` numbers them, `new` is written.

    `config` and `generation` are of the model whose tokenizer is written: its special tokens are the output's.
    """

    old: Tokenizer
    new: Tokenizer
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    def renumbered(self, config: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration file's content with the written tokenizer's ids: `source`'s, else those of the same tokens."""
        if self.old is self.new:
            return dict(config)
        tokens = {number: token for token, number in self.old.ids.items()}
        changed = dict(config)
        for key, value in config.items():
            if isinstance(value, dict) and key.endswith("_config"):
                inner = source.get(key)
                changed[key] = self.renumbered(value, inner if isinstance(inner, dict) else source)
            elif key.endswith(("_token_id", "_token_index")):
                numbers = value if isinstance(value, list) else [value]
                moved = [self.new.ids.get(tokens.get(number, "")) for number in numbers]
                kept = [number for number in moved if number is not None]
                changed[key] = source[key] if key in source else kept if isinstance(value, list) else moved[0]
        return changed


class Rows:
    """A tensor with a row per token, its rows in the order of the output's tokens, as float32."""

    dtype = "F32"

    def __init__(self, own: Source, donors: Sequence[Source | None], rows: RowMap) -> None:
        self.model, self.name = own.model, own.name
        self.shape = (len(rows.origin), *own.shape[1:])
        self._own, self._donors, self._rows = own, donors, rows
        self._lock, self._padding = Lock(), np.empty(0, np.float32)
        used = set(rows.origin[rows.origin >= 0].tolist())
        used |= {number for parts in rows.averages.values() for number, _ in parts}
        for number in sorted(used):
            donor = donors[number]
            if donor is None or donor.shape[1:] != own.shape[1:]:
                what = f"tensor '{own.name}' of '{own.model}' lacks rows that could only come from a model without one of its width"
                raise ModelError(what, do="name another source for these tokens")

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:])

    def ahead(self) -> None:
        self._own.ahead()

    def read(self, start: int, into: Raw) -> int:
        out = into.view(np.float32)
        read = self._before_padding(start, out)
        first, end = start // self.width, -(-(start + len(out)) // self.width)
        padded = first + np.flatnonzero(self._rows.origin[first:end] == PADDING)
        if len(padded):
            mean, got = self._mean_row()
            read += got
            for row in padded.tolist():
                low, high = max(row * self.width, start), min((row + 1) * self.width, start + len(out))
                out[low - start : high - start] = mean[low - row * self.width : high - row * self.width]
        return read

    def _before_padding(self, start: int, out: Float32) -> int:
        """Fill all but the padding rows: neighbours that were neighbours are read at once."""
        origin, rows, at, read = self._rows.origin, self._rows.row, start, 0
        end = start + len(out)
        while at < end:
            first = last = at // self.width
            kind = int(origin[first])
            while (
                kind >= 0
                and (last + 1) * self.width < end
                and origin[last + 1] == kind
                and rows[last + 1] == rows[last] + 1
            ):
                last += 1
            stop = min((last + 1) * self.width, end)
            piece, skipped = out[at - start : stop - start], at - first * self.width
            if kind == MEAN:
                total = np.zeros(len(piece), np.float64)
                for number, row in self._rows.averages[first]:
                    values, got = self._stretch(number, row * self.width + skipped, len(piece))
                    total += values
                    read += got
                piece[:] = total / len(self._rows.averages[first])
            elif kind >= 0:
                piece[:], got = self._stretch(kind, int(rows[first]) * self.width + skipped, len(piece))
                read += got
            else:
                piece[:] = 0
            at = stop
        return read

    def _stretch(self, number: int, start: int, size: int) -> tuple[Float32, int]:
        source = self._donors[number]
        assert source is not None
        return read_decoded(source, start, size)

    def _mean_row(self) -> tuple[Float32, int]:
        """What padding rows hold: the mean of all others, so that no model ever prefers one; and the bytes read now."""
        with self._lock:
            if self._padding.size:
                return self._padding, 0
            total, count, read = np.zeros(self.width, np.float64), 0, 0
            line = np.empty(self.width, np.float32)
            for row in np.flatnonzero(self._rows.origin != PADDING).tolist():
                read += self._before_padding(row * self.width, line)
                total += line
                count += 1
            self._padding = (total / max(count, 1)).astype(np.float32)
            return self._padding, read


class _Table:
    """A model's rows by token; a token beyond its stored rows has none."""

    def __init__(self, model: Checkpoint, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, int(vocab_size(model.config) or 0)

    def row(self, token: str) -> int | None:
        number = self.tokenizer.ids.get(token)
        return number if number is not None and number < self.rows else None


def _given(choice: VocabularyChoice, tables: Sequence[_Table]) -> dict[str, tuple[int, int]]:
    """For each token with a source of its own: the number of the model and the row there, or (ZERO, 0)."""
    numbers = {table.model.name: number for number, table in enumerate(tables)}
    found = {}
    for token, one in choice.tokens.items():
        if one.model is None:
            found[token] = (ZERO, 0)
            continue
        table = tables[numbers[one.model]]
        wanted = token if one.token is None else one.token
        row = table.row(wanted) if one.token_id is None else one.token_id
        if row is None or row >= table.rows:
            what = f"'{wanted}'" if one.token_id is None else f"token {one.token_id}"
            do = "name a token that it has, or {kind: zero}"
            raise ModelError(f"it has no row for {what}, which '{token}' is to take", where=one.model, do=do)
        found[token] = (numbers[one.model], row)
    return found


def _row_map(
    own: int,
    tables: Sequence[_Table],
    merged: int,
    base: int | None,
    tokenizer: Tokenizer,
    size: int,
    choice: VocabularyChoice,
    given: Mapping[str, tuple[int, int]],
) -> tuple[RowMap, list[str]]:
    """Where one model's rows come from, and the tokens that no model has a row for. The first `merged` tables count."""
    origin, rows = np.full(size, PADDING, np.int32), np.zeros(size, np.int64)
    averages: dict[int, tuple[tuple[int, int], ...]] = {}
    nowhere: list[str] = []
    for token, number in tokenizer.ids.items():
        row = tables[own].row(token)
        if token in given and (row is None or choice.tokens[token].force):
            origin[number], rows[number] = given[token]
            continue
        if row is not None:
            origin[number], rows[number] = own, row
            continue
        held = [(i, found) for i, table in enumerate(tables[:merged]) if (found := table.row(token)) is not None]
        best = next((one for one in held if one[0] == base), held[0] if len(held) == 1 else None)
        if best is not None:
            origin[number], rows[number] = best
        elif held:
            origin[number], averages[number] = MEAN, tuple(held)
        else:
            origin[number] = ZERO
            nowhere.append(token)
    return RowMap(origin, rows, averages), nowhere


def _tokenizer_folder(model: Checkpoint) -> Path:
    """Where a model's tokenizer lies: beside its adapter, where training saved one there, else beside the model."""
    if isinstance(model, FoldedCheckpoint) and (model.adapter / "tokenizer.json").is_file():
        return model.adapter
    return model.folder
