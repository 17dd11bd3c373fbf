"""mergekit's YAML in, checked strictly into a `MergeConfig`.

The one idea: the methods' declarative specs say which parameters exist, where they may stand and what values they take;
so a misspelt, misplaced or impossible one is refused with its line, where mergekit would merge something else.
Ours beyond mergekit: `seed` at the top level.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mixmerge.errors import ModelError, RecipeError, did_you_mean
from mixmerge.merge.adapters import split_reference
from mixmerge.merge.chain import chained
from mixmerge.merge.methods import METHODS, Parameter
from mixmerge.merge.settings import DTYPES, NO_EFFECT, Combination, Entry, MergeConfig, Module, Slice
from mixmerge.merge.tokenizer import TEMPLATES, broken_template
from mixmerge.merge.values import Filtered, Number, Value, sum_to_zero
from mixmerge.merge.vocabulary import VocabularyChoice, parse_vocabulary
from mixmerge.yaml import KeyPath, Marks, read_yaml_documents

__all__ = ["MergeConfig", "load_config", "parse_config"]

_NAME = re.compile(r"\w[\w.-]{0,99}")
_FORMS = ("models", "slices", "modules")
_KEYS = (
    "name",
    "merge_method",
    *_FORMS,
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "seed",
)
_UNSUPPORTED = {
    "pad_to_multiple_of": "write it into the tokenizer block: {source: ..., pad_to_multiple_of: ...}",
}


def load_config(path: Path | str, *, pickles: bool = False) -> MergeConfig:
    """Read a merge configuration from a YAML file; of several documents the last is the output.

    Relative models are looked for in the current folder, as mergekit does; if one is not there, beside the file.
    `pickles`: pickled weights are read too, where a model has no others; nothing in them but tensors is ever loaded.

    Raises:
        RecipeError: unreadable or broken YAML, or anything `parse_config` and `chained` refuse, with `file:line`.
    """
    path = _a_path(path)
    configs = [parse_config(*document) for document in read_yaml_documents(path)]
    return chained([dataclasses.replace(_from_here(config), pickles=pickles) for config in configs], str(path))


def parse_config(mapping: Mapping[str, Any], marks: Marks | None = None) -> MergeConfig:
    """Check a merge configuration given as plain data; `marks` adds file and line to errors.

    Raises:
        RecipeError: unknown or misplaced key, wrong type, value out of range, missing parameter, wrong models.
    """
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"a merge configuration is a mapping of keys to values, not a {type(mapping).__name__}")
    return _Parser(marks).config(mapping)


def _a_path(path: Any) -> Path:
    if not isinstance(path, str | Path):
        raise RecipeError(f"the path of a YAML file was expected, not a {type(path).__name__}", do="see parse_config")
    return Path(path)


def _from_here(config: MergeConfig) -> MergeConfig:
    """The configuration with its models relative to the current folder, where those that are folders at all are."""
    here, beside = Path.cwd(), config.folder
    split = (split_reference(name, folder) for name in config.references for folder in (beside, here))
    parts = {part for pair in split for part in pair if part is not None and not Path(part).is_absolute()}
    local = [part for part in parts if (here / part).is_dir() or (beside / part).is_dir()]
    if not local or not all((here / part).is_dir() for part in local):
        return config
    doubtful = sorted(part for part in local if (beside / part).is_dir() and not (beside / part).samefile(here / part))
    told = tuple(f"'{part}' is that of the current folder, not the one beside the YAML" for part in doubtful)
    return dataclasses.replace(config, relative_to=here, doubts=told)


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
        form = self.form(raw, _FORMS)
        config = MergeConfig(
            merge_method=method,
            models=self.models(raw["models"], method, base, "models") if form == "models" else (),
            slices=self.slices(raw["slices"], method, base, "slices") if form == "slices" else (),
            modules=self.modules(raw["modules"], method, base) if form == "modules" else {},
            base_model=base,
            parameters=self.parameters(raw.get("parameters"), method, "top", "parameters"),
            dtype=self.text(raw, "dtype", DTYPES),
            out_dtype=self.text(raw, "out_dtype", DTYPES),
            tokenizer_source=self.tokenizer_source(raw, base),
            tokenizer=self.tokenizer(raw, base),
            chat_template=self.chat_template(raw.get("chat_template")),
            seed=self.seed(raw.get("seed", 0)),
            name=self.name(raw.get("name")),
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
        if raw.get("tokenizer_source") is None:
            return None
        value = self.reference(raw["tokenizer_source"], "tokenizer_source")
        if value == "base" and base is None:
            do = "name the base, or remove tokenizer_source (the first model's tokenizer is then kept)"
            self.refuse("tokenizer_source is base, but there is no base_model", "tokenizer_source", do=do)
        return value

    def tokenizer(self, raw: Mapping[str, Any], base: str | None) -> VocabularyChoice | None:
        if raw.get("tokenizer") is None:
            return None
        if raw.get("tokenizer_source") is not None:
            do = "keep one of the two: tokenizer.source says the same"
            self.refuse("both 'tokenizer' and 'tokenizer_source' are set", "tokenizer_source", do=do)
        choice = parse_vocabulary(raw["tokenizer"], self.refuse, self.reference)
        if choice.source == "base" and base is None:
            self.refuse("the source is base, but there is no base_model", "tokenizer", "source", do="name the base")
        return choice

    def chat_template(self, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str) or not (value in ("auto", *TEMPLATES) or "{{" in value or "{%" in value):
            do = f"{did_you_mean(str(value), ('auto', *TEMPLATES))}; or write the template itself, in jinja"
            self.refuse(f"unknown chat_template {value!r}", "chat_template", do=do)
        if broken := broken_template(value):
            self.refuse(f"the template is no jinja: {broken}", "chat_template")
        return value

    def seed(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(f"seed must be a whole number of at least 0, got {value!r}", "seed")
        return value

    def reference(self, value: Any, *path: str | int) -> str:
        """A model's name; mergekit's mapping of {model: {path, revision}, lora: {path, revision}} is told as one."""
        if isinstance(value, dict):
            self.known(value, ("model", "lora"), "", *path)
            parts = [self.place(value[key], *path, key) for key in ("model", "lora") if value.get(key) is not None]
            if "model" not in value:
                self.refuse("a model is {model: {path: ..}}, or its name", *path)
            return self.reference("+".join(parts), *path)
        if not isinstance(value, str) or not value:
            self.refuse(f"a model is a folder or a Hub id, got {value!r}", *path)
        try:
            split_reference(value, Path() if self.marks is None else Path(self.marks.file).parent)
        except ModelError as error:
            self.refuse(error.what, *path, do=error.do)
        return value

    def place(self, value: Any, *path: str | int) -> str:
        """`path@revision` of {path, revision}."""
        if isinstance(value, str):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            self.refuse(f"must be {{path: .., revision: ..}}, got {value!r}", *path)
        self.known(value, ("path", "revision"), "", *path)
        revision = value.get("revision")
        return value["path"] if revision is None else f"{value['path']}@{revision}"

    def name(self, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            self.refuse(f"a name is a word that later merges use for this one's result, got {value!r}", "name")
        return value

    def form(self, raw: Mapping[str, Any], forms: Iterable[str], *path: str | int) -> str:
        """The one form that is given."""
        given = [form for form in forms if raw.get(form) is not None]
        if len(given) > 1:
            do = "give one of them: each says on its own what is merged"
            self.refuse(f"both '{given[0]}' and '{given[1]}' are there", *path, given[1], do=do)
        if not given:
            others = " or ".join(f"'{form}'" for form in forms if form != "models")
            place = (*path, "models") if "models" in raw else path
            self.refuse(f"'models' must be a list of {{model, parameters}}, unless {others} is given", *place)
        return given[0]

    def modules(self, raw: Any, method: str, base: str | None) -> dict[str, Module]:
        if not isinstance(raw, dict) or not raw:
            self.refuse("'modules' must be a mapping of a module's name to its {slices, parameters}", "modules")
        modules = {}
        for name, item in raw.items():
            path = ("modules", name)
            if not isinstance(item, dict):
                self.refuse("a module must be {slices, parameters} or {models, parameters}", *path)
            self.known(item, ("models", "slices", "parameters"), method, *path)
            form = self.form(item, ("models", "slices"), *path)
            modules[name] = Module(
                self.models(item["models"], method, base, *path, "models") if form == "models" else (),
                self.slices(item["slices"], method, base, *path, "slices") if form == "slices" else (),
                self.parameters(item.get("parameters"), method, "part", *path, "parameters"),
            )
        return modules

    def slices(self, raw: Any, method: str, base: str | None, *path: str | int) -> tuple[Slice, ...]:
        if not isinstance(raw, list) or not raw:
            self.refuse("'slices' must be a list of {sources, parameters}", *path)
        slices = []
        for i, item in enumerate(raw):
            if not isinstance(item, dict) or "sources" not in item:
                self.refuse("each slice must be {sources, parameters}", *path, i)
            self.known(item, ("sources", "parameters", "base_model"), method, *path, i)
            own = item.get("base_model")
            if own is not None:
                own = self.reference(own, *path, i, "base_model")
                if METHODS[method].base == "none":
                    do = "remove it, or list it as a source with the layers and the weight that it should have"
                    self.refuse(f"{method} takes no base, so this does nothing", *path, i, "base_model", do=do)
            sources = self.sources(item["sources"], method, own or base, *path, i, "sources")
            parameters = self.parameters(item.get("parameters"), method, "part", *path, i, "parameters")
            slices.append(Slice(sources, parameters, own))
        return tuple(slices)

    def sources(self, raw: Any, method: str, base: str | None, *path: str | int) -> tuple[Entry, ...]:
        """The sources of one slice: as many layers of each, the base apart among them."""
        if not isinstance(raw, list) or not raw:
            self.refuse("'sources' must be a list of {model, layer_range, parameters}", *path)
        base = None if METHODS[method].base == "none" else base
        entries: list[Entry] = []
        for i, item in enumerate(raw):
            if not isinstance(item, dict) or "model" not in item or "layer_range" not in item:
                self.refuse("each source must be {model, layer_range, parameters}", *path, i)
            self.known(item, ("model", "layer_range", "parameters"), method, *path, i)
            model = self.reference(item["model"], *path, i, "model")
            layers = self.layers(item["layer_range"], *path, i, "layer_range")
            for entry in entries:
                if entry.model == model and (entry.layers == layers or model == base):
                    what = "the base is" if model == base else "these layers are"
                    self.refuse(f"{what} listed twice in this slice: '{model}'", *path, i, do="list it once")
                if _count(entry.layers) != _count(layers):
                    what = f"{_count(layers)} layers of '{model}' and {_count(entry.layers)} of '{entry.model}'"
                    do = "give every source of a slice as many layers"
                    self.refuse(f"{what} cannot be combined layer by layer", *path, i, "layer_range", do=do)
            level = "base" if model == base else "model"
            own = self.parameters(item.get("parameters"), method, level, *path, i, "parameters")
            entries.append(Entry(model, own, layers))
        if base is not None and all(entry.model != base for entry in entries):
            if len({entry.layers for entry in entries}) > 1:
                do = f"list it as a source with its layer_range: {{model: {base}, layer_range: [.., ..]}}"
                self.refuse(f"the sources take different layers: which ones of the base '{base}'?", *path, do=do)
            entries.append(Entry(base, {}, entries[0].layers))
        return tuple(entries)

    def layers(self, raw: Any, *path: str | int) -> tuple[int, int]:
        if not isinstance(raw, list) or len(raw) != 2 or any(type(end) is not int or end < 0 for end in raw):
            what = f"layer_range is [first layer, layer after the last], counted from 0, got {raw!r}"
            self.refuse(what, *path)
        first, end = raw
        if first >= end:
            do = f"did you mean [{end}, {first}]?" if first > end else f"did you mean [{first}, {end + 1}]?"
            self.refuse(f"layer_range {raw} holds no layer", *path, do=do)
        return first, end

    def known(self, raw: Mapping[str, Any], keys: tuple[str, ...], method: str, *path: str | int) -> None:
        for key in raw:
            if key not in keys:
                misplaced = method in METHODS and key in METHODS[method].parameters
                place = ".".join(str(part) for part in (*path, "parameters"))
                do = f"write it under {place}" if misplaced else did_you_mean(str(key), keys)
                self.refuse(f"unknown key '{key}'", *path, key, do=do)

    def models(self, raw: Any, method: str, base: str | None, *path: str | int) -> tuple[Entry, ...]:
        if not isinstance(raw, list) or not raw:
            self.refuse("'models' must be a list of {model, parameters}", *path)
        entries: list[Entry] = []
        for i, item in enumerate(raw):
            if not isinstance(item, dict) or "model" not in item:
                self.refuse("each entry must be {model, parameters}", *path, i)
            self.known(item, ("model", "parameters"), method, *path, i)
            model = self.reference(item["model"], *path, i, "model")
            if any(entry.model == model for entry in entries):
                self.refuse(f"'{model}' is listed twice", *path, i, do="list it once, with the weight it should have")
            level = "base" if METHODS[method].base != "none" and model == base else "model"
            own = self.parameters(item.get("parameters"), method, level, *path, i, "parameters")
            entries.append(Entry(model, own))
        return tuple(entries)

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
            if level in ("model", "base") and known[name].scope == "shared":
                do = "move it to the parameters of the slice, or of the top level" if "sources" in path else _TO_TOP
                self.refuse(f"'{name}' holds for all models together and does nothing under one", *here, do=do)
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
                do = f"write {'true' if raw else 'false'}" if raw in (0, 1, "yes", "no", "on", "off") else None
                self.refuse(f"'{name}' must be true or false, got {raw!r}", *path, do=do)
            return raw
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) <= sys.float_info.max:
            self.refuse(f"'{name}' must be a finite number, got {raw!r}", *path)
        if spec.whole and raw != int(raw):
            self.refuse(f"'{name}' must be a whole number, got {raw!r}", *path)
        if not spec.low <= raw <= spec.high:
            percent = f"it is a fraction: did you mean {raw / 100:g}?" if 2 <= raw <= 100 and spec.high == 1 else None
            limits = (
                f"be at least {spec.low:g}" if spec.high == math.inf else f"lie between {spec.low:g} and {spec.high:g}"
            )
            self.refuse(f"'{name}' must {limits}, got {raw!r}", *path, do=percent)
        return int(raw) if spec.whole else float(raw)  # 1 and 1.0 are one merge

    def check(self, config: MergeConfig) -> None:
        """What only shows when the parts are together: base, number of models, required parameters, weights."""
        for part in config.combinations:
            self.check_models(part, config.merge_method)
            self.check_parameters(part, config.merge_method)

    def check_models(self, part: Combination, name: str) -> None:
        if part.method.base == "required" and part.base is None:
            self.refuse(f"{name} needs a 'base_model'", "merge_method", do="name the model that all others came from")
        fewest, most = part.method.inputs
        if not fewest <= len(part.inputs) <= (most or len(part.inputs)):
            wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            besides = " besides the base" if part.base is not None else ""
            self.refuse(f"{name} merges {wanted} model(s){besides}, got {len(part.inputs)}", *part.path)

    def check_parameters(self, part: Combination, name: str) -> None:
        for parameter, spec in part.method.parameters.items():
            if spec.default is not None or part.level_with(parameter) is not None:
                continue
            if spec.scope == "shared":
                self.refuse(f"{name} needs '{parameter}'", "merge_method", do=f"set parameters.{parameter}")
            for entry in part.inputs:
                if parameter not in entry.parameters:
                    do = f"set parameters.{parameter} there or at the top level"
                    self.refuse(f"{name} needs '{parameter}' for model '{entry.model}'", *_place(part, entry), do=do)
        normalize = part.method.parameters.get("normalize")
        if part.method.elects:
            return
        if normalize is not None and (part.level_with("normalize") or {}).get("normalize", normalize.default) is True:
            weights = [(part.level_with("weight", entry) or {}).get("weight", 0) for entry in part.inputs]
            constant = [weight for weight in weights if not isinstance(weight, tuple)]
            if len(constant) == len(weights) and sum_to_zero(constant):
                raise part.zero_weights("everywhere")


def _place(part: Combination, entry: Entry) -> KeyPath:
    """Where an input stands in the YAML."""
    config = part.config
    if part.path == ("models",):
        return ("models", config.models.index(entry)) if entry in config.models else ("base_model",)
    return (*part.path, "sources", part.entries.index(entry)) if "slices" in part.path else part.path


def _count(layers: tuple[int, int] | None) -> int:
    first, end = layers or (0, 0)
    return end - first


_TO_TOP = "move it to the top-level parameters"
