"""The command line: the only place that prints answers and picks exit codes.

Answers go to stdout, progress and errors to stderr. Exit 0: done; 1: something failed, what was finished is kept;
2: a mistake in what was given, nothing was started; 70: a bug, with its traceback. Commands import what they need.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.errors import MixmergeError, UserError, did_you_mean
from mixmerge.run import DEFAULT_OUT
from mixmerge.terminal import visible

if TYPE_CHECKING:
    from mixmerge.plan.graph import Plan
    from mixmerge.recipe.load import LoadedRecipe
    from mixmerge.run.example import Example

app = typer.Typer(
    help="Mix the data or merge the models? One recipe in; the models, the evidence and a recommendation out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArg = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe, e.g. --set merges.ties.parameters.density=0.7."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for everything: store/ and runs/<study>/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RECIPES = ("quickstart", "paper-objectives", "paper-languages")


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
    path.write_text(recipe_file(like).read_text(encoding="utf-8"), encoding="utf-8")
    print(f"wrote {path}\nnext: mixmerge check {path}")


@app.command()
def check(recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False) -> None:
    """Find every mistake that can be found before anything heavy starts."""
    from mixmerge.data.loading import SAMPLE

    loaded, plan = _plan(recipe, set_, out, sample=SAMPLE)
    if as_json:
        data = {name: account.to_json() for name, account in plan.accounts.items()}
        found = {"study": plan.study, "steps": len(plan.steps), "dropped": plan.to_json()["dropped"], "ok": True}
        _print_json({"recipe": str(recipe), "data": data, "notes": list(plan.notes)} | found)
        return
    from mixmerge.data.words import account_line

    _print_notes({"notes": plan.notes})
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
    as_json: JsonOption = False,
) -> None:
    """Print the steps, what is already there, and what will run and why."""
    from mixmerge.plan.explain import explain
    from mixmerge.plan.memory import memory_lines, plan_memory
    from mixmerge.run.store import Store

    _, plan = _plan(recipe, set_, out)
    store = Store(out)
    explained = explain(plan, store)
    left = {entry.step.id for entry in explained if entry.state != "done"}
    memory = {step: need for step, need in plan_memory(plan, store.find).items() if step in left}
    if as_json:
        states = [
            entry.step.to_json()
            | {"state": entry.state, "why": list(entry.why)}
            | ({"memory_bytes": asdict(memory[entry.step.id])} if entry.step.id in memory else {})
            for entry in explained
        ]
        _print_json({"study": plan.study, "notes": list(plan.notes), "steps": states})
        return
    _print_notes({"notes": plan.notes})
    width = max(len(entry.step.title) for entry in explained)
    for entry in explained:
        reasons = "" if not entry.why else "; ".join(entry.why) if why else _brief(entry.why)
        print(f"{entry.step.id}  {entry.step.title:<{width}}  {entry.state:<11}  {reasons}".rstrip())
    for step in plan.steps:
        if rule := step.how.get("budget_rule"):
            print(f"budget of {step.name}: {step.what['budget']:,} {step.what['unit']}, {rule}")
    for line in memory_lines(plan, memory):
        print(line)
    print(f"{len(explained)} steps: {len(explained) - len(left)} done, {len(left)} to run")


@app.command()
def run(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Steps at once; default: the recipe's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out the study; the same command again carries on where it stopped."""
    from mixmerge.run.progress import Progress
    from mixmerge.run.runner import Study, run_plan
    from mixmerge.run.store import Store

    loaded, plan = _plan(recipe, set_, out)
    how = loaded.recipe.how
    progress = Progress()
    try:
        outcome = run_plan(plan, out, jobs=jobs or how.jobs, threads=how.threads, progress=progress)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to carry on", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        progress.stop()
    study = Study(out, plan.study)
    if outcome.failed:
        for step_id, error in outcome.failed.items():
            step = plan.by_id[step_id]
            print(f"error: {step.title}: {error} (log: {study.log(step)})", file=sys.stderr)
        outcome.check()
    scores = study.scores(plan, Store(out))
    _print_result(scores, study.report, as_json=as_json)


