"""Commands on judges and their verdicts: score again what was judged, and measure a judge against labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.opened import plan_of
from mixmerge.cli.options import JsonOption, OutOption, RecipeArg, SetOption, app
from mixmerge.cli.printing import bar, print_json, print_notes, print_table, tell
from mixmerge.cli.running import report_failures, shown_progress
from mixmerge.cli.study import print_result
from mixmerge.errors import UserError, did_you_mean
from mixmerge.run import DEFAULT_OUT

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan

CALIBRATION = Path("calibration.json")
SCORED = ("score", "report")


@app.command()
def score(recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False) -> None:
    """Score the stored verdicts again and write the report: seconds; nothing is trained, asked or judged."""
    from mixmerge.run.readable import check_readable
    from mixmerge.run.runner import Study, run_plan
    from mixmerge.run.store import Store

    _, plan = plan_of(recipe, set_, out)
    store = Store(out)
    needed = {i for step in plan.steps if step.kind in SCORED for i in step.inputs.values()}
    missing = [s for s in plan.steps if s.id in needed and s.kind not in SCORED and store.find(s.id) is None]
    if missing:
        damage = store.damage(missing[0].id)
        what = f"{len(missing)} step(s) not done, {missing[0].title} the first of them"
        what += f" (damaged: {damage})" if damage else ""
        raise UserError(what, where=str(recipe), do="mixmerge run RECIPE")
    check_readable(plan, store)
    with shown_progress() as progress:
        outcome = run_plan(plan, out, jobs=1, threads=None, progress=progress, kinds=SCORED)
    study = Study(out, plan.study)
    report_failures(outcome, plan, study)
    print_result(study.scores(plan, Store(out)), study.report, as_json=as_json)


@app.command()
def calibrate(
    recipe: RecipeArg,
    judge: Annotated[str, typer.Argument(help="refusal, quality, language, or JUDGE.QUESTION.", show_default=False)],
    rows: Annotated[str, typer.Argument(help="A file of labelled rows; {lang} stands for a code.", show_default=False)],
    to: Annotated[
        Path, typer.Option("--to", help="The file to write, for `calibration:` in the recipe.")
    ] = CALIBRATION,
    columns: Annotated[
        str, typer.Option("--columns", help="Our column = the file's, e.g. response=answer,label=refusal.")
    ] = "",
    labels: Annotated[str, typer.Option("--labels", help="The file's label = ours, e.g. 1=refused,0=complied.")] = "",
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure a judge of the recipe against labelled rows, by language, for the correction of its rates."""
    from mixmerge.evaluate.calibrate import calibrate as measure
    from mixmerge.evaluate.calibrate import table, write_calibration
    from mixmerge.evaluate.labelled import read_labelled
    from mixmerge.run.judges import ready_judge

    if to.is_dir() or not to.absolute().parent.is_dir():
        raise UserError(
            "not a file in a folder that is there", where=f"--to {to}", do="name one, e.g. calibration.json"
        )
    loaded, plan = plan_of(recipe, set_, out)
    question, columns_map, labels_map = (
        question_of(plan, judge),
        pairs_of("--columns", columns),
        pairs_of("--labels", labels),
    )
    languages = list(loaded.recipe.languages)
    asked = languages if "{lang}" in rows else None
    everything = read_labelled(rows, question=question, languages=asked, columns=columns_map, labels=labels_map)
    labelled = [row for row in everything if row.item.prompt.lang in languages]
    there = {row.item.prompt.lang for row in labelled}
    notes = [f"no labelled rows in {code}: rates there are not corrected" for code in languages if code not in there]
    if len({row.label for row in labelled}) == 1:
        notes.append(f"every row is labelled {labelled[0].label}: of the other errors nothing is learnt")
    if len(everything) > len(labelled):
        notes.append(f"{len(everything) - len(labelled)} rows in other languages are passed over")
    print_notes({"notes": notes})
    statistics = loaded.recipe.statistics
    with ready_judge(plan, out, judge, tell) as instrument:
        found = measure(
            instrument,
            labelled,
            level=statistics.level,
            draws=statistics.draws,
            seed=loaded.recipe.seed,
            progress=bar("calibrate"),
        )
    write_calibration(found, to)
    if as_json:
        print_json(found)
        return
    print_table(*table(found))
    print(f"{judge} on {len(labelled):,} labelled rows: {to}")


def question_of(plan: Plan, judge: str) -> str:
    """The question that a judge of the plan answers.

    Raises:
        UserError: a judge that the plan does not have.
    """
    from mixmerge.run.judges import judge_steps

    steps = judge_steps(plan)
    if judge not in steps:
        raise UserError(f"no judge '{judge}' in this study", do=did_you_mean(judge, steps))
    return str(steps[judge].what.get("question", steps[judge].what["judge"]))


def pairs_of(option: str, text: str) -> dict[str, str]:
    """`a=b,c=d` as a mapping.

    Raises:
        UserError: a part without `=`.
    """
    pairs = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UserError(f"'{part}' is not NAME=VALUE", where=option)
        pairs[key.strip()] = value.strip()
    return pairs
