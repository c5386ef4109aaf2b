"""The commands and the handling of their errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import pyro_maf
from pyro_maf.cli import compare, fit, info, paper, sample, score
from pyro_maf.cli.errors import INTERRUPTED, Endings

__all__ = ["app", "main"]

app = typer.Typer(
    name="pyro-maf",
    cls=Endings,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (fit, score, sample, info, compare, paper):
    name = command.__name__.rpartition(".")[-1]
    app.command(name, epilog=command.EXAMPLES, no_args_is_help=True)(command.run)


def main() -> None:
    """Run the command in the program's arguments."""
    try:
        # Always by this name, for which completion is installed.
        app(prog_name="pyro-maf")
    except KeyboardInterrupt:
        # Interrupted before a command has started.
        sys.exit(INTERRUPTED)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyro-maf {pyro_maf.__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
]


@app.callback()
def options(show_version: ShowVersion = False) -> None:
    """Masked autoregressive flows: exact densities of tables of numbers."""
