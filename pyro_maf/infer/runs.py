"""Notification of each run of a model, for a progress bar over hundreds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["noticed", "watched"]

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
