"""Notification of each run of a model, for a progress bar over hundreds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pyro_maf._core.progress import Bar

__all__ = ["noticed", "runs_shown", "watched"]

_notice: ContextVar[Callable[[], None] | None] = ContextVar("_notice", default=None)


@contextmanager
def watched(notice: Callable[[], None]) -> Iterator[None]:
    """Call `notice` after each run of a model for a single draw, while entered.

    Example:
        >>> runs = []
        >>> with watched(lambda: runs.append(1)):
        ...     noticed()
        >>> noticed()
        >>> len(runs)
        1
    """
    token = _notice.set(notice)
    try:
        yield
    finally:
        _notice.reset(token)


def noticed() -> None:
    """Report a run of a model for a single draw."""
    notice = _notice.get()
    if notice is not None:
        notice()


@contextmanager
def runs_shown(bar: Bar, what: str, total: int, **fields: Any) -> Iterator[None]:
    """Show the runs of a model for single draws on a line of `bar`, from the first one on.

    Args:
        bar: The bar.
        what: Name of the line.
        total: Expected number of runs.
        fields: Further fields of the texts.
    """
    count, is_shown = 0, False

    def show() -> None:
        nonlocal count, is_shown
        count += 1
        if bar.is_due:
            is_shown = True
            bar.show(what, min(count, total), total, **fields)

    with watched(show):
        yield
    if is_shown:
        bar.show(what, count, count, **fields)
