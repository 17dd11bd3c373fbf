"""Commands on the store: whether what is in it is whole, and what of it is still wanted."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.amounts import in_bytes
from mixmerge.cli.opened import plan_of
from mixmerge.cli.options import JsonOption, OutOption, SetOption, app
from mixmerge.cli.printing import bar, print_json, print_notes
from mixmerge.errors import MOST_NAMES, CheckpointError, UserError
from mixmerge.run import DEFAULT_OUT
from mixmerge.terminal import visible

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan


@app.command()
def verify(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe whose finished steps are read.", show_default=False)
    ] = None,
    whole: Annotated[bool, typer.Option("--store", help="Read every step of the store, of whatever study.")] = False,
    mending: Annotated[
        bool,
        typer.Option(
            "--mend", help="Remove damaged steps and what was made from them, so that the next run makes them again."
        ),
    ] = False,
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Read every file of finished steps and say what is not as its record says; exit status 1 where anything is."""
    from mixmerge.run.doubt import made_from, mend, stamps_of
    from mixmerge.run.plans import read_plan
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store
    from mixmerge.run.verify import verify_answers, verify_steps

    if (recipe is None) != whole:
        raise UserError("give a recipe, or --store for everything that is in --out", where="mixmerge verify")
    if whole and set_:
        raise UserError("--set goes with a recipe, and --store reads what is there", where="mixmerge verify")
    store = Store(out)
    folders, left = store.folders(), 0
    plans: list[Plan] = []
    if recipe is not None:
        plan = plan_of(recipe, set_, out)[1]
        left = sum(step.id not in folders for step in plan.steps)
        wanted = dict.fromkeys(plan.by_id)
        plans.append(plan)
        with suppress(CheckpointError):  # as it was run last: what it was made of may have changed since
            wanted |= dict.fromkeys(read_plan(Study(out, plan.study).plan_file).by_id)
        folders = {step: folders[step] for step in wanted if step in folders}
    elif not store.folder.is_dir():
        raise UserError("no store", where=str(store.folder), do="name the folder that was given to run as --out")
    stamps = stamps_of(store)
    found = verify_steps(folders, bar("verify"))
    damaged = [step for step in found if step.problems]
    doubtful = made_from(found, store, plans)
    read = {step.step for step in doubtful if not step.partial}
    found = [step for step in found if step.step not in read] + doubtful
    if mending and store.folder.is_dir():
        mend(found, store, stamps)
    finished, begun = sum(not step.partial for step in found), sum(step.partial for step in found)
    old = sum(not step.hashed for step in found)
    whole_ones = sum(not step.problems for step in found)
    answers = verify_answers(store.answers, mending=mending)
    wrong = (answers is not None and not answers.mended) or any(step.problems and not step.mended for step in found)
    if as_json:
        counts = {"whole": whole_ones, "damaged": len(damaged), "doubtful": len(doubtful)}
        counts |= {"not_done": left, "without_hashes": old}
        damage = {"problem": None} if answers is None else answers._asdict()
        told = {"file": str(store.answers), **damage} if store.answers.exists() else None
        print_json({"ok": not wrong, **counts, "answers": told, "steps": [step.to_json() for step in found]})
    else:
        for step in [*damaged, *doubtful]:
            for problem in step.problems:
                print(visible(f"{step.title}  {step.step}  {problem}"))
            print(visible(f"  to mend it: {step.mend}" if not step.mended else f"  {step.mend}"))
        if answers is not None:
            print(visible(f"{store.answers}: damaged: {answers.problem}"))
            print(visible(f"  to mend it: {answers.mend}" if not answers.mended else f"  {answers.mend}"))
        rest = f", {len(doubtful) - begun} made from these" * bool(doubtful) + f", {left} not done" * bool(left)
        rest += f"; {begun} unfinished begun from these" * bool(begun)
        print(f"{finished} finished steps: {whole_ones} whole, {len(damaged)} damaged{rest}")
        if old:
            names = ", ".join([step.title for step in found if not step.hashed][:MOST_NAMES]) + ", ..." * (
                old > MOST_NAMES
            )
            print(
                f"made by an older mixmerge, which kept no hashes, so only names and sizes were compared: {names} ({old} in all)"
            )
    if wrong:
        raise typer.Exit(1)


@app.command()
def gc(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            help="Recipes to keep, or folders of studies (runs/NAME).", metavar="RECIPE...", show_default=False
        ),
    ],
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, it is only said.")] = False,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Say what of the store none of the recipes reaches, with sizes; --delete removes it."""
    from mixmerge.run.gc import remove, unreached
    from mixmerge.run.store import Store

    plans = [any_plan(path, out) for path in recipes]
    store = Store(out)
    garbage = unreached(store, plans)
    if delete:
        remove(garbage, store)
    gone = [entry for entry in garbage.found if entry.removed or not delete]
    freed = sum(entry.bytes for entry in gone)
    if as_json:
        found = [
            {
                "kind": e.kind,
                "step": e.title,
                "id": e.step,
                "folder": str(e.folder),
                "bytes": e.bytes,
                "removed": e.removed,
            }
            for e in garbage.found
        ]
        print_json({"deleted": delete, "bytes": freed, "unreached": found, "kept": garbage.kept})
        return
    print_notes({"notes": garbage.kept})
    for entry in gone:
        print(f"{entry.title}  {entry.step}  {in_bytes(entry.bytes)}")
    steps = sum(entry.kind == "step" for entry in gone)
    told = f"{steps} finished steps and {len(gone) - steps} other folders, {in_bytes(freed)}"
    print(
        f"removed: {told}"
        if delete
        else f"reached by none of these recipes: {told}" + "; --delete removes them" * bool(gone)
    )


def any_plan(path: Path, out: Path) -> Plan:
    """The plan that a recipe, a study's folder or a plan file means."""
    from mixmerge.run.plans import is_plan, plan_file, read_plan

    return read_plan(plan_file(path)) if is_plan(path) else plan_of(path, None, out)[1]
