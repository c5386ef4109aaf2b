"""When progress is shown."""

from __future__ import annotations

from typing import Any

__all__ = ["check_progress", "shows"]


def check_progress(who: str, progress: Any) -> None:
    """Raise if `progress` is none of what `shows` knows."""
    if progress not in (True, False, "always"):
        raise ValueError(f'{who} expected progress to be True, False or "always", got {progress!r}.')


def shows(progress: bool | str, console: Any) -> bool:
    """Whether to show a bar: never (False), where it is read by somebody (True), or in any case ("always")."""
    return progress == "always" or (bool(progress) and (console.is_terminal or console.is_jupyter))
