"""Commands on a recipe: write it, check it, plan it, run it, look into it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.cli.opened import StudyArg, opened, plan_of, point_to_earlier
from mixmerge.cli.options import JsonOption, OutOption, RecipeArg, SetOption, app
from mixmerge.cli.printing import print_fields, print_json, print_notes, print_provenance, print_rows, print_table
from mixmerge.cli.running import report_failures, shown_progress
from mixmerge.errors import UserError, did_you_mean
from mixmerge.run import DEFAULT_OUT
from mixmerge.terminal import visible
from mixmerge.whole import write_whole

if TYPE_CHECKING:
    from mixmerge.plan.graph import Step
    from mixmerge.run.example import Example
    from mixmerge.run.store import Store

RECIPES = ("quickstart", "paper-objectives", "paper-languages", "paper-study")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    like: Annotated[str, typer.Option("--like", help=f"Start from one of: {', '.join(RECIPES)}.")] = "quickstart",
) -> None:
    """Write a recipe that is commented line by line."""
    if like not in RECIPES:
        raise UserError(f"no recipe '{like}'", where="--like", do=did_you_mean(like, RECIPES))
    if path.exists():
        raise UserError("the file is there already", where=str(path), do="give another name")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent}", where=str(path), do="make it first")
    write_whole(path, recipe_file(like).read_text(encoding="utf-8"))
    print(f"wrote {path}\nnext: mixmerge check {path}")


@app.command()
def check(recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False) -> None:
    """Find every mistake that can be found before anything heavy starts."""
    from mixmerge.data.loading import SAMPLE

    loaded, plan = plan_of(recipe, set_, out, sample=SAMPLE)
    if as_json:
        data = {name: account.to_json() for name, account in plan.accounts.items()}
        found = {"study": plan.study, "steps": len(plan.steps), "dropped": plan.to_json()["dropped"], "ok": True}
        print_json({"recipe": str(recipe), "data": data, "notes": list(plan.notes)} | found)
        return
    from mixmerge.data.words import account_line

    print_notes({"notes": plan.notes})
    for name, account in plan.accounts.items():
        print(account_line(name, account))
    kinds = list(loaded.recipe.candidates().values())
    counts = ", ".join(
        f"{n} {kind}{'s' * (n > 1)}" for kind in ("expert", "baseline", "merge") if (n := kinds.count(kind))
    )
    print(f"{recipe}: ok; {counts}, {len(loaded.recipe.languages)} languages, {len(plan.steps)} steps")
    for name, dropped in plan.dropped.items():
        from mixmerge.data.overlap import in_words

        print(f"{name}: rows left out because they are also prompts: {in_words(dropped)}")


@app.command("plan")
def plan_(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    why: Annotated[bool, typer.Option("--why", help="Say for each step to run which field or input changed.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the steps as a Mermaid flowchart.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the steps, what is already there, what will run and why, and what it will take."""
    from mixmerge.cli.planning import plan_json, plan_lines
    from mixmerge.plan.explain import explain
    from mixmerge.plan.mermaid import mermaid
    from mixmerge.run.history import History
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store

    if graph and as_json:
        raise UserError("--graph and --json print two different things", where="plan", do="give one of them")
    _, plan = plan_of(recipe, set_, out)
    history = History(Store(out), Study(out, plan.study).events)
    explained = explain(plan, history)
    if graph:
        print(mermaid(explained, plan.models), end="")
        return
    if as_json:
        print_rows(plan_json(plan, explained, history, out), "steps")
        return
    print_notes({"notes": plan.notes})
    for line in plan_lines(plan, explained, history, out, whole=why):
        print(line)


@app.command()
def run(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Steps at once; default: the recipe's.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="GLOB", help="Just the steps so called (train/*) and what they need; may be repeated."
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Go on where a base or a mixture shows that the recipe has to change, with all that does not need it.",
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="Where steps run: local, or ray (pip install 'mixmerge[ray]').")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of a Ray cluster: host:port, or auto; without it one is started here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out the study; the same command again carries on where it stopped."""
    from mixmerge.run.backends import backend_for, checked
    from mixmerge.run.runner import Study, run_plan
    from mixmerge.run.schedule import chosen, matching
    from mixmerge.run.store import Store

    checked(backend, address)
    loaded, plan = plan_of(recipe, set_, out)
    if only:
        chosen(plan, only)  # before a cluster is asked
    jobs, threads = jobs or loaded.recipe.how.jobs, loaded.recipe.how.threads
    with (
        shown_progress() as progress,
        backend_for(backend, plan, out, address=address, jobs=jobs, threads=threads) as place,
    ):
        outcome = run_plan(
            plan,
            out,
            jobs=jobs,
            threads=threads,
            progress=progress,
            only=only or (),
            keep_going=keep_going,
            backend=place,
        )
    study = Study(out, plan.study)
    report_failures(outcome, plan, study)
    if only:
        print_chosen(matching(plan, only), Store(out), as_json=as_json)
        return
    scores = study.scores(plan, Store(out))
    print_result(scores, study.report, as_json=as_json)


@app.command()
def step(
    recipe: RecipeArg,
    name: Annotated[
        str,
        typer.Argument(
            metavar="STEP", help="kind/name as `plan` prints it, or the id, or its first four characters or more."
        ),
    ],
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Carry out one step whose inputs are done: all that another launcher (SLURM, a Makefile) needs."""
    from mixmerge.run.runner import Study, run_step
    from mixmerge.run.store import Store

    loaded, plan = plan_of(recipe, set_, out)
    found = plan.find(name)
    with shown_progress() as progress:
        outcome = run_step(plan, found, out, threads=loaded.recipe.how.threads, progress=progress)
    report_failures(outcome, plan, Study(out, plan.study))
    print_chosen([found], Store(out), as_json=as_json)


