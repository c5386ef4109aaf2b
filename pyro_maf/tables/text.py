"""Tables as text: delimiter, header, and rows in batches."""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyro_maf.tables.cells import is_missing, number_in
from pyro_maf.tables.source import Source, one_line
from pyro_maf.tables.spool import temporary_file

__all__ = ["CsvSource", "recoded"]

BYTES_IN_A_BLOCK = 2**23


class CsvSource(Source):
    """Text in UTF-8, a row a line, with cells separated by tabs, commas, semicolons or single spaces.

    The first line is a header, unless it is a row of numbers like the others.
    """

    def __init__(self, path: Path, label: str, decimal: str = ".") -> None:
        super().__init__(path, label)
        self.decimal = decimal
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                first, second = itertools.islice(itertools.chain(filter(str.strip, file), ("", "")), 2)
                if "\0" in first:
                    raise csv.Error("it holds bytes that are no text")
                self._delimiter = _delimiter_between(first, second, "\t;" if decimal == "," else "\t,;")
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
        self.names = tuple(cells[0]) if self.is_named else tuple(f"x{i}" for i in range(1, len(cells[0]) + 1))
        self._rows_above = head[0][0] + 1 if self.is_named else 0

    def holds_text(self, name: str) -> bool | None:
        """Return None: the cells have to be read for that."""
        return None

    def batches(self, names: Sequence[str]) -> Generator[list[Any], None, None]:
        """Iterate over rows as pyarrow parses them, every column as text."""
        import pyarrow
        from pyarrow import csv as arrow_csv

        try:
            # A reader left to the garbage collector is destroyed while its threads run, which aborts the process.
            with arrow_csv.open_csv(
                self.path,
                arrow_csv.ReadOptions(
                    use_threads=False,
                    block_size=BYTES_IN_A_BLOCK,
                    column_names=self.names,
                    skip_rows_after_names=self._rows_above,
                ),
                # Nothing of Python's, such as a handler of ragged rows: a thread of pyarrow's that let go of it after
                # the interpreter's end would end the process as well.
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
            raise self._ragged() or self.wrong(f"damaged: {one_line(error)}") from None

    def _ragged(self) -> ValueError | None:
        """Error for the first row whose number of cells is not that of the columns; None if there is none."""
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(self._rows(file), 1):
                    if len(row) != len(self.names):
                        return self.wrong(
                            f"ragged: data row {number} (counted from 1) has {len(row)} cells where "
                            f"{len(self.names)} were expected."
                        )
        except (UnicodeDecodeError, csv.Error) as error:
            return self._no_text(error)
        return None

    def _rows(self, file: Any) -> Iterator[list[str]]:
        """Iterate over the rows of data, without empty lines, as pyarrow does."""
        rows = csv.reader(file, delimiter=self._delimiter)
        return filter(None, itertools.islice(rows, self._rows_above, None))

    def _no_text(self, error: Exception) -> ValueError:
        advice = " encoding= or --encoding reads text of another encoding." if isinstance(error, UnicodeError) else ""
        return self.wrong(f"to be neither csv in UTF-8 nor parquet, npy or npz: {one_line(error)}{advice}")


def recoded(path: Path, label: str, encoding: str) -> Path:
    """Return a file of text in UTF-8: this one, or a temporary one if it has another encoding.

    pyarrow would have Python decode it in another thread, for which the interpreter does not wait at exit.

    Raises:
        ValueError: For an encoding that Python lacks, and text of another encoding.
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
        raise ValueError(f"read_table found {label} not to be text in {encoding}: {one_line(error)}") from None


def _delimiter_between(first: str, second: str, marks: str) -> str:
    """Detect which of the marks, or a space, separates the cells of two lines; the second line may be empty."""
    found = [mark for mark in marks if mark in first]
    if found:
        return max(found, key=first.count)
    # Spaces may also be part of a name.
    in_both = " " in first.strip() and (not second or second.count(" ") == first.count(" "))
    return " " if in_both else marks[1]


def _is_header(first: list[str], second: list[str], decimal: str) -> bool:
    """True if a row is a header: only text, a text above a number, or the numbers of the columns."""
    above, below = ([_is_number(cell, decimal) for cell in row] for row in (first, second))
    if not any(above) or any(number and not name for name, number in zip(above, below, strict=False)):
        return True
    counts = [[str(i) for i in range(start, start + len(first))] for start in (0, 1)]
    return first in counts and not all(cell.isdecimal() for cell in second)


def _is_number(cell: str, decimal: str) -> bool:
    return not math.isnan(number_in(cell, decimal)) or is_missing(cell)
