"""Commands on models, without a recipe: merge them, compare them, trim their vocabulary."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mixmerge.cli.options import JsonOption, app
from mixmerge.cli.printing import bar, print_json, print_notes, print_table, shown
from mixmerge.errors import UserError


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
        found = verify_merge(config, threads=threads, progress=bar("verify"), device=device)
        print_json(found) if as_json else print(words.verified(found, config))
        return
    if out is None and not dry_run:
        raise UserError("no folder for the merged model", do="mixmerge merge CONFIG OUT")
    checked = load_config(config, pickles=pickle)
    if out is not None:
        refuse_existing(out)
    if dry_run:
        found = rehearse_merge(checked, threads=threads, device=device)
        print_notes(found)
        print_json(found) if as_json else print(words.rehearsed(found))
        return
    assert out is not None
    found = merge_models(checked, out, threads=threads, progress=bar("merge"), device=device)
    print_notes(found)
    print_json(found | {"out": str(out)}) if as_json else print(words.merged(found, out))


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
        print_json(found[0] if name else found)
    elif name is None:
        print_table(reference.METHOD_HEADS, reference.method_rows())
        print("mixmerge methods NAME shows one in full. A parameter without a value must be given.")
    else:
        method = reference.describe_method(name)
        print(f"{name}: {method['summary']}\nmerges {method['merges']}")
        print(f"paper: {method['paper']}\n" if method["paper"] else "")
        if method["parameters"]:
            print_table(reference.PARAMETER_HEADS, reference.parameter_rows(name))
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
    found = diagnose(config, threads=threads, progress=bar("diagnose"))
    if page is not None:
        write_diagnosis(page, found)
    if as_json:
        print_json(found)
        return
    print("\n".join(found["conclusions"]))
    for by in ("kinds", "layers"):
        print()
        print_table(*diagnosis_table(found, by))
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
    found = asdict(trim_vocabulary(model, out, languages=codes, size=size, progress=bar("trim")))
    if as_json:
        print_json(found | {"out": str(out)})
        return
    for key, value in found.items():
        print(f"{key.replace('_', ' ')}: {shown(value)}")


def _say_when_compiling() -> None:
    from mixmerge.merge import compiling

    told = "compiling the merge kernels, once on this machine: some seconds"
    compiling.when_compiling.append(lambda: print(told, file=sys.stderr))
