"""What a command is asked about: a recipe as it is now, or a study as it was run, which recipe and data no longer decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.printing import tell
from mixmerge.errors import MixmergeError, UserError

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan
    from mixmerge.recipe.load import LoadedRecipe
    from mixmerge.run.store import Store

StudyArg = Annotated[
    Path,
    typer.Argument(
        help="The recipe, or a study as it was run: its folder <out>/runs/<study>, or its plan.json.",
        metavar="RECIPE|STUDY",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Opened:
    """A plan with the store that has its steps; `run`: it is the plan of a study as it was run last."""

    plan: Plan
    store: Store
    run: bool


def plan_of(path: Path, overrides: list[str] | None, out: Path, *, sample: int = 0) -> tuple[LoadedRecipe, Plan]:
    """The recipe, read and checked, and its plan."""
    from mixmerge.hashes import cache_folder
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe

    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    for there in (nearest, *(place for place in (out / "store", out / "runs") if place.exists())):
        if not there.is_dir():
            raise UserError("a file, not a folder", where=f"--out {there}", do="give a folder, or remove the file")
    loaded = load_recipe(path, overrides or ())
    return loaded, build_plan(loaded, cache=cache_folder(), sample=sample)


def opened(place: Path, overrides: Sequence[str] | None, out: Path, asked: str, command: str) -> Opened:
    """What `place` means. Where the recipe cannot be planned, a study of its name that was run is pointed to first.

    `command` is what asks, and `asked` the step or candidate that it asks about.

    Raises:
        UserError: `--set` with a study that was run, or whatever is wrong with the recipe.
    """
    from mixmerge.run.plans import is_plan, plan_file, read_plan, root_of
    from mixmerge.run.store import Store

    if is_plan(place):
        file = plan_file(place)
        if overrides:
            raise UserError(
                "a study that was run has its settings", where="--set", do="leave it out, or name the recipe"
            )
        return Opened(read_plan(file), Store(root_of(file) or out), run=True)
    try:
        return Opened(plan_of(place, list(overrides or ()), out)[1], Store(out), run=False)
    except MixmergeError:
        point_to(earlier(place, overrides, out), asked, command)
        raise


def earlier(recipe: Path, overrides: Sequence[str] | None, out: Path) -> Path | None:
    """The folder of the recipe's study as it was run last; None where it was not, or where the recipe says no name."""
    from mixmerge.recipe.load import load_recipe
    from mixmerge.run.runner import Study

    try:
        study = Study(out, load_recipe(recipe, overrides or ()).recipe.name)
    except MixmergeError:
        return None
    return study.folder if study.plan_file.is_file() else None


def point_to_earlier(found: Opened, out: Path, asked: str, step_id: str, command: str) -> None:
    """Say where what was asked about is finished, if it is so only as the study was run last."""
    from mixmerge.run.plans import read_plan
    from mixmerge.run.runner import Study

    study = Study(out, found.plan.study)
    if found.run or found.store.find(step_id) is not None or not study.plan_file.is_file():
        return
    try:
        before = read_plan(study.plan_file)
        old = before.by_id[before.models[asked]] if asked in before.models else before.find(asked)
    except MixmergeError:
        return
    if found.store.find(old.id) is not None:
        point_to(study.folder, asked, command)


def point_to(folder: Path | None, asked: str, command: str) -> None:
    if folder is not None:
        tell(
            f"as the recipe and its data are now, {asked} is not made; as it was run last: mixmerge {command} {folder} {asked}"
        )
