"""Tables in files and streams, in the format that the first bytes indicate: csv, parquet, npy or npz."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import lzma
import math
import os
import re
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.checks import InputError
from pyro_maf._core.messages import listed, quoted, require, shown
from pyro_maf.tables.categories import Label
from pyro_maf.tables.columns import Cells, Column, is_missing, is_text, number_in
from pyro_maf.tables.layout import REAL_KINDS
from pyro_maf.tables.spool import copied, temporary_file

__all__ = ["ArraySource", "FileOrStream", "Source", "open_source"]

T = TypeVar("T")
FileOrStream: TypeAlias = str | os.PathLike[str] | BinaryIO
"""A path, "-" for standard input, or a binary stream."""

COMPRESSED: dict[bytes, Callable[[Path], gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile]] = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh\d1AY": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
OTHER_FORMATS = {
    rb"ARROW1|FEA1": "a Feather file",
    rb"\x89HDF": "an HDF5 file",
    rb"\x80[\2-\5]": "a pickle",
    rb"\xd0\xcf\x11\xe0": "a workbook",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"\s*\[?\s*\{": "JSON",
}
"""Patterns of the first bytes of files that are decompressed, and of formats that are rejected by name."""

NUMBERS_IN_A_BATCH = 2**21
BYTES_IN_A_BLOCK = 2**23
"""Size of a batch of rows, in numbers, and of a block of text, in bytes."""

INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")

DAMAGED = (EOFError, OSError, ValueError)
NO_ARRAY = (*DAMAGED, ArithmeticError, MemoryError, RecursionError, SyntaxError, TokenError, TypeError)
"""Errors of numpy for a damaged header, which it parses as Python literals, and for a truncated file."""
NO_NUMBERS = "damaged, truncated or not of numbers"

NO_ARCHIVE = (*DAMAGED, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""Errors of zipfile for a damaged archive, and for members with encryption or unsupported compression."""
LOCKED = "damaged, truncated or locked"


