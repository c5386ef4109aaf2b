"""Tables that may not fit in memory while they are read: collected in temporary files."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyro_maf.tables.layout import FloatArray

if TYPE_CHECKING:
    from _typeshed import SupportsRead

__all__ = ["Spool", "copied", "temporary_file"]

SPOOLED_ROWS, SAMPLED_ROWS = 2**14, 2**16
"""Number of rows that are converted at once, and maximum number of rows by which a dtype is chosen."""
RESOLUTION = 1e-4
"""Rounding error of float32, in units of a column's interquartile range, up to which it suffices."""


class Spool:
    """Rows of float64, collected in memory or, beyond a bound, in a temporary file; a context manager.

    Example:
        >>> with Spool(2, bound=16) as spool:
        ...     for start in range(0, 6, 2):
        ...         spool.append(np.arange(start, start + 2, dtype=np.float64).reshape(1, 2))
        >>> rows = spool.rows()
        >>> type(rows).__name__, rows.dtype.name, rows.tolist()
        ('memmap', 'float32', [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    """

    def __init__(self, width: int, bound: int) -> None:
        self.length = 0
        self._width = width
        self._bound = bound
        self._parts: list[NDArray[np.float64]] = []
        self._file: BufferedWriter | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, rows: NDArray[np.float64]) -> None:
        """Add rows, (n, width)."""
        self._parts.append(np.ascontiguousarray(rows, np.float64))
        self.length += len(rows)
        if self._file is None and 8 * self.length * self._width > self._bound:
            self._file = open(temporary_file(".float64"), "wb")  # noqa: SIM115 (closed by `__exit__`)
        if self._file is not None:
            for block in self._parts:
                self._file.write(block.data)
            self._parts.clear()

    def rows(self, dtype: str | None = None) -> FloatArray:
        """Return all rows, (length, width), as an array or a read-only `np.memmap` of the file; ends appending.

        Their dtype is `dtype`, by default float32 if `float32_suffices`.
        """
        if self._file is None:
            rows = np.concatenate(self._parts or [np.empty((0, self._width))])
        else:
            rows = np.memmap(self._file.name, np.float64, "r", shape=(self.length, self._width))
        if dtype is None:
            dtype = "float32" if float32_suffices(rows) else "float64"
        if dtype == "float64":
            return rows
        if self._file is None:
            return rows.astype(np.float32)
        with open(temporary_file(".float32"), "wb") as file:
            for block in _blocks(rows):
                file.write(block.astype(np.float32).tobytes())
        with suppress(OSError):  # some systems do not remove mapped files: it is removed at exit
            os.unlink(self._file.name)
        return np.memmap(file.name, np.float32, "r", shape=(self.length, self._width))


def float32_suffices(rows: NDArray[np.float64]) -> bool:
    """Return whether float32 is exact for every column, or resolves its interquartile range to 1e-4 of its width.

    Not if another value would round to 0 or 1, where some supports end.

    Example:
        >>> float32_suffices(np.array([[20.1], [21.2], [22.3]])), float32_suffices(np.array([[5e6 + 0.1], [5e6]]))
        (True, False)
    """
    exact = np.ones(rows.shape[1], bool)
    for block in _blocks(rows):
        rounded = block.astype(np.float32)
        same = rounded == block
        if (~same & ((rounded == 0) | (rounded == 1))).any():
            return False
        exact &= same.all(0)
    low, high = np.quantile(rows[:: 1 + len(rows) // SAMPLED_ROWS], [0.25, 0.75], axis=0)
    magnitude = np.maximum(abs(low), abs(high))
    return bool((exact | (np.finfo(np.float32).eps * magnitude <= RESOLUTION * (high - low))).all())


def _blocks(rows: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    return (rows[start : start + SPOOLED_ROWS] for start in range(0, len(rows), SPOOLED_ROWS))


def temporary_file(suffix: str) -> Path:
    """Create an empty file that is deleted when the program ends."""
    descriptor, name = tempfile.mkstemp(suffix, dir=_folder().name)
    os.close(descriptor)
    return Path(name)


def copied(stream: SupportsRead[bytes]) -> Path:
    """Copy a binary stream to a temporary file."""
    path = temporary_file(".table")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Windows cannot delete a file that is still mapped.
    return tempfile.TemporaryDirectory(prefix="pyro-maf-", ignore_cleanup_errors=True)
