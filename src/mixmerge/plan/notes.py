"""What a person may not expect of a recipe: defaults that nobody chose, programs and keys that are not here.

One idea: both are notes and no refusals. A default may be what is wanted, and a study may be checked on another machine than
the one that trains. No note is part of an identity.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from mixmerge.errors import RecipeError
from mixmerge.machine import this_machine
from mixmerge.plan.graph import Step
from mixmerge.recipe.evaluation import Served
from mixmerge.recipe.schema import How, Recipe, Training

MAIN = ("learning_rate", "batch_size", "max_length", "scheduler", "warmup_ratio", "precision")


def left_to_defaults(trainings: Mapping[str, tuple[Training, Step]]) -> Iterator[str]:
    """One note that names the main options which no training sets, with their values; none where all are set.

    Of each training the keys that it reads count. The learning rates of DPO and of adapters have notes of their own.
    """
    set_by_one, values = set[str](), dict[str, Any]()
    for training, step in trainings.values():
        read = step.what.get("settings", step.what)
        noted = step.what.get("engine") != "command" and (training.method != "sft" or training.adapter is not None)
        for key in MAIN:
            if key not in read:
                continue
            if key in training.model_fields_set and getattr(training, key) is not None:
                set_by_one.add(key)
            elif not (key == "learning_rate" and noted):
                values[key] = read[key]
    left = {key: values[key] for key in MAIN if key in values and key not in set_by_one}
    if left:
        yield f"trainings left to defaults: {', '.join(f'{key} {_short(value)}' for key, value in left.items())}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def missing_programs(trainings: Mapping[str, tuple[Training, Step]], how: How, where: str) -> Iterator[str]:
    """A note for each program that a training is to start, by itself or by `how.launcher`, and that is not here.

    Raises:
        RecipeError: a launcher whose quotes do not close; `where` it stands.
    """
    try:
        launcher = shlex.split(how.launcher)
    except ValueError as error:
        what = f"the launcher cannot be read: {str(error).lower()}"
        raise RecipeError(what, where=where, do="close its quotes") from error
    named: dict[str, str] = {}
    for name, (training, step) in trainings.items():
        words = shlex.split(training.command or "") if step.what.get("engine") == "command" else []
        if launcher and ("{launcher}" in words or (not words and how.nodes > 1)):
            named.setdefault("how.launcher", launcher[0])
        own = next((word for word in words if word != "{launcher}"), "{}")
        if "{" not in own and not (launcher and words[0] == "{launcher}"):  # what a launcher starts, it finds by itself
            named[name] = own
    for who, program in named.items():
        if shutil.which(program) is None:
            yield f"{who}: no program '{program}' is found on this machine"


def too_few_gpus(how: How) -> Iterator[str]:
    """A note where trainings are to run on GPUs, one a process, and this machine has fewer; with none it takes its cores if it may."""
    if how.device == "cpu" or (how.processes == 1 and how.device == "auto"):
        return
    found = len(this_machine().gpus)
    if found == 0 and how.device == "cuda":
        yield "how.device: cuda, and this machine has no GPU; here trainings would end at once"
    elif 0 < found < how.processes:
        few = f"how.processes: {how.processes} processes share a training, and this machine has {found} GPU{'s' * (found > 1)}"
        yield f"{few}; here it would end at once, since each process needs one"


def missing_keys(recipe: Recipe) -> Iterator[str]:
    """A note for each environment variable that is to hold a server's key and does not, on this machine."""
    servers: dict[str, Served] = {f"judges.endpoints.{n}": judge for n, judge in recipe.judges.endpoints.items()}
    if recipe.evaluation.server is not None:
        servers["evaluation.server"] = recipe.evaluation.server
    for who, server in servers.items():
        if server.key is not None and not os.environ.get(server.key, "").strip():
            yield f"{who}: the environment variable {server.key} holds no key on this machine"
