"""Running a plan: the store that keeps finished steps, the queue, and the process that carries out a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmerge.callable import make_callable

DEFAULT_OUT = Path("mixmerge-out")


def run(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    out: Path | str = DEFAULT_OUT,
    backend: str = "local",
    address: str | None = None,
) -> dict[str, Any]:
    """Carry out the study of a recipe file and return its scores; finished steps are not done again.

    `backend`: local, or ray with the `address` of a cluster (none: one is started on this machine).

    Raises:
        UserError: whatever is wrong with the recipe, its data or its prompts.
        StepError: a step failed; what was finished is kept.
    """
    from mixmerge.hashes import cache_folder
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe
    from mixmerge.run.backends import backend_for
    from mixmerge.run.progress import Progress
    from mixmerge.run.runner import run_plan

    loaded = load_recipe(recipe, overrides)
    plan, how = build_plan(loaded, cache=cache_folder()), loaded.recipe.how
    progress = Progress()
    with backend_for(backend, plan, Path(out), address=address, jobs=how.jobs, threads=how.threads) as place:
        try:
            run_plan(plan, Path(out), jobs=how.jobs, threads=how.threads, progress=progress, backend=place).check()
        finally:
            progress.stop()
    return results(recipe, overrides, out=out)


def results(recipe: Path | str, overrides: Sequence[str] = (), *, out: Path | str = DEFAULT_OUT) -> dict[str, Any]:
    """The scores of a finished study.

    Raises:
        UserError: the study is not finished.
    """
    from mixmerge.hashes import cache_folder
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store

    plan = build_plan(load_recipe(recipe, overrides), cache=cache_folder())
    return Study(Path(out), plan.study).scores(plan, Store(Path(out)))


make_callable(__name__)
