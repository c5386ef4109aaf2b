"""Progress bar over the steps of a fit, and over the runs of a model before and after them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from pyro_maf._core.extras import require
from pyro_maf._core.progress import SECONDS_BETWEEN_UPDATES, progress_bar, shows
from pyro_maf.infer.runs import watched

__all__ = ["RECENT", "Bar", "bar"]

RECENT = 100


class Bar:
    """A progress bar, shown or not; yielded by `bar`.

    Args:
        shown: A `rich.progress.Progress`, or None to show nothing.
        steps: Maximum number of steps.
    """

    def __init__(self, shown: Any, steps: int) -> None:
        self._shown, self._steps = shown, steps
        self._task: Any = None
        self._updated = time.monotonic()

    def step(self, elbo: Sequence[float]) -> None:
        """Show the bound of every step so far: their number, and the mean of the last hundred."""
        if self._shown is None:
            return
        if self._task is None:
            self._task = self._shown.add_task("", total=self._steps, what="step", elbo="")
        if elbo and self._is_time():
            mean = fmean(elbo[-RECENT:])
            self._shown.update(self._task, completed=len(elbo), elbo=f"ELBO {mean:.3f} nats")

    @contextmanager
    def runs(self, what: str, total: int) -> Iterator[None]:
        """Show a separate bar for a stage that runs the model for each draw, from its first run on."""
        count, task = 0, None

        def show() -> None:
            nonlocal count, task
            count += 1
            if self._shown is not None and self._is_time():
                task = self._shown.add_task("", total=total, what=what, elbo="") if task is None else task
                self._shown.update(task, completed=min(count, total))

        with watched(show):
            yield
        if task is not None:
            self._shown.update(task, total=count, completed=count)

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._updated <= SECONDS_BETWEEN_UPDATES:
            return False
        self._updated = now
        return True


@contextmanager
def bar(progress: bool | str, steps: int) -> Iterator[Bar]:
    """Show a bar on stderr: step, mean bound of the last hundred, elapsed time and maximum remaining time.

    Yields:
        A `Bar` to report steps and runs to.
    """
    require("fit_guide", "rich")
    from rich.console import Console

    console = Console(stderr=True)
    if not shows(progress, console):
        yield Bar(None, steps)
        return
    with progress_bar("{task.fields[what]} {task.completed}", "{task.fields[elbo]}", console) as shown:
        yield Bar(shown, steps)
