"""Commands on the store: whether what is in it is whole, and what of it is still wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.amounts import in_bytes
from mixmerge.cli.opened import plan_of
from mixmerge.cli.options import JsonOption, OutOption, SetOption, app
from mixmerge.cli.printing import bar, print_json, print_notes
from mixmerge.errors import MOST_NAMES, UserError
from mixmerge.run import DEFAULT_OUT

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
    from mixmerge.run.store import Store
    from mixmerge.run.verify import made_from, mend, verify_answers, verify_steps

    if (recipe is None) != whole:
        raise UserError("give a recipe, or --store for everything that is in --out", where="mixmerge verify")
    store = Store(out)
    folders, left = store.folders(), 0
    if recipe is not None:
        wanted = [step.id for step in plan_of(recipe, set_, out)[1].steps]
        left = sum(step not in folders for step in wanted)
        folders = {step: folders[step] for step in wanted if step in folders}
    elif not store.folder.is_dir():
        raise UserError("no store", where=str(store.folder), do="name the folder that was given to run as --out")
    found = verify_steps(folders, bar("verify"))
    doubtful = {step.step: step for step in made_from(found, store)}
    # what is damaged itself is told so
    found = [step if step.problems else doubtful.get(step.step, step) for step in found]
    found += [step for step in doubtful.values() if step.step not in folders]
    if mending:
        mend(found, store)
    damaged, old = [step for step in found if step.problems], sum(not step.hashed for step in found)
    in_doubt = sum(step.doubtful for step in damaged)
    answers = verify_answers(store.answers)
    wrong = answers is not None or any(not step.mended for step in damaged)
    if as_json:
        counts = {"whole": len(found) - len(damaged), "damaged": len(damaged) - in_doubt, "doubtful": in_doubt}
        counts |= {"not_done": left, "without_hashes": old}
        told = {"file": str(store.answers), "problem": answers} if store.answers.exists() else None
        print_json({"ok": not wrong, **counts, "answers": told, "steps": [step.to_json() for step in found]})
    else:
        for step in damaged:
            for problem in step.problems:
                print(f"{step.title}  {step.step}  {problem}")
            print(f"  to mend it: {step.mend}" if not step.mended else f"  {step.mend}")
        if answers is not None:
            print(f"{store.answers}: damaged: {answers}")
            print(
                "  to mend it: save what can be read with `sqlite3 FILE .recover`; removed, all is asked and paid anew"
            )
        rest = f", {in_doubt} made from these" * bool(in_doubt) + f", {left} not done" * bool(left)
        whole_ones = len(found) - len(damaged)
        print(f"{len(found)} finished steps: {whole_ones} whole, {len(damaged) - in_doubt} damaged{rest}")
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
