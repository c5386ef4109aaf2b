"""A progress bar over the steps of a fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from pyro_maf.extras import require
from pyro_maf.showing import SECONDS_BETWEEN_UPDATES, progress_bar, shows

__all__ = ["RECENT", "bar"]

RECENT = 100


@contextmanager
def bar(progress: bool | str, steps: int) -> Iterator[Callable[[Sequence[float]], None]]:
    """A bar on stderr: step, mean bound of the last hundred, time spent and the most that is left.

    Yields:
        What to call after each step, with the bound of every step so far.
    """
    require("fit_guide", "rich")
    from rich.console import Console

    console = Console(stderr=True)
    if not shows(progress, console):
        yield lambda elbo: None
        return
    with progress_bar("step {task.completed}", "{task.fields[elbo]}", console) as shown:
        task = shown.add_task("", total=steps, elbo="")
        updated = time.monotonic()

        def show(elbo: Sequence[float]) -> None:
            nonlocal updated
            if elbo and time.monotonic() - updated > SECONDS_BETWEEN_UPDATES:
                updated = time.monotonic()
                shown.update(task, completed=len(elbo), elbo=f"ELBO {fmean(elbo[-RECENT:]):.3f} nats")

        yield show
