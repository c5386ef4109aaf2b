"""Files of numpy arrays: .npy, and the members of .npz."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from pyro_maf._core.text import listed, shown
from pyro_maf.tables import source as bounds
from pyro_maf.tables.source import Source, one_line
from pyro_maf.tables.spool import copied

__all__ = ["ArraySource", "member_of"]

NO_ARRAY = (
    ArithmeticError,
    EOFError,
    MemoryError,
    OSError,
    RecursionError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)
"""Errors of numpy for a damaged header, which it parses as Python literals, and for a truncated file."""

NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError)
"""Errors of zipfile for a damaged archive, and for members with encryption or unsupported compression."""


class ArraySource(Source):
    """An .npy file, mapped into memory.

    Attributes:
        array: (rows, columns).
    """

    is_named = False

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        with _reading_array(label):
            array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
            raise ValueError(
                f"read_table expected an array of real numbers of shape (rows, columns) in {label}, "
                f"got {shown(str(array.dtype))} of shape {array.shape}."
            )
        self.array = array if array.ndim == 2 else array[:, None]
        self.names = tuple(f"x{i}" for i in range(1, self.array.shape[1] + 1))

    def holds_text(self, name: str) -> bool | None:
        """Return False: an array has only numbers."""
        return False

    def batches(self, names: Sequence[str]) -> Generator[list[Any], None, None]:
        """Iterate over blocks of the mapped array, column by column."""
        places = {name: place for place, name in enumerate(self.names)}
        columns = [places[name] for name in names]
        size = max(1, bounds.NUMBERS_IN_A_BATCH // self.array.shape[1])
        for start in range(0, len(self.array), size):
            rows = np.asarray(self.array[start : start + size])
            yield [rows[:, column] for column in columns]


def member_of(path: Path, label: str, array: str | None) -> tuple[Path, str]:
    """Extract an array of an .npz file to an .npy file; also return its label for errors.

    Raises:
        ValueError: If there is no such array, the choice is ambiguous, or the file is damaged.
    """
    with _reading_archive(label), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        is_workbook = "xl/workbook.xml" in archive.namelist()
        tables = [
            name for name in members if array is None and len(members) > 1 and _dimensions(archive, members[name]) == 2
        ]
    if is_workbook:
        raise ValueError(f"read_table found a workbook at {label}: save the sheet with the table as csv.")
    if not members:
        raise ValueError(f"read_table found a zip archive without arrays at {label}: it is no .npz file.")
    chosen = _chosen(list(members), tables, label) if array is None else array
    if chosen not in members:
        raise ValueError(f"read_table found no array {chosen!r} in {label}, but {listed(list(members))}.")
    with _reading_archive(label), zipfile.ZipFile(path) as archive, archive.open(members[chosen]) as file:
        return copied(file), f"{shown(chosen)} of {label}"


def _chosen(members: list[str], tables: list[str], label: str) -> str:
    """Return the only array or, of several, the only one with rows and columns."""
    for candidates in (members, tables):
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f"read_table found several arrays in {label}: choose one of {listed(members)} by array=, or on the command "
        f"line as {label}:{shown(members[0])}."
    )


def _dimensions(archive: zipfile.ZipFile, member: str) -> int:
    with archive.open(member) as file, _reading_array(member):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return len(read(file)[0])


@contextmanager
def _reading_array(label: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # A warning about headers that Python 2 wrote.
            warnings.simplefilter("ignore")
            yield
    except NO_ARRAY as error:
        raise ValueError(f"read_table found {label} damaged, truncated or not of numbers: {one_line(error)}") from None


@contextmanager
def _reading_archive(label: str) -> Iterator[None]:
    try:
        yield
    except NO_ARCHIVE as error:
        raise ValueError(f"read_table found {label} damaged, truncated or locked: {one_line(error)}") from None