class Source:
    """A table in a file, read in batches. A subclass defines `names`, `holds_text` and `batches`.

    Attributes:
        label: Name of the file in error messages.
        names: Names of the columns.
        is_named: Whether the names come from the file; otherwise they are x1, x2, ...
        decimal: Decimal mark in texts, a point or a comma.
    """

    names: tuple[str, ...]
    is_named: bool = True
    decimal: str = "."

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each column by name, from 0."""
        return {name: place for place, name in enumerate(self.names)}

    def holds_text(self, name: str) -> bool | None:
        """True for a column of text, truth values or a dictionary; None if its cells have to be read to find out.

        A column that is neither one of these nor numeric raises a ValueError.
        """
        raise NotImplementedError

    def batches(self, names: Sequence[str]) -> Generator[list[Cells], None, None]:
        """Iterate over batches of rows of the columns `names`, as numpy or pyarrow arrays.

        The generator holds the file open: close it if it may end early.
        """
        raise NotImplementedError

    def column(self, name: str, categories: Sequence[Label] | None = None) -> Column:
        """Return a column, for `batches`, numeric or with these categories."""
        return Column(name, f"column {quoted(name)} of {self.label}", self.index[name], categories, self.decimal)

    def wrong(self, what: str) -> ValueError:
        """Return an error about the file as a whole."""
        return ValueError(f"read_table found {self.label} {what}")


class ArraySource(Source):
    """An .npy file, mapped into memory.

    Attributes:
        array: (rows, columns).
    """

    is_named = False

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        # Silences numpy's warnings about headers written by Python 2.
        with warnings.catch_warnings(action="ignore"), _reading(label, NO_ARRAY, NO_NUMBERS):
            array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind not in REAL_KINDS or array.ndim not in (1, 2):
            raise ValueError(
                f"read_table expected an array of real numbers of shape (rows, columns) in {label}, "
                f"got {shown(str(array.dtype))} of shape {array.shape}."
            )
        self.array = array if array.ndim == 2 else array[:, None]
        self.names = tuple(f"x{i}" for i in range(1, self.array.shape[1] + 1))

    def holds_text(self, name: str) -> bool | None:
        """Return False: an array has only numbers."""
        return False

    def batches(self, names: Sequence[str]) -> Generator[list[Cells], None, None]:
        """Iterate over blocks of the mapped array, column by column."""
        columns = [self.index[name] for name in names]
        size = max(1, NUMBERS_IN_A_BATCH // self.array.shape[1])
        for start in range(0, len(self.array), size):
            rows = np.asarray(self.array[start : start + size])
            yield [rows[:, column] for column in columns]


class ParquetSource(Source):
    """A Parquet file. An index written by pandas is not a column."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        from pyarrow.parquet import ParquetFile

        with _reading(label, _no_parquet()), ParquetFile(path) as file:
            self._schema = file.schema_arrow
            self.names = tuple(name for name in self._schema.names if not INDEX_OF_PANDAS.fullmatch(name))

    def holds_text(self, name: str) -> bool | None:
        """Return the answer from the schema."""
        from pyarrow import types

        kind = self._schema.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if is_text(value) or types.is_boolean(value):
            return True
        if types.is_integer(value) or types.is_floating(value) or types.is_decimal(value):
            return kind != value
        advice = " Days or seconds since the first of them are numbers." if types.is_temporal(kind) else ""
        raise ValueError(
            f"read_table expected columns of numbers, text or truth values, got {quoted(name)} of {shown(str(kind))} "
            f"in {self.label}: leave it out or convert it.{advice}"
        )

    def batches(self, names: Sequence[str]) -> Generator[list[Cells], None, None]:
        """Iterate over row groups, in parts, with dictionaries decoded."""
        from pyarrow.parquet import ParquetFile
        from pyarrow.types import is_dictionary

        size = max(1, NUMBERS_IN_A_BATCH // max(1, len(names)))
        with _reading(self.label, _no_parquet()), ParquetFile(self.path) as file:
            for batch in file.iter_batches(size, columns=list(names)):
                columns = [batch.column(name) for name in names]
                yield [column.dictionary_decode() if is_dictionary(column.type) else column for column in columns]


class CsvSource(Source):
    """UTF-8 text, one row per line, with cells separated by tabs, commas, semicolons, bars or single spaces.

    The first line is a header, unless it is a row of numbers like the others.
    """

    def __init__(self, path: Path, label: str, decimal: str = ".") -> None:
        super().__init__(path, label)
        self.decimal = decimal
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                first, second = itertools.islice(itertools.chain(filter(str.strip, file), ("", "")), 2)
                if "\0" in first:
                    raise csv.Error("it has bytes that are not text")
                self._delimiter = _delimiter_between(
                    re.sub("^# *", "", first), second, "\t;|" if decimal == "," else "\t,;|"
                )
                file.seek(0)
                rows = csv.reader(file, delimiter=self._delimiter)
                head = list(itertools.islice(((place, row) for place, row in enumerate(rows) if row), 2))
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._no_text(error) from None
        if not head:
            raise self.wrong("empty.")
        cells = [[cell.strip() for cell in row] for _, row in head]
        self.is_named = _is_header(cells[0], cells[1] if len(cells) > 1 else [], decimal)
        cells[0][0] = cells[0][0].lstrip("# ")  # numpy.savetxt writes names as a comment
        if not cells[0][0] and self._delimiter == " ":
            del cells[0][0]
        self.names = tuple(cells[0]) if self.is_named else tuple(f"x{i}" for i in range(1, len(cells[0]) + 1))
        self._rows_above = head[0][0] + 1 if self.is_named else 0

    def holds_text(self, name: str) -> bool | None:
        """Return None: the cells have to be read to find out."""
        return None

    def batches(self, names: Sequence[str]) -> Generator[list[Cells], None, None]:
        """Iterate over rows as parsed by pyarrow, every column as text."""
        import pyarrow
        from pyarrow import csv as arrow_csv

        try:
            # A reader left to the garbage collector is destroyed while its threads run, which aborts the process.
            with arrow_csv.open_csv(
                pyarrow.OSFile(str(self.path)),  # given a path, pyarrow would decompress by the suffix
                arrow_csv.ReadOptions(
                    use_threads=False,
                    block_size=BYTES_IN_A_BLOCK,
                    column_names=self.names,
                    skip_rows_after_names=self._rows_above,
                ),
                # No Python callbacks, such as a handler of ragged rows: a pyarrow thread that releases one after the
                # interpreter has ended would abort the process as well.
                arrow_csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pyarrow.string()),
                    include_columns=list(names),
                    strings_can_be_null=False,
                ),
            ) as reader:
                for batch in reader:
                    yield batch.columns
        except pyarrow.ArrowException as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> ValueError:
        """Convert an error of pyarrow to one about the file."""
        if "invalid UTF8" in str(error):
            return self._no_text(error)
        if (ragged := re.search(r"Row #(\d+): Expected \d+ columns, got (\d+)", str(error))) is None:
            return self.wrong(f"damaged: {_one_line(error)}")
        row = int(ragged[1]) - self._rows_above
        return InputError(
            f"read_table found {self.label} ragged: data row {row} (counted from 1) has {ragged[2]} cells where "
            f"{len(self.names)} were expected.",
            row=row - 1,
        )

    def _no_text(self, error: Exception) -> ValueError:
        advice = "" if isinstance(error, csv.Error) else " encoding= or --encoding reads text of another encoding."
        return self.wrong(f"to be neither csv in UTF-8 nor parquet, npy or npz: {_one_line(error)}{advice}")


