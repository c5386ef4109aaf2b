"""Files with a table in them: what format they have, what their columns are called, and their rows in batches."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import itertools
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyro_maf.datasets.cells import is_missing, number_in
from pyro_maf.datasets.spool import temporary_file

__all__ = ["ArraySource", "CsvSource", "ParquetSource", "Source", "open_source"]

NUMBERS_IN_A_BATCH = 2**21
BYTES_IN_A_BLOCK = 2**23
INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")


class Source:
    """A table in a file, read in batches of columns. A subclass gives `names`, `holds_text` and `batches`.

    Attributes:
        label: What errors call it.
        names: Of its columns.
        is_named: Whether the names are its own; otherwise they are x1, x2, ...
    """

    names: tuple[str, ...]
    is_named: bool = True

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label

    def holds_text(self, name: str) -> bool | None:
        """Whether a column is of text, truth values or a dictionary; None where only its cells can tell.

        Raises:
            ValueError: If it is neither of these nor of numbers.
        """
        raise NotImplementedError

    def batches(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """The columns called `names`, a batch of rows at a time: arrays of numpy, or of pyarrow.

        Raises:
            ValueError: If the file is damaged.
        """
        raise NotImplementedError

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"read_table found {self.label} {what}")


class ArraySource(Source):
    """An .npy file, mapped into memory.

    Attributes:
        array: (rows, columns).
    """

    is_named = False

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError) as error:
            raise self._wrong(f"damaged, truncated or not of numbers: {_one_line(error)}") from None
        if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
            raise ValueError(
                f"read_table expected an array of real numbers of shape (rows, columns) in {label}, "
                f"got {array.dtype} of shape {array.shape}."
            )
        self.array: np.ndarray[Any, Any] = array if array.ndim == 2 else array[:, None]
        self.names = tuple(f"x{i}" for i in range(1, self.array.shape[1] + 1))

    def holds_text(self, name: str) -> bool | None:
        """Never: an array has numbers alone."""
        return False

    def batches(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Parts of the mapped array, column by column."""
        columns = [self.names.index(name) for name in names]
        size = max(1, NUMBERS_IN_A_BATCH // self.array.shape[1])
        for start in range(0, len(self.array), size):
            rows = np.asarray(self.array[start : start + size])
            yield [rows[:, column] for column in columns]


class ParquetSource(Source):
    """A Parquet file. An index that pandas left in it is no column."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        import pyarrow.parquet

        with self._reading():
            self._file = pyarrow.parquet.ParquetFile(path)
            self._schema = self._file.schema_arrow
        self.names = tuple(name for name in self._schema.names if not INDEX_OF_PANDAS.fullmatch(name))

    def holds_text(self, name: str) -> bool | None:
        """As the schema says."""
        from pyarrow import types

        kind = self._schema.field(name).type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
            return False
        if any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_boolean)):
            return True
        if types.is_dictionary(kind):
            return True
        raise ValueError(
            f"read_table expected columns of numbers, text or truth values, got {name!r} of {kind} in {self.label}: "
            "leave it out or convert it."
        )

    def batches(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Row groups, read in parts."""
        size = max(1, NUMBERS_IN_A_BATCH // max(1, len(names)))
        with self._reading():
            for batch in self._file.iter_batches(size, columns=list(names)):
                yield [batch.column(name) for name in names]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError) as error:
            raise self._wrong(f"damaged or truncated: {_one_line(error)}") from None


class CsvSource(Source):
    """Text in UTF-8, a row a line, its cells apart by tabs, commas, semicolons or single spaces.

    The first line holds names, unless it has as many numbers as the others.
    """

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                first, second = itertools.islice(itertools.chain(filter(str.strip, file), ("", "")), 2)
                if "\0" in first:
                    raise csv.Error("it holds bytes that are no text")
                self._delimiter = _delimiter_between(first, second)
                file.seek(0)
                rows = csv.reader(file, delimiter=self._delimiter)
                head = list(itertools.islice(((place, row) for place, row in enumerate(rows) if row), 2))
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._wrong(f"to be neither csv in UTF-8 nor parquet, npy or npz: {_one_line(error)}") from None
        if not head:
            raise self._wrong("empty.")
        cells = [[cell.strip() for cell in row] for _, row in head]
        self.is_named = _is_header(cells[0], cells[1] if len(cells) > 1 else [])
        cells[0][0] = cells[0][0].lstrip("# ")  # numpy.savetxt marks names as a comment
        self.names = tuple(cells[0]) if self.is_named else tuple(f"x{i}" for i in range(1, len(cells[0]) + 1))
        self._rows_above = head[0][0] + 1 if self.is_named else 0

    def holds_text(self, name: str) -> bool | None:
        """None: only the cells can tell."""
        return None

    def batches(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Rows as pyarrow parses them, every column as text."""
        import pyarrow
        from pyarrow import csv as arrow_csv

        ragged: list[Any] = []

        def remember(row: Any) -> str:
            ragged.append(row)
            return "error"

        try:
            reader = arrow_csv.open_csv(
                self.path,
                arrow_csv.ReadOptions(
                    use_threads=False,  # with threads pyarrow does not say which row is ragged
                    block_size=BYTES_IN_A_BLOCK,
                    column_names=self.names,
                    skip_rows_after_names=self._rows_above,
                ),
                arrow_csv.ParseOptions(
                    delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=remember
                ),
                arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pyarrow.string()),
                    include_columns=list(names),
                    strings_can_be_null=False,
                ),
            )
            for batch in reader:
                yield batch.columns
        except pyarrow.ArrowException as error:
            if ragged:
                raise self._wrong(
                    f"ragged: data row {ragged[0].number - self._rows_above} (counted from 1) has "
                    f"{ragged[0].actual_columns} cells where {ragged[0].expected_columns} were expected."
                ) from None
            raise self._wrong(f"damaged: {_one_line(error)}") from None


def open_source(source: Any, array: str | None = None) -> Source:
    """The table in a file or stream, whose format its first bytes tell.

    Args:
        source: A path; "-" for standard input; or a binary stream. What is no file yet is copied to a temporary one.
        array: Which array of an .npz file; it may be left out where only one has rows and columns.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is none of these.
        ValueError: If there is nothing in it, it is damaged, or there is no such array.
    """
    path, label = _as_file(source)
    start = _first_bytes(path)
    if start.startswith(b"\x1f\x8b"):
        path = _unzipped(path, label)
        start = _first_bytes(path)
    if not start:
        raise ValueError(f"read_table found {label} empty.")
    if start.startswith(b"PK\x03\x04"):
        return ArraySource(*_member(path, label, array))
    if array is not None:
        raise ValueError(f"read_table got array={array!r} for {label}, which is no .npz file: leave it out.")
    if start.startswith(b"\x93NUMPY"):
        return ArraySource(path, label)
    _check_pyarrow(label)
    return (ParquetSource if start.startswith(b"PAR1") else CsvSource)(path, label)


def _check_pyarrow(label: str) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            f"read_table needs pyarrow for {label}, which is not installed: pip install pyro-maf[train].",
            name="pyarrow",
        )


def _as_file(source: Any) -> tuple[Path, str]:
    """A file with what `source` holds, and what errors call it."""
    if isinstance(source, str) and source == "-":
        if sys.stdin.isatty():
            raise ValueError("read_table expected a table on standard input, which is a terminal: pipe one in.")
        return _copied(sys.stdin.buffer), "standard input"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing"
            raise FileNotFoundError(f"read_table expected a file at {path}, found {found}.")
        return path, path.name
    stream = getattr(source, "buffer", source)
    if not hasattr(stream, "read") or isinstance(stream, io.TextIOBase):
        raise TypeError(
            f'read_table expected a path, "-" for standard input or a binary stream, got {type(source).__name__}.'
        )
    return _copied(stream), "the stream"


def _copied(stream: Any) -> Path:
    path = temporary_file(".table")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    return path


def _unzipped(path: Path, label: str) -> Path:
    try:
        with gzip.open(path) as file:
            return _copied(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"read_table found {label} damaged or truncated: {_one_line(error)}") from None


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _member(path: Path, label: str, array: str | None) -> tuple[Path, str]:
    """An array of an .npz file as an .npy file, and what errors call it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            if "xl/workbook.xml" in archive.namelist():
                raise ValueError(f"read_table found a workbook at {label}: save the sheet with the table as csv.")
            if not members:
                raise ValueError(f"read_table found a zip archive without arrays at {label}: it is no .npz file.")
            chosen = _chosen_member(archive, members, label) if array is None else array
            if chosen not in members:
                raise ValueError(f"read_table found no array {array!r} in {label}, but {', '.join(members)}.")
            with archive.open(members[chosen]) as file:
                return _copied(file), f"{chosen} of {label}"
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"read_table found {label} damaged or truncated: {_one_line(error)}") from None


def _chosen_member(archive: zipfile.ZipFile, members: dict[str, str], label: str) -> str:
    """The only array or, where there are several, the only one with rows and columns."""
    tables = [name for name, member in members.items() if _dimensions(archive, member) == 2]
    for candidates in (list(members), tables):
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f"read_table found several arrays in {label}: choose one of {', '.join(members)} by array=, or on the command "
        f"line as {label}:{next(iter(members))}."
    )


def _dimensions(archive: zipfile.ZipFile, member: str) -> int:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return len(read(file)[0])


def _delimiter_between(first: str, second: str) -> str:
    """What the cells of two lines are apart by; a comma where that is nothing."""
    marks = [mark for mark in "\t,;" if mark in first]
    if marks:
        return max(marks, key=first.count)
    # Spaces may also be those of a name.
    in_both = " " in first.strip() and (not second or second.count(" ") == first.count(" "))
    return " " if in_both else ","


def _is_header(first: list[str], second: list[str]) -> bool:
    """Whether a row holds names: of texts alone, a text above a number, or numbers that count the columns."""
    if not any(map(_is_number, first)):
        return True
    if any(_is_text(above) and _is_number(below) for above, below in zip(first, second, strict=False)):
        return True
    counts = [[str(i) for i in range(start, start + len(first))] for start in (0, 1)]
    return first in counts and not all(cell.isdecimal() for cell in second)


def _is_number(cell: str) -> bool:
    return not math.isnan(number_in(cell)) or is_missing(cell)


def _is_text(cell: str) -> bool:
    return not _is_number(cell)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".") + "."
