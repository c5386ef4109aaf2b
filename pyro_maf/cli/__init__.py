"""The command line: fit a density to a table, score rows, draw samples, describe a model.

Slow imports, above all torch, are left to the commands that need them.
"""

from __future__ import annotations

import os
import sys

from pyro_maf._core.messages import require

__all__ = ["main"]

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes."""


def main() -> None:
    """Run the command given by the program's arguments; without the `cli` extra, print what to install."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the program runs)
    try:
        require("pyro-maf", "typer")
    except ModuleNotFoundError as error:
        print(f"pyro-maf: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    try:
        from pyro_maf.cli.commands import app

        app(prog_name="pyro-maf")  # always this name, for which completion is installed
    except KeyboardInterrupt:  # before a command has started
        sys.exit(INTERRUPTED)
