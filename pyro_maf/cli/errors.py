"""Exit codes of a command: 0, 2 with one line on bad input, 130 on interruption."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from pyro_maf._core.text import shown

__all__ = ["INTERRUPTED", "Endings", "command_line", "say"]

PACKAGE = Path(__file__).parent.parent
BAD_INPUT = 2
INTERRUPTED = 130
LONGEST_ERROR = 1000
COMMAND = "pyro_maf.command"
TRAINING = ("fit", "compare", "paper")
FORMER = {
    "--epochs": "--max-epochs",
    "--layers": "--num-layers",
    "--hidden": "--hidden-dims",
    "--out": "--folder",
}
"""Former names of options of the commands that train, from before they had the names of Python's: scripts still work,
with a warning."""


class Endings(TyperGroup):
    """Command group that turns errors about the input into a line on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Record the arguments, for `command_line`; translate former names of options."""
        if args and args[0] in TRAINING:
            args = [_renamed(argument) for argument in args]
        ctx.meta[COMMAND] = shlex.join(["pyro-maf", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader closed the pipe; redirect stdout so that Python's final flush does not raise.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None
        except (ValueError, TypeError, ModuleNotFoundError, OSError) as error:
            if not _is_about_input(error):
                raise
            say(shown(" ".join(str(error).split()), LONGEST_ERROR))
            raise typer.Exit(BAD_INPUT) from None


def command_line(ctx: typer.Context) -> str:
    """Return the command line, with the present names of options."""
    return str(ctx.meta[COMMAND])


def say(message: str) -> None:
    """Print a line on stderr: standard output is for data."""
    typer.echo(f"pyro-maf: {shown(message, len(message))}", err=True)


def _renamed(argument: str) -> str:
    """Return an option by its present name, or any other argument unchanged."""
    name, equals, value = argument.partition("=")
    if name not in FORMER:
        return argument
    say(f"{name} is now called {FORMER[name]}, as in Python.")
    return f"{FORMER[name]}{equals}{value}"


def _is_about_input(error: Exception) -> bool:
    """True if this package raised it, or the operating system. Anything else is a defect, and shows its traceback."""
    if isinstance(error, OSError):
        return True
    traceback: Any = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents
