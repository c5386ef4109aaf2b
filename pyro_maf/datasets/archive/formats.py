"""The table formats of the archive: readers, with errors of one line that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.extras import require
from pyro_maf.datasets.archive.lookup import reading

__all__ = ["LEAST_ROWS", "check_rows", "read_csv", "read_npy", "read_parquet", "read_text"]

LEAST_ROWS = 20


def read_npy(who: str, path: Path, columns: int) -> NDArray[Any]:
    """Map the rows of an .npy file into memory."""
    with reading(who, path, "an .npy file"):
        rows = np.lib.format.open_memmap(path, mode="r")
    return check_rows(who, path, rows, columns)


def read_csv(who: str, path: Path) -> NDArray[np.float64]:
    """Read the rows below the header line of a file of comma-separated numbers.

    The header is skipped, not parsed: that of HEPMASS may have another number of names than of columns.
    """
    require(who, "pyarrow")
    from pyarrow import csv

    with reading(who, path, "a csv file with a header line"):
        _check_header(path)
        table = csv.read_csv(path, csv.ReadOptions(skip_rows=1, autogenerate_column_names=True))
        return np.column_stack([column.to_numpy().astype(np.float64) for column in table.columns])


def read_text(who: str, path: Path, columns: int) -> NDArray[np.float64]:
    """Read the rows below the header line of a file of space-separated numbers."""
    with reading(who, path, "a text file of numbers below a header line"):
        _check_header(path)
        rows = np.loadtxt(path, skiprows=1, ndmin=2, encoding="utf-8")
    return check_rows(who, path, rows, columns)


def read_parquet(who: str, path: Path) -> dict[str, NDArray[Any]]:
    """Read the columns of a parquet file by name, without the row labels that pandas writes."""
    require(who, "pyarrow")
    from pyarrow import parquet

    with reading(who, path, "a parquet file"):
        table = parquet.read_table(path)
        names = [name for name in table.column_names if not name.startswith("__index_level_")]
        return {name: table[name].to_numpy() for name in names}


def check_rows(who: str, path: Path, rows: Any, columns: int) -> NDArray[Any]:
    """Return the rows if they are of `columns` finite numbers and enough to split, or raise."""
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
    """Refuse a first line of numbers: skipping it would drop a row."""
    with open(path, encoding="utf-8") as file:
        first = file.readline(10_000).replace(",", " ").split()
    try:
        [float(word) for word in first]
    except ValueError:
        return
    raise ValueError("its first line holds no names of columns")
