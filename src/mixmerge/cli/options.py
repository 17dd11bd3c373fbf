"""The application itself, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
