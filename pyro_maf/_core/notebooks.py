"""A progress bar in a notebook: one line of text, replaced as the work proceeds, which is stored with the notebook."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

__all__ = ["NotebookProgress"]

WIDTH = 100
SECONDS_BETWEEN_REFRESHES = 0.2


class NotebookProgress(Progress):
    """As rich's `Progress`, but displayed by IPython alone.

    rich displays a widget, which is lost when the notebook is stored, and an empty output.
    """

    def __init__(self, *columns: str | ProgressColumn) -> None:
        plain = Console(file=io.StringIO(), width=WIDTH, force_jupyter=False, force_terminal=False, color_system=None)
        super().__init__(*columns, console=plain, auto_refresh=False)
        self._handle: Any = None
        self._refreshed = 0.0

    def start(self) -> None:
        """Display the line."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self._shown(), raw=True, display_id=True)

    def stop(self) -> None:
        """Display the final state."""
        self._replace()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Advance a task and refresh the line."""
        super().update(*args, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Display the current state, at most once per `SECONDS_BETWEEN_REFRESHES`."""
        if time.monotonic() - self._refreshed > SECONDS_BETWEEN_REFRESHES:
            self._replace()

    def _replace(self) -> None:
        if self._handle is not None:
            self._refreshed = time.monotonic()
            self._handle.update(self._shown(), raw=True)

    def _shown(self) -> dict[str, str]:
        with self.console.capture() as capture:
            self.console.print(self.get_renderable())
        return {"text/plain": capture.get().strip()}
