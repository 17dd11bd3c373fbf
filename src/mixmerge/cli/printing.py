"""How answers are printed: tables, fields, JSON, notes and progress; nothing else in the package prints."""

from __future__ import annotations

import codecs
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOWrapper
from typing import Any

from mixmerge.amounts import in_bytes
from mixmerge.terminal import visible

BRANCHES = {"├": "|", "└": "`", "│": "|", "─": "-"}  # of a tree, and what they are in ASCII


def ready_streams() -> None:
    """Let closed streams (`>&-`) go nowhere, and what the encoding of standard output lacks be written as its escape.

    A closed one takes its number back: the next file that is opened would have it, and get what a library writes there.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers: the lowest free one is taken
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w"))
    codecs.register_error("escaped", _escaped)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="escaped")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks as JSON escapes it, so that JSON stays what it is."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def print_tree(lines: Iterable[str]) -> None:
    """Lines with branches in front, which are ASCII where the encoding lacks them."""
    try:
        "".join(BRANCHES).encode(sys.stdout.encoding or "utf-8")
        plain = {}
    except UnicodeEncodeError:
        plain = str.maketrans(BRANCHES)
    for line in lines:
        print(visible(line).translate(plain))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, between: int = 0) -> None:
    """A table as wide as the terminal, in which nothing is cut off; 160 columns elsewhere. `between`: empty lines.

    Columns for which there is no room stand in a table below.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mixmerge.cli.widths import GAP, abreast, widths

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    cells = [[visible(cell, keep="\n") for cell in row] for row in rows]
    for nth, columns in enumerate(abreast(heads, cells, console.width)):
        part = [[row[at] for at in columns] for row in cells]
        table = Table(box=None, pad_edge=False, padding=(0, GAP, between, 0))
        given: Sequence[int | None] = widths([heads[at] for at in columns], part, console.width) or [None] * len(
            columns
        )
        for at, width in zip(columns, given, strict=True):
            table.add_column(heads[at], overflow="fold", width=width)
        for row in part:
            table.add_row(*map(escape, row))
        if nth:
            print()
        console.print(table)


def print_fields(title: str, fields: Any) -> None:
    print(f"{title}:")
    for key, value in fields.items():
        print(visible(f"  {key}: {shown(value)}"))


def print_provenance(told: Mapping[str, Any]) -> None:
    """The provenance in a record, for people."""
    fields = dict(told)
    if "argv" in fields:
        fields["argv"] = shlex.join(fields["argv"])
    for key in ("git", "mixmerge_git"):
        if (git := fields.get(key)) and git.get("commit") is None:
            fields[key] = f"not known: {git.get('why')}"
        elif git:
            fields[key] = f"{git['commit']}" + " with changes that are not committed" * bool(git.get("dirty"))
        elif key in fields:
            fields[key] = "in no repository"
    fields |= {key: in_bytes(value) for key, value in fields.items() if "bytes_" in key}
    for key in ("gpus", "versions", "seeds"):
        if isinstance(found := fields.get(key), Mapping):
            fields[key] = ", ".join(f"{name} {value}" for name, value in found.items()) or "none"
        elif isinstance(found, list):
            fields[key] = ", ".join(found) or "none"
    print_fields("provenance", fields)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def print_rows(value: Mapping[str, Any], key: str) -> None:
    """JSON whose long list under `key` stands last, an entry a line: thousands are written in a moment."""
    head = json.dumps({name: rest for name, rest in value.items() if name != key}, ensure_ascii=False, indent=1)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in value[key])
    print(f'{head[:-2]},\n "{key}": [\n{rows}\n ]\n}}')


def print_notes(found: Mapping[str, Any]) -> None:
    for note in found.get("notes", ()):
        tell(note)


def tell(note: str) -> None:
    """Say what a person should know, beside the answer."""
    print(visible(f"note: {note}", keep="\n"), file=sys.stderr)


def bar(title: str) -> Any:
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
