"""What a training in the recipe means to its step: defaults that depend on others filled in, what does not apply left out.

One idea: a key that has its default, or that the training's method does not read, is no part of the identity; so a new key
makes no old training new, and a default that two methods share in the recipe touches only the one that reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixmerge.data.formats import Row
from mixmerge.errors import RecipeError, UserError
from mixmerge.model.folder import context_of, read_json
from mixmerge.model.layers import nearest_target, packaged_modules, unmatched_target, weighted_modules
from mixmerge.plan.extra import check_values
from mixmerge.plan.graph import Step
from mixmerge.recipe.schema import How, Training
from mixmerge.train.adapter import require_library
from mixmerge.train.command import command_fields
from mixmerge.train.extra import check_extra
from mixmerge.train.settings import GENERAL, METHODS, Adapter, Devices, settings_from
from mixmerge.train.together import shares_refused

# Read by train steps.
HOW = (
    *("checkpoint_every", "gradient_checkpointing", "processes", "nodes", "fsdp"),
    *("evaluate_every", "report_to", "launcher"),
)
LEARNING_RATES = {("sft", False): 2e-5, ("dpo", False): 1e-6, ("sft", True): 2e-4, ("dpo", True): 1e-5}
# These were in every identity before any key could be left out.
ALWAYS = (
    *("method", "learning_rate", "epochs", "batch_size", "max_length", "warmup_ratio"),
    *("scheduler", "weight_decay", "precision", "seed"),
)


def training_step(
    name: str,
    own: Training,
    training: Training,
    seed: int,
    where: str,
    notes: list[str],
    place: Callable[[str], str],
) -> dict[str, Any]:
    """The `what` of the train step of `name`; `own` are its own keys, `training` those with the recipe's below them.

    `place` says where a key such as `training.extra` stands.

    Raises:
        RecipeError: a key of its own that its method does not read, values that do not go together, or qlora without its
            package.
    """
    if training.engine == "command":
        return _command_what(own, training, seed, where)
    if "command" in own.model_fields_set:
        raise RecipeError("'command' means nothing to engine: trl", where=where, do="set engine: command")
    read = {field.name for field in fields(METHODS[training.method])} | {"engine", "method", "max_repeats"}
    for key in sorted(own.model_fields_set - read):
        other = next(method for method in METHODS if method != training.method)
        raise RecipeError(f"'{key}' means nothing to method: {training.method}", where=where, do=f"set method: {other}")
    try:
        check_extra(training.method, training.extra)
        check_values(training.method, training.extra, scheduler=training.scheduler, loss=training.loss)
        what = training_what(training, seed)
        require_library(settings_from(what))
    except UserError as error:
        found = where if error.where in (None, GENERAL) else place(str(error.where))
        raise RecipeError(error.what, where=found, do=error.do) from error
    if training.learning_rate is None and (training.method != "sft" or training.adapter is not None):
        adapter = "" if training.adapter is None else f" with {training.adapter.type}"
        rate = what["learning_rate"]
        notes.append(f"{name}: learning_rate is {rate:g}, the default of method: {training.method}{adapter}")
    return what


def _command_what(own: Training, training: Training, seed: int, where: str) -> dict[str, Any]:
    """The `what` of a training by a command: its text, and the keys that it uses, which are all that may be set."""
    if training.command is None:
        raise RecipeError("engine: command needs a 'command'", where=where, do="add it")
    rest = {"engine", "command", "method", "max_repeats"}
    known = [name for name in Training.model_fields if name not in {*rest, "adapter"}]
    try:
        used = command_fields(training.command, known)
    except UserError as error:
        raise RecipeError(error.what, where=f"{where}: training.command", do=error.do) from error
    said = (own if "engine" in own.model_fields_set else training).model_fields_set
    for key in sorted(said - used - rest):
        do = f"write {{{key}}} into the command, or remove the key" if key in known else "remove it"
        raise RecipeError(f"'{key}' does nothing: the command does not use it", where=where, do=do)
    given = training.model_dump()
    if training.learning_rate is None:
        given["learning_rate"] = LEARNING_RATES[training.method, False]
    settings = {key: given[key] for key in sorted(used.intersection(known)) if key != "seed"}
    return {
        "engine": "command",
        "method": training.method,
        "command": training.command,
        "settings": settings,
        "seed": seed if training.seed is None else training.seed,
    }


def training_what(training: Training, seed: int) -> dict[str, Any]:
    """The `what` of a train step: what `training` says and its method reads, without what is as by default.

    Raises:
        UserError: values that do not go together.
    """
    given = training.model_dump() | ({"seed": seed} if training.seed is None else {})
    if training.learning_rate is None:
        given["learning_rate"] = LEARNING_RATES[training.method, training.adapter is not None]
    if training.adapter is not None:
        plain = asdict(Adapter())
        own = training.adapter.model_dump()
        given["adapter"] = {key: value for key, value in own.items() if key == "type" or value != plain[key]}
    usual = METHODS[training.method]()
    defaults = {field.name: getattr(usual, field.name) for field in fields(usual)}
    named = {key: value for key, value in given.items() if key in defaults and _plain(value) != defaults[key]}
    what = {key: given[key] for key in ALWAYS} | named
    settings_from(what)
    return what


def longest_row(training: Training) -> int | None:
    """The tokens that a row is cut at; None where a command decides that by itself."""
    told = training.engine == "trl" or "{max_length}" in (training.command or "")
    return training.max_length if told else None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_loggers(names: Sequence[str], where: str) -> None:
    """Refuse a logger whose package is not installed, or that does not know where to write.

    Raises:
        RecipeError: says what to install or to set.
    """
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f"the package '{name}' is not installed", where=where, do=f"install it: pip install {name}"
            )
        if name == "tensorboard" and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
            what = "tensorboard does not know where to write"
            raise RecipeError(what, where=where, do="set the environment variable TENSORBOARD_LOGGING_DIR to a folder")


def check_devices(how: How, where: Callable[[str], str]) -> None:
    """Refuse machines that nothing would start, and weights that nobody would share.

    Raises:
        RecipeError: says what to set.
    """
    if how.nodes > 1 and not how.launcher:
        what = f"{how.nodes} machines, and no 'launcher'"
        do = "give what runs a command on each, e.g. launcher: srun --nodes 2 --ntasks-per-node 1; or launcher: ray, with --backend ray"
        raise RecipeError(what, where=where("nodes"), do=do)
    if how.fsdp and Devices.of(how.model_dump()).size == 1:
        raise RecipeError("one process shares its weights with none", where=where("fsdp"), do="set how.processes")


def check_shares(what: Mapping[str, Any], how: How, where: str) -> None:
    """Refuse a training that so many processes cannot share; a command starts its own.

    Raises:
        RecipeError: says why.
    """
    devices = Devices.of(how.model_dump())
    if devices.size == 1 or what.get("engine") == "command":
        return
    if (refused := shares_refused(what, devices)) is not None:
        do = f"change it, or how.{'nodes and ' if how.nodes > 1 else ''}processes"
        raise RecipeError(refused, where=where, do=do)


def check_targets(training: Training, base: Step, where: str, *, restacked: bool) -> None:
    """Refuse a target of an adapter that names no module of the base; `restacked`: the start may have other layers.

    Raises:
        RecipeError: names it, and the layer that was probably meant.
    """
    if training.engine != "trl" or training.adapter is None or isinstance(training.adapter.targets, str):
        return
    modules = None
    if "path" in base.how:
        modules = weighted_modules(Path(base.how["path"]))
    elif "package" in base.how:
        modules = packaged_modules(base.how["package"])
    if modules is None:
        return
    wrong = unmatched_target(training.adapter.targets, modules, restacked=restacked)
    if wrong is not None:
        what = f"no layer of the base that an adapter can train is called '{wrong}'"
        raise RecipeError(what, where=where, do=nearest_target(wrong, modules))


def check_context(training: Training, base: Step, where: str) -> None:
    """Refuse rows longer than the model can read, where the base is here to be asked.

    Raises:
        RecipeError: says what it can read.
    """
    if "path" not in base.how or (longest := longest_row(training)) is None:
        return
    context = context_of(read_json(Path(base.how["path"]) / "config.json"))
    if context is not None and longest > context:
        by_default = "" if "max_length" in training.model_fields_set else ", the default,"
        what = f"rows of {longest} tokens{by_default} are longer than the {context} that the base can read"
        raise RecipeError(what, where=where, do=f"set max_length: {context} or less")


def check_answers(longest: int, base: Mapping[str, Any], where: str) -> None:
    """Refuse answers that leave no room for a prompt in the context of a local base; `base` says where that is.

    Raises:
        RecipeError: says what it can read.
    """
    context = context_of(read_json(Path(base["path"]) / "config.json")) if "path" in base else None
    if context is not None and longest >= context:
        what = f"answers of {longest} tokens leave no room for a prompt in the {context} that the base can read"
        raise RecipeError(what, where=where, do=f"set max_new_tokens well below {context}")


def check_pairs(name: str, data: Mapping[str, Sequence[Row]], training: Training, where: str, notes: list[str]) -> None:
    """Refuse rows that method: dpo cannot learn from; note what method: sft makes of pairs.

    Raises:
        RecipeError: a row without rejected answer in a training by dpo; names it and its data set.
    """
    for source, rows in data.items():
        if training.method == "sft" and any(row.rejected is not None for row in rows):
            notes.append(f"{name}: of the pairs in the data set '{source}' the chosen answers are learnt (method: sft)")
        bare = next((row for row in rows if row.rejected is None), None)
        if training.method == "dpo" and bare is not None:
            raise RecipeError(
                f"method: dpo needs pairs, and row '{bare.id}' of the data set '{source}' has no rejected answer",
                where=where,
                do="use data with prompt, chosen and rejected, of an objective of its own, or set method: sft",
            )
