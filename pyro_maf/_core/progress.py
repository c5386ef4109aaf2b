"""Progress bars on stderr or in a notebook, and the conditions for showing one."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.display_functions import DisplayHandle
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["Bar", "bar", "check_progress", "shows", "will_show"]

SECONDS_BETWEEN_UPDATES = 0.2
NOTEBOOK_WIDTH = 100


def check_progress(who: str, progress: object) -> None:
    """Raise if `progress` is not a value that `shows` accepts."""
    if progress not in (True, False, "always"):
        raise ValueError(f'{who} expected progress to be True, False or "always", got {progress!r}.')


def shows(progress: bool | str, console: Console) -> bool:
    """Return whether to show a bar: never (False), in a terminal or notebook (True), or everywhere ("always").

    A notebook shows one if ipywidgets is installed, as for the bars of other packages. With FORCE_COLOR set, as in the
    shell commands of a notebook and in some CI systems, rich mistakes a pipe for a terminal.
    """
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return False
    is_only_coloured = bool(os.environ.get("FORCE_COLOR")) and not console.file.isatty()
    is_read = console.is_jupyter or (console.is_terminal and not is_only_coloured)
    return progress == "always" or (bool(progress) and is_read)


def will_show(progress: bool | str) -> bool:
    """Return whether a bar on stderr would be shown, by the rule of `shows`."""
    from rich.console import Console

    return shows(progress, Console(stderr=True))


class Bar:
    """Lines of progress, or nothing at all; yielded by `bar`."""

    def __init__(self, lines: Progress | None) -> None:
        self._lines = lines
        self._tasks: dict[str, TaskID] = {}
        self._updated = time.monotonic()

    @property
    def is_due(self) -> bool:
        """True if there are lines, and the last update was a moment ago."""
        return self._lines is not None and time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES

    def show(self, line: str, completed: float, total: float, **fields: Any) -> None:
        """Update or add a line, by its `{task.description}`; `fields` are further fields of the texts."""
        if self._lines is None:
            return
        self._updated = time.monotonic()
        if line not in self._tasks:
            self._tasks[line] = self._lines.add_task(line, total=total, **fields)
        self._lines.update(self._tasks[line], total=total, completed=completed, **fields)


class _NotebookBar(Bar):
    """Lines as plain text in the output of a notebook cell, replaced as the work proceeds and saved with the notebook.

    rich itself would display a widget, which is lost when the notebook is saved, and an empty output.
    """

    def __init__(self, lines: Progress) -> None:
        from IPython.display import display

        super().__init__(lines)
        self._console, self._renderable = lines.console, lines.get_renderable
        self._output: DisplayHandle | None = display(self._text(), raw=True, display_id=True)
        self._displayed = time.monotonic()

    def show(self, line: str, completed: float, total: float, **fields: Any) -> None:
        """Update a line, and the output at most once per `SECONDS_BETWEEN_UPDATES`."""
        super().show(line, completed, total, **fields)
        if time.monotonic() - self._displayed > SECONDS_BETWEEN_UPDATES:
            self.display()

    def display(self) -> None:
        """Replace the output by the current state."""
        self._displayed = time.monotonic()
        if self._output is not None:
            self._output.update(self._text(), raw=True)

    def _text(self) -> dict[str, str]:
        with self._console.capture() as capture:
            self._console.print(self._renderable())
        return {"text/plain": capture.get().strip()}


@contextmanager
def bar(progress: bool | str, place: str, figures: str, console: Console | None = None) -> Iterator[Bar]:
    """Show lines with a text, a bar, another text, the elapsed time and the maximum remaining time, if `shows`.

    The texts are in rich's format. The console is stderr by default; in a notebook, a cell output.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    console = console or Console(stderr=True)
    if not shows(progress, console):
        yield Bar(None)
        return
    columns = (
        TextColumn(place),
        BarColumn(),
        TextColumn(figures),
        # On a short line, only the bar shrinks.
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("at most"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )
    if not console.is_jupyter:
        with Progress(*columns, console=console) as lines:
            yield Bar(lines)
        return
    plain = Console(
        file=io.StringIO(), width=NOTEBOOK_WIDTH, force_jupyter=False, force_terminal=False, color_system=None
    )
    notebook = _NotebookBar(Progress(*columns, console=plain, auto_refresh=False))
    try:
        yield notebook
    finally:
        notebook.display()
