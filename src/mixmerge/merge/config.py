"""mergekit's YAML in, checked strictly into a `MergeConfig`.

The one idea: the methods' declarative specs say which parameters exist, where they may stand and what values they take;
so a misspelt, misplaced or impossible one is refused with its line, where mergekit would merge something else.
Ours beyond mergekit: `seed` at the top level. This version merges whole models with equal tensors only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mixmerge.errors import ModelError, RecipeError, did_you_mean
from mixmerge.merge.adapters import split_reference
from mixmerge.merge.methods import METHODS, Parameter
from mixmerge.merge.settings import DTYPES, NO_EFFECT, Entry, Filtered, MergeConfig, Number, Value, sum_to_zero
from mixmerge.yaml import KeyPath, Marks, read_yaml_documents

__all__ = ["MergeConfig", "load_config", "parse_config"]

_KEYS = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "seed",
)
_WHOLE = "this version merges whole models with equal tensors only"
_UNSUPPORTED = {
    "slices": f"{_WHOLE}: list them under 'models', and give a gradient or a filter where layers differ",
    "modules": f"{_WHOLE}: list them under 'models'",
    "tokenizer": f"{_WHOLE}, so the tokenizer is always the base's (else the first model's): remove it",
    "chat_template": "the chat template is always the base's (else the first model's): remove it",
    "name": "this version runs one merge per file: remove it",
}


def load_config(path: Path) -> MergeConfig:
    """Read a merge configuration from a YAML file.

    Raises:
        RecipeError: unreadable or broken YAML, or anything `parse_config` refuses, with `file:line`.
    """
    documents = list(read_yaml_documents(path))
    if len(documents) != 1:
        raise RecipeError(
            f"the file holds {len(documents)} YAML documents, and this version runs one merge per file",
            where=str(path),
            do="write each into its own file; a later one can name an earlier one's output folder as its model",
        )
    return parse_config(*documents[0])


def parse_config(mapping: Mapping[str, Any], marks: Marks | None = None) -> MergeConfig:
    """Check a merge configuration given as plain data; `marks` adds file and line to errors.

    Raises:
        RecipeError: unknown or misplaced key, wrong type, value out of range, missing parameter, wrong models.
    """
    return _Parser(marks).config(mapping)


class _Parser:
    def __init__(self, marks: Marks | None) -> None:
        self.marks = marks

    def refuse(self, what: str, *path: str | int, do: str | None = None) -> NoReturn:
        raise RecipeError(what, where=(self.marks or Marks("merge configuration")).where(path), do=do)

    def config(self, raw: Mapping[str, Any]) -> MergeConfig:
        for key in raw:
            if key in _UNSUPPORTED:
                self.refuse(f"'{key}' is not supported", key, do=_UNSUPPORTED[key])
            if key not in _KEYS:
                self.refuse(f"unknown key '{key}'", key, do=did_you_mean(str(key), _KEYS))
        method = self.text(raw, "merge_method", METHODS)
        if method is None:
            self.refuse("'merge_method' is missing", do=f"known: {', '.join(METHODS)}")
        base = None if raw.get("base_model") is None else self.reference(raw["base_model"], "base_model")
        config = MergeConfig(
            merge_method=method,
            models=self.models(raw.get("models"), method, base),
            base_model=base,
            parameters=self.parameters(raw.get("parameters"), method, "top", "parameters"),
            dtype=self.text(raw, "dtype", DTYPES),
            out_dtype=self.text(raw, "out_dtype", DTYPES),
            tokenizer_source=self.tokenizer_source(raw, base),
            seed=self.seed(raw.get("seed", 0)),
            marks=self.marks,
        )
        self.check(config)
        return config

    def text(self, raw: Mapping[str, Any], key: str, known: Iterable[str]) -> str | None:
        value = raw.get(key)
        if value is None:
            return None
        names = list(known)
        if not isinstance(value, str) or value not in names:
            advice = did_you_mean(str(value), names)
            listing = "" if advice.startswith("known") else f" (known: {', '.join(names)})"
            self.refuse(f"unknown {key} '{value}'", key, do=advice + listing)
        return value

    def tokenizer_source(self, raw: Mapping[str, Any], base: str | None) -> str | None:
        value = raw.get("tokenizer_source")
        if value is None:
            return None
        if value != "base":
            do = f"{_WHOLE}: write base, or remove it"
            self.refuse(f"tokenizer_source '{value}' is not supported", "tokenizer_source", do=do)
        if base is None:
            do = "name the base, or remove tokenizer_source (the first model's tokenizer is then kept)"
            self.refuse("tokenizer_source is base, but there is no base_model", "tokenizer_source", do=do)
        return "base"

    def seed(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(f"seed must be a whole number of at least 0, got {value!r}", "seed")
        return value

    def reference(self, value: Any, *path: str | int) -> str:
        if not isinstance(value, str) or not value:
            self.refuse(f"a model is a folder or a Hub id, got {value!r}", *path)
        try:
            split_reference(value, Path() if self.marks is None else Path(self.marks.file).parent)
        except ModelError as error:
            self.refuse(error.what, *path, do=error.do)
        return value

    def models(self, raw: Any, method: str, base: str | None) -> tuple[Entry, ...]:
        if not isinstance(raw, list) or not raw:
            place = () if raw is None else ("models",)
            self.refuse("'models' must be a list of {model, parameters}", *place)
        entries: list[Entry] = []
        for i, item in enumerate(raw):
            if not isinstance(item, dict) or "model" not in item:
                self.refuse("each entry must be {model, parameters}", "models", i)
            for key in item:
                if key not in ("model", "parameters"):
                    self.refuse(f"unknown key '{key}'", "models", i, key, do=self.advice(key, method, i))
            model = self.reference(item["model"], "models", i, "model")
            if any(entry.model == model for entry in entries):
                self.refuse(
                    f"'{model}' is listed twice", "models", i, do="list it once, with the weight it should have"
                )
            level = "base" if METHODS[method].base != "none" and model == base else "model"
            entries.append(
                Entry(model, self.parameters(item.get("parameters"), method, level, "models", i, "parameters"))
            )
        return tuple(entries)

    def advice(self, key: str, method: str, index: int) -> str:
        if key in METHODS[method].parameters:
            return f"write it under models.{index}.parameters"
        return did_you_mean(str(key), ("model", "parameters"))

    def parameters(self, raw: Any, method: str, level: str, *path: str | int) -> dict[str, Value]:
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.refuse(f"must be a mapping of parameters to values, got {raw!r}", *path)
        known = {**METHODS[method].parameters, **NO_EFFECT}
        for name in raw:
            here = (*path, name)
            if name not in known:
                others = [other for other, spec in METHODS.items() if name in spec.parameters]
                hint = f" (it is a parameter of {', '.join(others)})" if others else ""
                self.refuse(f"{method} has no parameter '{name}'{hint}", *here, do=did_you_mean(str(name), known))
            if level != "top" and known[name].scope == "shared":
                do = "move it to the top-level parameters"
                self.refuse(f"'{name}' holds for the whole merge and does nothing under a model", *here, do=do)
            if level == "base":
                do = "remove it; the base has no task vector of its own"
                self.refuse(f"'{name}' does nothing under the base model", *here, do=do)
        return {name: self.value(value, name, known[name], *path, name) for name, value in raw.items()}

    def value(self, raw: Any, name: str, spec: Parameter, *path: str | int) -> Value:
        if not isinstance(raw, list) or not any(isinstance(item, dict) for item in raw):
            return self.plain(raw, name, spec, *path)
        filtered: list[Filtered] = []
        for i, item in enumerate(raw):
            if not isinstance(item, dict) or "value" not in item or not set(item) <= {"filter", "value"}:
                self.refuse(f"an entry of a filtered '{name}' must be {{filter, value}}, got {item!r}", *path, i)
            pattern = item.get("filter")
            if pattern is not None and (not isinstance(pattern, str) or not pattern):
                self.refuse(f"a filter is a part of tensor names, got {pattern!r}", *path, i, "filter")
            if filtered and filtered[-1].filter in (None, "*"):
                do = "put it before the entry that covers every tensor"
                self.refuse("this entry is never reached: the first that matches is taken", *path, i, do=do)
            filtered.append(Filtered(pattern, self.plain(item["value"], name, spec, *path, i, "value")))
        return tuple(filtered)

    def plain(self, raw: Any, name: str, spec: Parameter, *path: str | int) -> Number | bool | tuple[Number, ...]:
        if not isinstance(raw, list):
            return self.scalar(raw, name, spec, *path)
        if spec.is_flag or not raw:
            self.refuse(f"'{name}' cannot be {'a gradient' if raw else 'an empty list'}", *path)
        return tuple(self.scalar(item, name, spec, *path, i) for i, item in enumerate(raw))

    def scalar(self, raw: Any, name: str, spec: Parameter, *path: str | int) -> Number | bool:
        if spec.is_flag:
            if not isinstance(raw, bool):
                self.refuse(f"'{name}' must be true or false, got {raw!r}", *path)
            return raw
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) <= sys.float_info.max:
            self.refuse(f"'{name}' must be a finite number, got {raw!r}", *path)
        if not spec.low <= raw <= spec.high:
            percent = f"it is a fraction: did you mean {raw / 100:g}?" if 1 < raw <= 100 and spec.high == 1 else None
            self.refuse(f"'{name}' must lie between {spec.low:g} and {spec.high:g}, got {raw!r}", *path, do=percent)
        return raw

    def check(self, config: MergeConfig) -> None:
        """What only shows when the parts are together: base, number of models, required parameters, weights."""
        name, method = config.merge_method, config.method
        if method.base == "required" and config.base_model is None:
            self.refuse(f"{name} needs a 'base_model'", "merge_method", do="name the model that all others came from")
        fewest, most = method.inputs
        if not fewest <= len(config.inputs) <= (most or len(config.inputs)):
            wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            besides = " besides the base" if config.base is not None else ""
            self.refuse(f"{name} merges {wanted} model(s){besides}, got {len(config.inputs)}", "models")
        for parameter, spec in method.parameters.items():
            if spec.default is not None or parameter in config.parameters:
                continue
            if spec.scope == "shared":
                self.refuse(f"{name} needs '{parameter}'", "merge_method", do=f"set parameters.{parameter}")
            for entry in config.inputs:
                if parameter not in entry.parameters:
                    where: KeyPath = ("base_model",)
                    if entry in config.models:
                        where = ("models", config.models.index(entry))
                    do = f"set parameters.{parameter} there or at the top level"
                    self.refuse(f"{name} needs '{parameter}' for model '{entry.model}'", *where, do=do)
        normalize = method.parameters.get("normalize")
        if normalize is not None and config.parameters.get("normalize", normalize.default) is True:
            weights = [entry.parameters.get("weight", config.parameters.get("weight", 0)) for entry in config.inputs]
            constant = [weight for weight in weights if not isinstance(weight, tuple)]
            if len(constant) == len(weights) and sum_to_zero(constant):
                raise config.zero_weights("everywhere")
