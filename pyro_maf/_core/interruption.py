"""Ctrl-C as a request to stop early, with the result so far."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Abandoned", "Interruption"]


class Abandoned(BaseException):
    """Raised by a second Ctrl-C. Not a KeyboardInterrupt, on which Lightning exits the program."""


class Interruption:
    """Context manager: the first Ctrl-C sets `requested`, a second raises `Abandoned`, and KeyboardInterrupt on exit.

    It does nothing outside the main thread, which alone gets signals, or if Ctrl-C is ignored.

    Attributes:
        requested: Whether there was a Ctrl-C.

    Example:
        >>> import signal
        >>> with Interruption() as interruption:
        ...     signal.raise_signal(signal.SIGINT)
        >>> interruption.requested
        True
    """

    def __init__(self) -> None:
        self.requested = False
        self._settling = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if kind is Abandoned:
            raise KeyboardInterrupt from None

    def settle(self) -> None:
        """Raise nothing from now on: the remaining work is short and must be completed."""
        self._settling = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self._settling:
            raise Abandoned
        self.requested = True
