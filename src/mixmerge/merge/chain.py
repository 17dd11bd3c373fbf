"""Several merges in one file: named ones feed each other, and the last is the output.

The one idea: a model that has the name of another merge of the file means its result, so the order of work follows from
the names alone. Invariant: what is accepted can be run in the order of `earlier`, and every merge is of use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixmerge.errors import RecipeError, did_you_mean
from mixmerge.merge.adapters import split_reference
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.vocabulary import ROLES
from mixmerge.yaml import KeyPath

_MODELS, _TOKENIZERS = ("model", "base_model"), ("tokenizer_source", "source")  # the keys that name a model


def chained(configs: Sequence[MergeConfig], file: str) -> MergeConfig:
    """The last of a file's merges, with those that it needs as its `earlier`.

    Raises:
        RecipeError: a merge without name that is not the last, a name given twice or never used, a cycle.
    """
    if not configs:
        raise RecipeError("there is no merge in this file", where=file)
    last = configs[-1]
    if len(configs) == 1:
        return last
    named: dict[str, MergeConfig] = {}
    for i, config in enumerate(configs):
        if config.name is None:
            if config is not last:
                do = "give it a 'name', which a later merge lists as its model; the last document is the output"
                raise RecipeError(
                    f"document {i + 1} of {len(configs)} has no name", where=config.where("merge_method"), do=do
                )
            continue
        if config.name in named:
            raise RecipeError(f"two merges are named '{config.name}'", where=config.where("name"), do="rename one")
        named[config.name] = config
    order: dict[str, MergeConfig] = {}
    _visit(last, named, order, ())
    unused = next((config for config in configs[:-1] if config.name not in order), None)
    if unused is not None:
        do = "list it as a model of a later one, or remove it"
        raise RecipeError(f"nothing uses the merge '{unused.name}'", where=unused.where("name"), do=do)
    return dataclasses.replace(last, earlier=tuple(config for config in order.values() if config is not last))


def require_models(config: MergeConfig) -> None:
    """Refuse a model of a chain that is a bare word and no folder: it was meant to be the name of a merge.

    Raises:
        RecipeError: such a model, with the names there are.
    """
    named = [str(merge.name) for merge in config.earlier]
    for merge in (*config.earlier, config):
        for path, reference in _references(merge.to_mergekit()):
            model, _ = split_reference(reference, merge.folder)
            if reference not in named and "/" not in model and not (merge.folder / model).is_dir():
                what = f"'{reference}' is neither a merge of this file nor a folder"
                raise RecipeError(what, where=merge.where(*path), do=did_you_mean(reference, named))


def _visit(
    config: MergeConfig, named: Mapping[str, MergeConfig], order: dict[str, MergeConfig], above: tuple[MergeConfig, ...]
) -> None:
    """Put what a merge needs into the order, then the merge itself."""
    for path, reference in _references(config.to_mergekit()):
        needed = named.get(reference)
        if needed is None:
            continue
        if needed is config or needed in above:
            circle = (*above, config)[(*above, config).index(needed) :]
            names = " -> ".join(str(merge.name) for merge in (*circle, needed))
            what = f"the merge '{reference}' needs its own result ({names})"
            raise RecipeError(what, where=config.where(*path), do="break the circle")
        if reference not in order:
            _visit(needed, named, order, (*above, config))
    order[config.name or ""] = config


def _references(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every model a configuration names, with its place in the YAML."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "parameters" and path != ("tokenizer", "tokens"):
            continue
        if isinstance(value, str) and (key in _MODELS or (key in _TOKENIZERS and value not in ROLES)):
            yield (*path, key), value
        else:
            yield from _references(value, (*path, key))
