"""Rows that may be more than memory holds."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Spool", "copied", "temporary_file"]


class Spool:
    """Rows of float32 that are gathered in memory or, once they exceed a bound, in a temporary file while entered.

    Args:
        width: Numbers in a row.
        bound: The most bytes to hold in memory.

    Example:
        >>> with Spool(2, bound=8) as spool:
        ...     for start in range(0, 6, 2):
        ...         spool.append(np.arange(start, start + 2, dtype=np.float32).reshape(1, 2))
        >>> rows = spool.rows()
        >>> type(rows).__name__, rows.tolist()
        ('memmap', [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    """

    def __init__(self, width: int, bound: int) -> None:
        self.length = 0
        self._width = width
        self._bound = bound
        self._held: list[np.ndarray[Any, Any]] = []
        self._file: Any = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, rows: np.ndarray[Any, Any]) -> None:
        """Add rows, (n, width)."""
        self._held.append(np.ascontiguousarray(rows, np.float32))
        self.length += len(rows)
        if self._file is None and 4 * self.length * self._width > self._bound:
            self._file = open(temporary_file(".float32"), "wb")  # noqa: SIM115 (closed by `__exit__`)
        if self._file is not None:
            self._write_held()

    def rows(self) -> np.ndarray[Any, Any]:
        """All rows, (length, width): an array, or a read-only `np.memmap` of the file. For after the last one."""
        if self._file is None:
            return np.concatenate(self._held or [np.empty((0, self._width), np.float32)])
        return np.memmap(self._file.name, np.float32, "r", shape=(self.length, self._width))

    def _write_held(self) -> None:
        for rows in self._held:
            self._file.write(rows)
        self._held.clear()


def temporary_file(suffix: str) -> Path:
    """An empty file that is deleted when the program ends."""
    descriptor, name = tempfile.mkstemp(suffix, dir=_folder().name)
    os.close(descriptor)
    return Path(name)


def copied(stream: Any) -> Path:
    """What a binary stream holds, as a temporary file."""
    path = temporary_file(".table")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Windows can not delete a file that is still mapped.
    return tempfile.TemporaryDirectory(prefix="pyro-maf-", ignore_cleanup_errors=True)
