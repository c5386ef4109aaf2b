"""Ctrl-C, or a termination signal, as a request to stop early with the result so far."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """Context manager: the first Ctrl-C sets `requested`, a second raises KeyboardInterrupt.

    It does nothing outside the main thread, the only one to receive signals, or if Ctrl-C is ignored. With
    `defers_termination`, SIGTERM, unless the program handles it, also sets `requested`, and ends the program on exit; a
    second SIGTERM ends it immediately.
    """

    def __init__(self, *, defers_termination: bool = False) -> None:
        self.requested = False
        self._defers_termination = defers_termination
        self._is_terminated = False
        self._settling = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            if callable(signal.getsignal(signal.SIGINT)):
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_ctrl_c)
            if self._defers_termination and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_termination)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._is_terminated:
            # The exit code with which a shell reports a program ended by the signal.
            raise SystemExit(128 + signal.SIGTERM)

    def settle(self) -> None:
        """Raise nothing from now on: the remaining work is short and must be completed."""
        self._settling = True

    def _on_ctrl_c(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self._settling:
            raise KeyboardInterrupt
        self.requested = True

    def _on_termination(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.requested = self._is_terminated = True
