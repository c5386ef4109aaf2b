"""Progress bar over the rows of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro_maf._core.progress import progress_bar, shows

__all__ = ["bar"]


@contextmanager
def bar(progress: bool | str, rows: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr: fraction of the rows that is done, elapsed time and maximum remaining time.

    Yields:
        A function to call with the number of rows done since the last call.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not shows(progress, console):
        yield lambda done: None
        return
    with progress_bar("report", "{task.percentage:.0f} %", console) as shown:
        task = shown.add_task("", total=rows)
        yield lambda done: shown.advance(task, done)
