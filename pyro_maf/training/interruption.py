"""Ctrl-C as a request to stop, with what was learned so far."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Abandoned", "Interruption"]


class Abandoned(BaseException):
    """Raised by a second Ctrl-C. No KeyboardInterrupt, for which Lightning would end the program."""


class Interruption:
    """While entered, the first Ctrl-C sets `requested`, and a second raises `Abandoned`.

    Outside the main thread, where no signals arrive, and where Ctrl-C is ignored, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Abandoned
        self.requested = True
