"""The command line: fit a density to a table, score rows, draw samples, say what a model is.

Everything that takes long to import, torch first, is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pyro_maf.extras import require

if TYPE_CHECKING:
    from pyro_maf.cli.commands import app

__all__ = ["app", "main"]

BAD_INPUT = 2


def main() -> None:
    """Run the command that the program's arguments ask for; without the `train` extra, say what to install."""
    try:
        require("pyro-maf", "typer", "rich")
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
