"""Progress bars, and the conditions for showing one."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

__all__ = ["SECONDS_BETWEEN_UPDATES", "check_progress", "progress_bar", "say_before_bar", "shows"]

SECONDS_BETWEEN_UPDATES = 0.2


def check_progress(who: str, progress: Any) -> None:
    """Raise if `progress` is not a value that `shows` accepts."""
    if progress not in (True, False, "always"):
        raise ValueError(f'{who} expected progress to be True, False or "always", got {progress!r}.')


def shows(progress: bool | str, console: Any) -> bool:
    """Return whether to show a bar: never (False), in a terminal or notebook (True), or everywhere ("always").

    A notebook shows one if ipywidgets is installed, as for the bars of other packages.
    With FORCE_COLOR set, as for the shell commands of a notebook and by some CI, rich takes a pipe for a terminal.
    """
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return False
    is_only_coloured = bool(os.environ.get("FORCE_COLOR")) and not console.file.isatty()
    is_read = console.is_jupyter or (console.is_terminal and not is_only_coloured)
    return progress == "always" or (bool(progress) and is_read)


def say_before_bar(text: str, progress: bool | str) -> None:
    """Print to stderr what a progress bar is waiting for, if one will be shown."""
    from rich.console import Console

    if shows(progress, Console(stderr=True)):
        print(text, file=sys.stderr, flush=True)


def progress_bar(place: str, figures: str, console: Any) -> Any:
    """A rich progress bar with one text before it and one after, the time elapsed, and the maximum time remaining.

    Args:
        place, figures: The texts, in rich's format.
        console: Console of the bar; in a notebook the bar is an output of the cell.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn(place),
        BarColumn(),
        TextColumn(figures),
        # On a short line, only the bar shrinks.
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("at most"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )
    if console.is_jupyter:
        from pyro_maf._core.notebooks import NotebookProgress

        return NotebookProgress(*columns)
    return Progress(*columns, console=console)
