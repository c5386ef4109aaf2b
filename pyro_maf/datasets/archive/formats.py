"""The archive's files: their locations, the formats of their tables, and one-line errors that name the file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_ROWS", "ZENODO", "check_rows", "locate", "read_npy", "read_text", "reading"]

S = TypeVar("S", bound=np.generic)
ZENODO = "data.tar.gz of https://zenodo.org/records/1161203 (Preprocessed datasets for MAF experiments)"
LONGEST_REASON = 160
LEAST_ROWS = 20
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, MemoryError, zlib.error)
"""Errors of the readers of numpy, pyarrow, h5py and gzip for a file of another format."""


def locate(who: str, root: str | os.PathLike[str], *names: str, source: str) -> Path:
    """Return the first of the files `names` under `root`.

    Args:
        who: The loader, for error messages.
        root: The folder with one folder per set.
        names: Paths under `root`, the preferred one first.
        source: Source of the file.

    Raises:
        FileNotFoundError: If none of the files exists, with the expected path and its source.
    """
    paths = [Path(root, name) for name in names]
    for path in paths:
        if path.is_file():
            return path
    others = "".join(f" or {path.name}" for path in paths[1:])
    present = "a folder" if paths[0].is_dir() else "nothing"
    raise FileNotFoundError(
        f"{who} expected a file at {paths[0]}{others}, found {present}: get it from {source} and put it there."
    )


@contextmanager
def reading(who: str, path: Path, kind: str) -> Iterator[None]:
    """Convert errors of a reader to one line that names the file.

    Args:
        who: The loader that reads.
        path: The file.
        kind: Its expected format, with an article.

    Raises:
        ValueError: If the file is empty, or the block fails because it is damaged or of another format.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{who} expected {path} to be {kind}, got an empty file.")
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(
            f"{who} expected {path} to be {kind}, got one that is damaged, truncated or of another format: "
            f"{_line(error)}."
        ) from None


def read_npy(who: str, path: Path, columns: int) -> NDArray[np.generic]:
    """Map the rows of an .npy file into memory."""
    with reading(who, path, "an .npy file"):
        rows = np.lib.format.open_memmap(path, mode="r")
    return check_rows(who, path, rows, columns)


def read_text(who: str, path: Path, delimiter: str | None = None) -> NDArray[np.float64]:
    """Read the rows of a text file of numbers below its header line, separated by spaces unless otherwise specified.

    The header is skipped, not parsed: in HEPMASS the number of names may differ from the number of columns.
    """
    with reading(who, path, "a text file of numbers below a header line"):
        _check_header(path)
        return np.loadtxt(path, delimiter=delimiter, skiprows=1, ndmin=2, encoding="utf-8")


def check_rows(who: str, path: Path, rows: NDArray[S], columns: int) -> NDArray[S]:
    """Return the rows if they have `columns` finite numbers and there are enough to split; otherwise raise."""
    if rows.dtype.kind not in "fiu" or rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{who} expected rows of {columns} numbers in {path}, got {rows.dtype} of shape {rows.shape}.")
    if len(rows) < LEAST_ROWS:
        raise ValueError(f"{who} expected at least {LEAST_ROWS} rows in {path}, got {len(rows)}: is it the whole file?")
    wrong = np.argwhere(~np.isfinite(rows))
    if len(wrong):
        row, column = (int(index) for index in wrong[0])
        raise ValueError(
            f"{who} expected finite numbers in {path}, got {rows[row, column]} in row {row}, column {column}."
        )
    return np.asarray(rows)


def _check_header(path: Path) -> None:
    """Raise if the first line holds numbers: skipping it would drop a row."""
    with open(path, encoding="utf-8") as file:
        first = file.readline(10_000).replace(",", " ").split()
    try:
        [float(word) for word in first]
    except ValueError:
        return
    raise ValueError("its first line holds no names of columns")


def _line(error: Exception) -> str:
    """Shorten an error message to one line."""
    return " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
