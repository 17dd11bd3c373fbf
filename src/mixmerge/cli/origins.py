"""Commands on where results come from: a candidate's lineage, and two studies side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmerge.amounts import in_bytes
from mixmerge.cli.opened import StudyArg, opened, point_to_earlier
from mixmerge.cli.options import JsonOption, OutOption, SetOption, app
from mixmerge.cli.printing import print_json, print_table, print_tree, shown
from mixmerge.run import DEFAULT_OUT
from mixmerge.terminal import visible

TOLD = (".safetensors", "rows.jsonl", "origins.jsonl", "manifest.json")  # the files of a step that its lineage is about
STUDY = "A study's folder, <out>/runs/<study>, or its plan.json."


@app.command()
def lineage(
    recipe: StudyArg,
    candidate: Annotated[str, typer.Argument(help="base, an expert, a baseline or a merge.", show_default=False)],
    set_: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    as_json: JsonOption = False,
) -> None:
    """Show what a candidate's weights were made of, down to the rows: steps, files, sha256."""
    from mixmerge.run.lineage import lineage as lineage_of

    found = opened(recipe, set_, out, candidate, "lineage")
    tree = lineage_of(found.plan, found.store, candidate)
    point_to_earlier(found, out, candidate, tree["id"], "lineage")
    if as_json:
        print_json(tree)
        return
    print_tree(_lines(tree, "", ""))


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help=STUDY, metavar="A", show_default=False)],
    other: Annotated[Path, typer.Argument(help=STUDY, metavar="B", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Compare two studies: the settings that differ, field by field, and their scores side by side."""
    from mixmerge.plan.identity import brief
    from mixmerge.run.compare import compare, compare_scores, scores_of
    from mixmerge.run.plans import plan_file, read_plan, root_of
    from mixmerge.run.store import Store

    files = plan_file(one), plan_file(other)
    plans = [read_plan(file) for file in files]
    found = compare(*plans)
    roots = [root_of(file) for file in files]
    scores = [None if root is None else scores_of(plan, Store(root)) for plan, root in zip(plans, roots, strict=True)]
    rows = None if scores[0] is None or scores[1] is None else compare_scores(scores[0], scores[1])
    if as_json:
        print_json(found | {"scores": rows})
        return
    for entry in found["settings"]:
        places = ", ".join(f"{entry['kind']}/{name}" for name in entry["steps"])
        old, new = brief(entry["a"], entry["b"])
        print(visible(f"{entry['field']}: {old} -> {new}  ({places})"))
    for side, place in (("a", one), ("b", other)):
        if found["only"][side]:
            print(visible(f"only in {place}: {', '.join(found['only'][side])}"))
    if not found["settings"] and not any(found["only"].values()):
        print("no setting differs")
    if rows is None:
        missing = [
            f"{place} is not finished" if root is not None else f"no store beside {place}: name <out>/runs/<study>"
            for place, score, root in zip((one, other), scores, roots, strict=True)
            if score is None
        ]
        print(visible(f"no scores to compare: {', '.join(missing)}"))
        return
    table = [row for row in rows if row["language"] is None]
    print(visible(f"A: {one}\nB: {other}", keep="\n"))
    heads = ("Split", "Metric", "Candidate", "A", "B", "B - A")
    print_table(
        heads,
        [[*(str(row[key]) for key in ("split", "metric", "candidate")), *map(_number, _three(row))] for row in table],
    )


def _three(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return row["a"], row["b"], row["difference"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _lines(node: Mapping[str, Any], first: str, rest: str) -> Iterator[str]:
    """A node of the tree and what is below it; `first` stands before its line, `rest` before those below."""
    role = f"{node['role']}: " if node["role"] else ""
    head = f"{first}{role}{node['step']}  {node['id']}"
    if node.get("above"):
        yield f"{head}  (see above)"
        return
    measured = ", ".join(f"{value:,} {key}" for key, value in node["measured"].items())
    undone = f"damaged: {node['damage']}" if node.get("damage") else "not done"
    yield f"{head}  " + (measured or "done" if node["done"] else undone)
    below: list[Any] = [
        f"{name}  {in_bytes(file['bytes'])}" + (f"  sha256 {file['sha256'][:16]}" if file["sha256"] else "")
        for name, file in node["files"].items()
        if name.endswith(TOLD)
    ]
    if "source" in node:
        told = {key: value for key, value in node["source"].items() if value is not None}
        below.append("from " + ", ".join(f"{key} {shown(value)}" for key, value in told.items()))
    below += [*node.get("data", ()), *node["inputs"]]
    for number, entry in enumerate(below, 1):
        branch, under = ("└─ ", "   ") if number == len(below) else ("├─ ", "│  ")
        if isinstance(entry, str):
            yield rest + branch + entry
        elif "step" in entry:
            yield from _lines(entry, rest + branch, rest + under)
        else:
            yield from _data_lines(entry, rest + branch, rest + under)


def _data_lines(data: Mapping[str, Any], first: str, rest: str) -> Iterator[str]:
    drawn = "" if data["drawn"] is None else f", {data['drawn']:,} rows drawn"
    changed = "; CHANGED since it was drawn" if data.get("changed") else ""
    hub = f", Hub {data['hub']}" if "hub" in data else ""
    yield f"{first}data {data['name']}{hub}: {data['objective']}, {' '.join(data['languages'])}{drawn}{changed}"
    lines = [_file_line(file) for file in data["files"]]
    if not lines:
        lines = [f"fingerprint {data['fingerprint'][:16]}"]
    if "problem" in data:
        lines.append(data["problem"])
    for number, line in enumerate(lines, 1):
        yield rest + ("└─ " if number == len(lines) else "├─ ") + line


def _file_line(file: Mapping[str, Any]) -> str:
    """A data file, and what has become of it since the mixture was drawn."""
    rows = f"  {file['rows']:,} rows" if file.get("rows") is not None else ""
    line = f"{file.get('path', file['file'])}{rows}  sha256 {file['sha256'][:16]}"
    state = file.get("state", "as it was drawn")
    if "now" in file:
        now = file["now"]
        return f"{line}; CHANGED since it was drawn: now {now['rows']:,} rows, sha256 {now['sha256'][:16]}"
    if state == "gone":
        return f"{line}; GONE since it was drawn"
    return line + (" now; not recorded when it was drawn" if state == "not recorded" else "")