def open_source(source: FileOrStream, array: str | None, decimal: str, encoding: str) -> Source:
    """Open the table in a file or stream, as `read_table` does; its first bytes determine the format.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is neither a path nor a binary stream.
        ValueError: If it is empty or damaged, or there is no such array.
    """
    path, label = _as_file(source)
    start = _first_bytes(path)
    if (decompress := _of_start(COMPRESSED, start)) is not None:
        with _reading(label, (OSError, EOFError, zlib.error, lzma.LZMAError)), decompress(path) as file:
            path = copied(file)
        start = _first_bytes(path)
    if not start:
        raise ValueError(f"read_table found {label} empty.")
    if start.startswith(b"PK\x03\x04"):
        return ArraySource(*_member_of(path, label, array))
    if array is not None:
        raise ValueError(f"read_table got array={array!r} for {label}, which is not an .npz file: leave it out.")
    if start.startswith(b"\x93NUMPY"):
        return ArraySource(path, label)
    if (other := _of_start(OTHER_FORMATS, start)) is not None:
        raise ValueError(f"read_table found {label} to be {other}: save the table as csv or parquet.")
    require("read_table", "pyarrow")
    if start.startswith(b"PAR1"):
        return ParquetSource(path, label)
    return CsvSource(_recoded(path, label, encoding), label, decimal)


def _as_file(source: FileOrStream) -> tuple[Path, str]:
    """Return a file with the content of `source`, and its label for errors."""
    if isinstance(source, str) and source == "-":
        if sys.stdin.isatty():
            raise ValueError("read_table expected a table on standard input, which is a terminal: pipe one in.")
        return copied(sys.stdin.buffer), "standard input"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_fifo():
            with open(path, "rb") as pipe:
                return copied(pipe), shown(str(path))
        if not path.is_file():
            actual = "a folder" if path.is_dir() else "a device" if path.exists() else "nothing"
            raise FileNotFoundError(f"read_table expected a file at {shown(str(path), 200)}, found {actual}.")
        return path, shown(path.name)
    stream = getattr(source, "buffer", source)
    if not hasattr(stream, "read") or isinstance(stream, io.TextIOBase):
        raise TypeError(
            f'read_table expected a path, "-" for standard input or a binary stream, got {type(source).__name__}.'
        )
    return copied(stream), "the stream"


