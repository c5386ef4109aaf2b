"""The commands."""

from __future__ import annotations

from typing import Annotated

import typer

import pyro_maf
from pyro_maf.cli.compare import COMPARE_EXAMPLES, PAPER_EXAMPLES, compare, paper
from pyro_maf.cli.errors import Commands
from pyro_maf.cli.fit import FIT_EXAMPLES, fit
from pyro_maf.cli.saved_model import INFO_EXAMPLES, info
from pyro_maf.cli.score_and_sample import SAMPLE_EXAMPLES, SCORE_EXAMPLES, sample, score
from pyro_maf.cli.shared_options import as_command

__all__ = ["app"]

app = typer.Typer(
    name="pyro-maf",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command, examples in (
    ("fit", as_command(fit), FIT_EXAMPLES),
    ("score", score, SCORE_EXAMPLES),
    ("sample", sample, SAMPLE_EXAMPLES),
    ("info", info, INFO_EXAMPLES),
    ("compare", as_command(compare), COMPARE_EXAMPLES),
    ("paper", as_command(paper), PAPER_EXAMPLES),
):
    app.command(name, epilog=examples, no_args_is_help=True)(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pyro-maf {pyro_maf.__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
]


@app.callback()
def options(show_version: ShowVersion = False) -> None:
    """Masked autoregressive flows: exact densities of tables of numbers."""
