"""Exit codes: 0; 2, with one line, on bad input; 130 on interruption. A bug shows its traceback."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from pyro_maf._core.messages import shown
from pyro_maf.cli import BAD_INPUT, INTERRUPTED

__all__ = [
    "CommandError",
    "Commands",
    "command_line",
    "input_errors",
    "say",
    "warnings_as_lines",
]

LONGEST_ERROR = 1000
COMMAND = "pyro_maf.command"


class CommandError(Exception):
    """Error about the input of a command; the user sees only its message."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Context manager for a call of a public function: turns its errors into errors about the input."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Context manager in which each distinct warning of `pyro_maf.fit` is printed as a line on stderr."""
    said: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in said:
            say(str(message))
        said.add(str(message))

    with warnings.catch_warnings():
        # Filters that turn warnings into errors are for programs; a command line has nothing to debug.
        warnings.filterwarnings("always", "fit ", UserWarning)
        warnings.showwarning = show
        yield


class Commands(TyperGroup):
    """Command group that turns errors about the input into a line on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Record the arguments, for `command_line`."""
        ctx.meta[COMMAND] = shlex.join(["pyro-maf", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> object:
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
        except (CommandError, ModuleNotFoundError, OSError) as error:
            say(shown(" ".join(str(error).split()), LONGEST_ERROR))
            raise typer.Exit(BAD_INPUT) from None


def command_line(ctx: typer.Context) -> str:
    """Return the command line."""
    return str(ctx.meta[COMMAND])


def say(message: str) -> None:
    """Print a line on stderr, since standard output is for data."""
    typer.echo(f"pyro-maf: {shown(message, len(message))}", err=True)
