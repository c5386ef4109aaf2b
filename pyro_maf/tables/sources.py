"""Tables in files: location and format."""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_maf._core.extras import require
from pyro_maf._core.text import quoted, shown
from pyro_maf.tables import source as bounds
from pyro_maf.tables.arrays import ArraySource, member_of
from pyro_maf.tables.cells import is_text
from pyro_maf.tables.source import Source, one_line
from pyro_maf.tables.spool import copied
from pyro_maf.tables.text import CsvSource, recoded

__all__ = ["ParquetSource", "open_source"]

INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")


class ParquetSource(Source):
    """A Parquet file. An index that pandas wrote is not a column."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        from pyarrow.parquet import ParquetFile

        with self._reading(), ParquetFile(path) as file:
            self._schema = file.schema_arrow
            self.names = tuple(name for name in self._schema.names if not INDEX_OF_PANDAS.fullmatch(name))

    def holds_text(self, name: str) -> bool | None:
        """Return the answer of the schema."""
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

    def batches(self, names: Sequence[str]) -> Generator[list[Any], None, None]:
        """Iterate over row groups, in parts."""
        from pyarrow.parquet import ParquetFile

        size = max(1, bounds.NUMBERS_IN_A_BATCH // max(1, len(names)))
        with self._reading(), ParquetFile(self.path) as file:
            for batch in file.iter_batches(size, columns=list(names)):
                yield [batch.column(name) for name in names]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError) as error:
            raise self.wrong(f"damaged or truncated: {one_line(error)}") from None


def open_source(source: Any, array: str | None, decimal: str, encoding: str) -> Source:
    """Open the table in a file or stream; its first bytes determine the format.

    Args:
        source: A path; "-" for standard input; or a binary stream. A stream is copied to a temporary file.
        array: Name of the array in an .npz file; optional if only one has rows and columns.
        decimal, encoding: As in `read_table`.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is none of these.
        ValueError: If it is empty or damaged, or there is no such array.
    """
    path, label = _as_file(source)
    start = _first_bytes(path)
    if start.startswith(b"\x1f\x8b"):
        path = _unzipped(path, label)
        start = _first_bytes(path)
    if not start:
        raise ValueError(f"read_table found {label} empty.")
    if start.startswith(b"PK\x03\x04"):
        return ArraySource(*member_of(path, label, array))
    if array is not None:
        raise ValueError(f"read_table got array={array!r} for {label}, which is no .npz file: leave it out.")
    if start.startswith(b"\x93NUMPY"):
        return ArraySource(path, label)
    require("read_table", "pyarrow")
    if start.startswith(b"PAR1"):
        return ParquetSource(path, label)
    return CsvSource(recoded(path, label, encoding), label, decimal)


def _as_file(source: Any) -> tuple[Path, str]:
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
            found = "a folder" if path.is_dir() else "a device" if path.exists() else "nothing"
            raise FileNotFoundError(f"read_table expected a file at {shown(str(path), 200)}, found {found}.")
        return path, shown(path.name)
    stream = getattr(source, "buffer", source)
    if not hasattr(stream, "read") or isinstance(stream, io.TextIOBase):
        raise TypeError(
            f'read_table expected a path, "-" for standard input or a binary stream, got {type(source).__name__}.'
        )
    return copied(stream), "the stream"


def _unzipped(path: Path, label: str) -> Path:
    try:
        with gzip.open(path) as file:
            return copied(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"read_table found {label} damaged or truncated: {one_line(error)}") from None


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)