@app.command()
def status(
    recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False
) -> None:
    """Say how far the study is, and what is running now."""
    from mixmerge.plan.explain import explain
    from mixmerge.run.history import History
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store, holder_words

    _, plan = plan_of(recipe, set_, out)
    store = Store(out)
    explained = explain(plan, History(store, Study(out, plan.study).events))
    failed = {
        entry.step.title: entry.failed for entry in explained if entry.failed is not None and entry.state != "running"
    }
    states = ("done", "running", "interrupted")
    counts = {s: sum(entry.state == s and entry.step.title not in failed for entry in explained) for s in states}
    counts |= {"failed": len(failed)}
    counts["to run"] = len(explained) - sum(counts.values())
    running = [entry.step for entry in explained if entry.state == "running"]
    if as_json:
        told = {"study": plan.study, "counts": counts, "running": [step.title for step in running], "failed": failed}
        print_json(told)
        return
    print(f"{plan.study}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for step in running:
        print(visible(f"running: {step.title} by {holder_words(store.running(step) or {})}"))
    for title, error in failed.items():
        print(visible(f"failed: {title}: {error}"))


@app.command()
def show(
    recipe: StudyArg,
    step: Annotated[
        str, typer.Argument(help="kind/name as `plan` prints it, or the id, or its first four characters or more.")
    ],
    set_: SetOption = None,
    example: Annotated[
        int | None,
        typer.Option("--example", min=1, help="Of a mixture or a training: the row to show as the model learns it."),
    ] = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Show one step: what it is made of, what it measured, where its files are; of mixtures and trainings, an example."""
    from mixmerge.cli.planning import reasons
    from mixmerge.data.account import Account
    from mixmerge.data.words import account_line
    from mixmerge.plan.explain import explain
    from mixmerge.run.example import step_example
    from mixmerge.run.history import History
    from mixmerge.run.runner import Study

    asked = opened(recipe, set_, out, step, "show")
    plan, store = asked.plan, asked.store
    found = plan.find(step)
    point_to_earlier(asked, out, step, found.id, "show")
    folder, log = store.find(found.id), Study(store.root, plan.study).log(found)
    record = store.record(found.id) if folder else None
    has_rows = found.kind in ("mixture", "train")
    if example is not None and not has_rows:
        what, do = f"{found.title} is no mixture and no training", "name one, as in mixture/NAME"
        raise UserError(what, where="--example", do=do)
    shown = step_example(plan, found, store, example or 1) if has_rows else None
    told: dict[str, Any] = {"state": "done"}
    state = "done"
    if folder is None:
        history = History(store, Study(store.root, plan.study).events)
        entry = next(entry for entry in explain(plan, history) if entry.step is found)
        state, told = (
            f"not done, {entry.state}: {'; '.join(reasons(entry, whole=True))}".removesuffix(": "),
            entry.to_json(),
        )
    if as_json:
        rest = {"example": asdict(shown) if shown else None} if has_rows else {}
        print_json(found.to_json() | told | {"folder": str(folder) if folder else None, "record": record} | rest)
        return
    print(visible(f"{found.title}  {found.id}  {state}"))
    for title, fields in (("what", found.what), ("how", found.how)):
        print_fields(title, fields)
    print_fields("inputs", {role: plan.by_id[i].title + f"  {i}" for role, i in found.inputs.items()})
    if record and folder:
        measured = dict(record.get("measurements", {}))
        accounts = measured.pop("data", {}) if found.kind == "mixture" else {}
        print_fields("measured", measured)
        for name, account in accounts.items():
            print(visible(account_line(name, Account.from_json(account))))
        print_provenance(record.get("provenance", {}))
        print_fields(
            "files", {name: f"{size:,} bytes" + hash_of(record, name) for name, size in record.get("files", {}).items()}
        )
        print(visible(f"folder: {folder}"))
    if log.exists():
        print(visible(f"log: {log}"))
    if shown is not None:
        _print_example(shown)
    elif has_rows:
        print("example: the mixture is not drawn yet; mixmerge run RECIPE draws it")


def _print_example(example: Example) -> None:
    """What is learned stands in colour on a terminal, and in ⟦ ⟧ elsewhere."""
    read, learned = (example.tokens(trained=trained) for trained in (False, True))
    cut = f", cut at max_length {example.max_length}" if example.truncated else ""
    by = "" if example.training is None or example.own_marks else f" by {example.training}"
    print(f"example: row {example.row}, {visible(example.id)}: {read} tokens read, {learned} tokens learned{by}{cut}")
    if example.origin is None:
        print("where it comes from was not recorded: an older mixmerge drew it")
    else:
        place = f"data set {example.origin['data']}, {example.origin['file']}:{example.origin['row']}"
        turn = example.origin["turn"]
        print(f"it comes from {visible(place)}" + (f", drawn once more ({turn + 1})" if turn else ""))
    if example.own_marks:
        print(f"the last answer is marked; what {example.training} learns of it is its command's choice")
    if not example.parts:
        print(f"nothing of its answer is left at max_length {example.max_length}, so it is not trained on")
    opening, closing = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    for part in example.parts:
        text = visible(part.text, keep="\n\t")
        print(f"{opening}{text}{closing}" if part.trained else text, end="")
    print()
    if example.rejected is not None:
        text = visible(example.rejected.text, keep="\n\t")
        print(f"rejected answer, {example.rejected.tokens} tokens:\n{opening}{text}{closing}")


@app.command()
def report(
    recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False
) -> None:
    """Print the result table of a finished study and where its report is."""
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store

    _, plan = plan_of(recipe, set_, out)
    store, study = Store(out), Study(out, plan.study)
    scores = study.scores(plan, store)
    study.link(plan, store)
    print_result(scores, study.report, as_json=as_json)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from mixmerge.recipe.reference import recipe_reference, recipe_schema

    if markdown:
        print(recipe_reference(), end="")
    else:
        print_json(recipe_schema())


@app.command()
def adopt(
    name: Annotated[str, typer.Argument(help="What the recipe calls it.", show_default=False)],
    place: Annotated[str, typer.Argument(help="Folder or Hub id of a model or adapter.", show_default=False)],
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe that it is added to.")] = Path("recipe.yaml"),
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the Hub id.")] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="The candidate it was trained from; default: base.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add a model or an adapter that was trained elsewhere to a recipe, as an expert."""
    from mixmerge.model.adopt import check_adopted, is_adapter
    from mixmerge.recipe.adopt import adopt_into, is_local

    if (folder := Path(place).expanduser()).is_dir():
        check_adopted(folder)
    line, left = adopt_into(recipe, name, place, revision=revision, start=start)
    taken = f"no folder {place} is here, so it is taken for a Hub id; a local folder is written ./{place}"
    notes = [] if is_local(place) else [taken]
    if as_json:
        found = {"recipe": str(recipe), "name": name, "line": line, "left": None if left is None else str(left)}
        print_json(found | {"notes": notes})
        return
    print_notes({"notes": notes})
    kind = "" if not folder.is_dir() else " (an adapter)" if is_adapter(folder) else " (a whole model)"
    print(f"{recipe}: adopted.{line}{kind}\nnext: " + (f"mixmerge check {recipe}" if left is None else f"mend {left}"))


def recipe_file(name: str) -> Path:
    """A recipe that comes with mixmerge: inside the wheel, or beside `src` in a checkout."""
    here = Path(__file__).resolve()
    folders = (here.parents[1] / "recipes", here.parents[3] / "recipes")
    return next(path for folder in folders if (path := folder / f"{name}.yaml").is_file())


def print_chosen(steps: Iterable[Step], store: Store, *, as_json: bool) -> None:
    """Where the steps that were asked for are."""
    found = {step.title: str(store.path(step.id)) for step in steps}
    if as_json:
        print_json({"steps": found})
        return
    print_table(("Step", "Folder"), found.items())


def hash_of(record: Mapping[str, Any], name: str) -> str:
    """The beginning of a file's sha256, as a record has it; older ones have none."""
    found = record.get("sha256", {}).get(name)
    return "" if found is None else f", sha256 {found[:16]}"


def print_result(scores: dict[str, Any], page: Path, *, as_json: bool) -> None:
    """The result table, the answer, and where the report is; on standard error, what is missing behind them."""
    from mixmerge.report.findings import warnings

    if missing := warnings(scores):
        print(f"warning: {' '.join(missing)}", file=sys.stderr)
    if as_json:
        print_json({"report": str(page), "scores": scores})
        return
    from mixmerge.report.tables import benchmark_tables, result_headers, result_table

    print_table(result_headers(scores), result_table(scores), between=1)
    for heads, rows in benchmark_tables(scores):
        print_table(heads, rows, between=1)
    print(scores["answer"]["sentence"])
    print(f"report: {page}")