@app.command()
def status(
    recipe: RecipeArg, set_: SetOption = None, out: OutOption = DEFAULT_OUT, as_json: JsonOption = False
) -> None:
    """Say how far the study is, and what is running now."""
    from mixmerge.plan.explain import explain
    from mixmerge.run.store import Store

    _, plan = _plan(recipe, set_, out)
    store = Store(out)
    explained = explain(plan, store)
    states = ("done", "running", "interrupted", "to run")
    counts = {state: sum(entry.state == state for entry in explained) for state in states}
    running = [entry.step for entry in explained if entry.state == "running"]
    if as_json:
        _print_json({"study": plan.study, "counts": counts, "running": [step.title for step in running]})
        return
    print(f"{plan.study}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for step in running:
        owner = store.running(step) or {}
        print(f"running: {step.title} on {owner.get('host')} (process {owner.get('pid')})")


@app.command()
def show(
    recipe: RecipeArg,
    step: Annotated[str, typer.Argument(help="kind/name as `plan` prints it, or the beginning of the id.")],
    set_: SetOption = None,
    example: Annotated[
        int | None,
        typer.Option("--example", min=1, help="Of a mixture or a training: the row to show as the model learns it."),
    ] = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Show one step: what it is made of, what it measured, where its files are; of mixtures and trainings, an example."""
    from mixmerge.data.account import Account
    from mixmerge.data.words import account_line
    from mixmerge.run.example import step_example
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store

    _, plan = _plan(recipe, set_, out)
    found, store = plan.find(step), Store(out)
    folder, log = store.find(found.id), Study(out, plan.study).log(found)
    record = store.record(found.id) if folder else None
    has_rows = found.kind in ("mixture", "train")
    if example is not None and not has_rows:
        what, do = f"{found.title} is no mixture and no training", "name one, as in mixture/NAME"
        raise UserError(what, where="--example", do=do)
    shown = step_example(plan, found, store, example or 1) if has_rows else None
    if as_json:
        rest = {"example": asdict(shown) if shown else None} if has_rows else {}
        _print_json(found.to_json() | {"folder": str(folder) if folder else None, "record": record} | rest)
        return
    print(f"{found.title}  {found.id}  {'done' if folder else 'not done'}")
    for title, fields in (("what", found.what), ("how", found.how)):
        _print_fields(title, fields)
    _print_fields("inputs", {role: plan.by_id[i].title + f"  {i}" for role, i in found.inputs.items()})
    if record and folder:
        measured = dict(record["measurements"])
        accounts = measured.pop("data", {}) if found.kind == "mixture" else {}
        _print_fields("measured", measured)
        for name, account in accounts.items():
            print(account_line(name, Account.from_json(account)))
        _print_fields("provenance", record["provenance"])
        _print_fields("files", {name: f"{size:,} bytes" for name, size in record["files"].items()})
        print(f"folder: {folder}")
    if log.exists():
        print(f"log: {log}")
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

    _, plan = _plan(recipe, set_, out)
    store, study = Store(out), Study(out, plan.study)
    scores = study.scores(plan, store)
    study.link(plan, store)
    _print_result(scores, study.report, as_json=as_json)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from mixmerge.recipe.reference import recipe_reference, recipe_schema

    if markdown:
        print(recipe_reference(), end="")
    else:
        _print_json(recipe_schema())


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
        _print_json(found | {"notes": notes})
        return
    _print_notes({"notes": notes})
    kind = "" if not folder.is_dir() else " (an adapter)" if is_adapter(folder) else " (a whole model)"
    print(f"{recipe}: adopted.{line}{kind}\nnext: " + (f"mixmerge check {recipe}" if left is None else f"mend {left}"))


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML; with --verify a merged model.", show_default=False)],
    out: Annotated[
        Path | None, typer.Argument(help="Folder of the merged model; must not be there.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, say what would be read and written, write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute a merged model again and compare; write nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: the cores given.")] = None,
    pickle: Annotated[
        bool, typer.Option("--pickle", help="Read pickled weights (.bin) too, where there are no others; tensors only.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="Where blocks are worked on: cpu, or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Merge models as a mergekit YAML says, without a recipe."""
    from mixmerge.merge import load_config, words
    from mixmerge.merge import merge as merge_models
    from mixmerge.merge import rehearse as rehearse_merge
    from mixmerge.merge import verify as verify_merge
    from mixmerge.merge.writer import refuse_existing

    _say_when_compiling()
    if verify:
        if out is not None or dry_run:
            raise UserError("--verify takes the merged model alone", do="mixmerge merge --verify MODEL")
        found = verify_merge(config, threads=threads, progress=_bar("verify"), device=device)
        _print_json(found) if as_json else print(words.verified(found, config))
        return
    if out is None and not dry_run:
        raise UserError("no folder for the merged model", do="mixmerge merge CONFIG OUT")
    checked = load_config(config, pickles=pickle)
    if out is not None:
        refuse_existing(out)
    if dry_run:
        found = rehearse_merge(checked, threads=threads, device=device)
        _print_notes(found)
        _print_json(found) if as_json else print(words.rehearsed(found))
        return
    assert out is not None
    found = merge_models(checked, out, threads=threads, progress=_bar("merge"), device=device)
    _print_notes(found)
    _print_json(found | {"out": str(out)}) if as_json else print(words.merged(found, out))


def _print_notes(found: Mapping[str, Any]) -> None:
    for note in found.get("notes", ()):
        print(f"note: {note}", file=sys.stderr)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
) -> None:
    """List the merge methods, or show one in full with an example."""
    from mixmerge.merge import METHODS, reference

    if markdown and (name or as_json):
        raise UserError("prints the page of all methods", where="--markdown", do="give neither NAME nor --json with it")
    if markdown:
        print(reference.methods_reference(), end="")
    elif as_json:
        found = [reference.describe_method(method) for method in ([name] if name else METHODS)]
        _print_json(found[0] if name else found)
    elif name is None:
        _print_table(reference.METHOD_HEADS, reference.method_rows())
        print("mixmerge methods NAME shows one in full. A parameter without a value must be given.")
    else:
        method = reference.describe_method(name)
        print(f"{name}: {method['summary']}\nmerges {method['merges']}")
        print(f"paper: {method['paper']}\n" if method["paper"] else "")
        if method["parameters"]:
            _print_table(reference.PARAMETER_HEADS, reference.parameter_rows(name))
        print(f"\n{method['example']}", end="")


@app.command("diagnose")
def diagnose_(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML.", show_default=False)],
    page: Annotated[Path | None, typer.Option("--page", help="Write a page with heat maps here as well.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: the cores given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the models of a merge before it is paid for: angles, lengths, conflicting signs."""
    from mixmerge.merge.diagnose import diagnose
    from mixmerge.report.diagnosis import diagnosis_table, write_diagnosis

    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise UserError("not a file in a folder that is there", where=str(page), do="name a file, e.g. diagnosis.html")
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise UserError("a page is an HTML file", where=f"--page {page}", do="name one, e.g. diagnosis.html")
    _say_when_compiling()
    found = diagnose(config, threads=threads, progress=_bar("diagnose"))
    if page is not None:
        write_diagnosis(page, found)
    if as_json:
        _print_json(found)
        return
    print("\n".join(found["conclusions"]))
    for by in ("kinds", "layers"):
        print()
        _print_table(*diagnosis_table(found, by))
    if page is not None:
        print(f"\npage: {page}")


@app.command("trim-vocab")
def trim_vocab(
    model: Annotated[Path, typer.Argument(help="A model folder with a BPE tokenizer.json.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the trimmed model; must not be there.", show_default=False)],
    languages: Annotated[
        str, typer.Option("--languages", help="Languages to keep, e.g. en,fr,hi.", show_default=False)
    ],
    size: Annotated[int, typer.Option("--size", min=1, help="About how many tokens to keep.")] = 80_000,
    as_json: JsonOption = False,
) -> None:
    """Trim a model's vocabulary to the words of some languages; the rest goes through byte fallback."""
    from mixmerge.model.trim import trim_vocabulary

    codes = [code for code in languages.replace(",", " ").split() if code]
    found = asdict(trim_vocabulary(model, out, languages=codes, size=size, progress=_bar("trim")))
    if as_json:
        _print_json(found | {"out": str(out)})
        return
    for key, value in found.items():
        print(f"{key.replace('_', ' ')}: {_value(value)}")


def main() -> None:
    """Run the command line; every error becomes its line and its exit code."""
    try:
        app(prog_name="mixmerge")
    except MixmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, PermissionError):
            print(f"error: {error.filename}: no permission", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:80]}...: this name is too long", file=sys.stderr)
            sys.exit(2)
        import traceback

        traceback.print_exc()
        sys.exit(70)


def recipe_file(name: str) -> Path:
    """A recipe that comes with mixmerge: inside the wheel, or beside `src` in a checkout."""
    here = Path(__file__).resolve()
    folders = (here.parent / "recipes", here.parents[2] / "recipes")
    return next(path for folder in folders if (path := folder / f"{name}.yaml").is_file())


def _plan(path: Path, overrides: list[str] | None, out: Path, *, sample: int = 0) -> tuple[LoadedRecipe, Plan]:
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe

    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    for there in (nearest, *(place for place in (out / "store", out / "runs") if place.exists())):
        if not there.is_dir():
            raise UserError("a file, not a folder", where=f"--out {there}", do="give a folder, or remove the file")
    loaded = load_recipe(path, overrides or ())
    return loaded, build_plan(loaded, cache=out / "store" if out.is_dir() else None, sample=sample)


def _brief(why: tuple[str, ...]) -> str:
    more = f" (and {len(why) - 1} more; --why)" if len(why) > 1 else ""
    return why[0] + more


def _print_result(scores: dict[str, Any], page: Path, *, as_json: bool) -> None:
    if as_json:
        _print_json({"report": str(page), "scores": scores})
        return
    from mixmerge.report.tables import result_headers, result_table

    _print_table(result_headers(scores), result_table(scores), between=1)
    print(scores["answer"]["sentence"])
    print(f"report: {page}")


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, between: int = 0) -> None:
    """A table as wide as the terminal; 160 columns elsewhere. `between`: empty lines between rows."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, between, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _print_fields(title: str, fields: Any) -> None:
    print(f"{title}:")
    for key, value in fields.items():
        print(f"  {key}: {_value(value)}")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def _say_when_compiling() -> None:
    from mixmerge.merge import compiling

    told = "compiling the merge kernels, once on this machine: some seconds"
    compiling.when_compiling.append(lambda: print(told, file=sys.stderr))


def _bar(title: str) -> Any:
    """A progress callback: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import Progress as Bars

    bars = Bars(console=Console(stderr=True), transient=True)
    task = bars.add_task(title, total=None)
    bars.start()

    def progress(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)
        if done >= total:
            bars.stop()

    return progress


if __name__ == "__main__":
    main()
