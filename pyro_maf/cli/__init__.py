"""The command line: fit a density to a table, score rows, draw samples, describe a model.

Slow imports, above all torch, are in the commands that need them.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from pyro_maf._core.messages import require

if TYPE_CHECKING:
    from pyro_maf.cli.commands import app

__all__ = ["app", "main"]

BAD_INPUT = 2


def main() -> None:
    """Run the command in the program's arguments; without the `cli` extra, print what to install."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the program runs)
    try:
        require("pyro-maf", "typer")
    except ModuleNotFoundError as error:
        print(f"pyro-maf: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    from pyro_maf.cli.commands import main

    main()


def __getattr__(name: str) -> Any:
    if name == "app":
        from pyro_maf.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