def _of_start(formats: Mapping[bytes, T], start: bytes) -> T | None:
    """The value whose pattern matches the first bytes of a file, or None."""
    return next((value for pattern, value in formats.items() if re.match(pattern, start)), None)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _one_line(error: Exception) -> str:
    """Format another package's error message as the end of a sentence."""
    text = shown(" ".join(str(error).split()) or type(error).__name__, 200)
    return text.removesuffix(".") + "."


def _member_of(path: Path, label: str, array: str | None) -> tuple[Path, str]:
    """Extract an array of an .npz file to an .npy file; return its path and label for error messages."""
    with _reading(label, NO_ARCHIVE, LOCKED), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        is_workbook = "xl/workbook.xml" in archive.namelist()
        tables = [
            name for name in members if array is None and len(members) > 1 and _dimensions(archive, members[name]) == 2
        ]
    if is_workbook:
        raise ValueError(f"read_table found {label} to be a workbook: save the table as csv or parquet.")
    if not members:
        raise ValueError(f"read_table found a zip archive without arrays at {label}: it is not an .npz file.")
    chosen = _chosen(list(members), tables, label) if array is None else array
    if chosen not in members:
        raise ValueError(f"read_table found no array {chosen!r} in {label}, but {listed(list(members))}.")
    with _reading(label, NO_ARCHIVE, LOCKED), zipfile.ZipFile(path) as archive, archive.open(members[chosen]) as file:
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
    ignored = warnings.catch_warnings(action="ignore")
    with archive.open(member) as file, ignored, _reading(member, NO_ARRAY, NO_NUMBERS):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return len(read(file)[0])


@contextmanager
def _reading(label: str, errors: tuple[type[Exception], ...], what: str = "damaged or truncated") -> Iterator[None]:
    """Turn errors of a parser into one about the file."""
    try:
        yield
    except errors as error:
        raise ValueError(f"read_table found {label} {what}: {_one_line(error)}") from None


def _no_parquet() -> tuple[type[Exception], ...]:
    from pyarrow import ArrowException

    return ArrowException, OSError


def _recoded(path: Path, label: str, encoding: str) -> Path:
    """Return a file with the text in UTF-8: this one, or a temporary one if the encoding differs.

    pyarrow would let Python decode it in another thread, for which the interpreter does not wait at exit.
    """
    try:
        name = codecs.lookup(encoding).name
        if name in ("utf-8", "utf-8-sig"):
            return path
        target = temporary_file(".table")
        with open(path, encoding=name, newline="") as file, open(target, "w", encoding="utf-8", newline="") as copy:
            shutil.copyfileobj(file, copy)
        return target
    except LookupError:
        raise ValueError(
            f'read_table expected an encoding that Python knows, such as "latin-1" or "cp1252", got {encoding!r}.'
        ) from None
    except UnicodeError as error:
        raise ValueError(f"read_table found {label} not to be text in {encoding}: {_one_line(error)}") from None


def _delimiter_between(first: str, second: str, marks: str) -> str:
    """Detect which of the marks, or a space, separates the cells of two lines; the second line may be empty."""
    present = [mark for mark in marks if mark in first]
    if present:
        return max(present, key=first.count)
    # Spaces may also be part of a name.
    in_both = " " in first.strip() and (not second or second.count(" ") == first.count(" "))
    return " " if in_both else marks[1]


def _is_header(first: list[str], second: list[str], decimal: str) -> bool:
    """Return whether a row is a header: only text, some text above a number, or the column numbers."""
    above, below = ([_is_number(cell, decimal) for cell in row] for row in (first, second))
    if not any(above) or any(number and not name for name, number in zip(above, below, strict=False)):
        return True
    counts = [[str(i) for i in range(start, start + len(first))] for start in (0, 1)]
    return first in counts and not all(cell.isdecimal() for cell in second)


def _is_number(cell: str, decimal: str) -> bool:
    return not math.isnan(number_in(cell, decimal)) or is_missing(cell)
