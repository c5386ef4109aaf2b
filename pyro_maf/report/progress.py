"""A progress bar over the rows that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro_maf.showing import progress_bar, shows

__all__ = ["bar"]


@contextmanager
def bar(progress: bool | str, rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr: what part of the rows is done, time spent and the most that is left.

    Yields:
        What to call with the number of rows that have been done since.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not shows(progress, console):
        yield lambda done: None
        return
    with progress_bar("report", "{task.percentage:.0f} %", console) as shown:
        task = shown.add_task("", total=rows)
        yield lambda done: shown.advance(task, done)
