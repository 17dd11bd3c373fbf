"""What a person may not expect of the trainings of a recipe: programs that are not here.

One idea: these are notes and no refusals, since a study may be checked on another machine than the one that trains. No note is
part of an identity.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping

from mixmerge.errors import RecipeError
from mixmerge.plan.graph import Step
from mixmerge.recipe.schema import How, Training


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
