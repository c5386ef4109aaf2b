"""Any table of numbers as data and context: reading, and the description of its columns."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pyro_maf._core.text import listed, quoted, shown
from pyro_maf.tables.arrays import ArraySource
from pyro_maf.tables.columns import Column, Survey, encoded
from pyro_maf.tables.gaps import Gaps
from pyro_maf.tables.source import Source
from pyro_maf.tables.sources import open_source
from pyro_maf.tables.spool import Spool

__all__ = ["Table", "read_table"]

BYTES_IN_MEMORY = 2**29
MOST_COMPARED = 2000
"""Maximum number of names that are searched for one similar to an unknown name: each takes time."""


@dataclass(frozen=True, repr=False)
class Table:
    """Named columns of numbers, float32 or float64, one row an event.

    Attributes:
        data: (rows, D): an array or, for a table larger than half a gibibyte, a read-only `np.memmap`.
        context: (rows, C), or None without a context.
        names: Names of the D columns of data.
        context_names: Names of the C columns of context; that of a category is column=category.
        columns: Description of the columns in JSON values, which `read_table` takes to read another table in the same
            way: {"data": [name, ...], "context": [{"name": name, "categories": [category, ...] or None}, ...]}.
        label: Name of the file; "" for a table from elsewhere.
        rows: Number of each row in the file, counted from 1; None for all of them in their order.
        missing: Rows left out for missing values: their number, which, and in which columns; None if there are none.
    """

    data: np.ndarray[Any, Any]
    context: np.ndarray[Any, Any] | None
    names: tuple[str, ...]
    context_names: tuple[str, ...]
    columns: dict[str, Any]
    label: str = ""
    rows: np.ndarray[Any, Any] | None = None
    missing: Gaps | None = None

    def numbers(self, places: Any) -> Any:
        """Row numbers in the file, counted from 1, of the rows at `places` in this table, counted from 0."""
        return places + 1 if self.rows is None else self.rows[places]

    def __repr__(self) -> str:
        given = f" given {', '.join(self.context_names)}" if self.context_names else ""
        return f"Table({len(self.data)} rows of {', '.join(self.names)}{given})"


def read_table(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    columns: Sequence[str] | Mapping[str, Any] | None = None,
    context: Sequence[str] = (),
    categories: Sequence[str] = (),
    array: str | None = None,
    dtype: str | None = None,
    drop_missing: bool = False,
    decimal: str = ".",
    encoding: str = "utf-8",
) -> Table:
    r"""Read csv, tsv, parquet, npy or npz, which may be larger than memory.

    The first bytes determine the format. Text may be compressed by gzip; a header of names is optional. Columns
    without names are x1, x2, ... Numbers are rounded to float32 if its precision suffices, which it does not for a
    column of 5.4e6 +- 0.1 or of time stamps. More than half a gibibyte of them is stored in a temporary file that is
    deleted when the program ends, or mapped from the .npy file itself.

    Args:
        source: A path; "-" for standard input; or a binary stream.
        columns: The columns of data, in this order; by default all that are not context. Or the `columns` of another
            table: its columns are matched by name, with its categories, and further ones are ignored. Without a
            context, a table without names may also have the same number of columns.
        context: Columns that the distribution of the data depends on. One of text, of truth values or of a dictionary
            becomes a column of 0 and 1 for each of its categories, in alphabetical order.
        categories: Columns of context whose numbers are labels, such as 0 to 9, and so categories too.
        array: Name of the array in an .npz file; optional if only one has rows and columns.
        dtype: "float32" or "float64", for a table that must match another one; an array that is mapped from its file
            has the dtype of the file.
        drop_missing: Leave out rows with a missing value in one of these columns: an empty cell, NaN, null, or text
            such as NA; `Table.rows` has the numbers of the others.
        decimal: Decimal mark of text, "." or ",".
        encoding: Encoding of text, by a name of Python's, such as "latin-1".

    Returns:
        A `Table`.

    Cost:
        One pass over the file, after one over columns of context that may be text.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: For a source or a choice of columns of another type.
        ValueError: For a file that is empty, damaged or ragged; for columns that are unknown, repeated or without a
            name; for text among the data, missing values and those that are not finite, with the row, counted from 1,
            and the column, and how many are missing where; for categories that the other table did not have, or too
            many.
        ModuleNotFoundError: For csv and parquet without the `train` extra.

    Example:
        >>> import io
        >>> text = b"colour,length,width\nred,1.5,2\nblue,2.5,3\n"
        >>> table = read_table(io.BytesIO(text), context=["colour"])
        >>> table
        Table(2 rows of length, width given colour=blue, colour=red)
        >>> table.context.tolist()
        [[0.0, 1.0], [1.0, 0.0]]
        >>> read_table(io.BytesIO(b"width,length,colour\n9,8,red\n"), columns=table.columns).data.tolist()
        [[8.0, 9.0]]
    """
    if decimal not in (".", ","):
        raise ValueError(f'read_table expected decimal "." or ",", got {decimal!r}.')
    opened = open_source(source, array, decimal, encoding)
    _check_names(opened)
    if isinstance(columns, Mapping):
        if context or categories:
            raise ValueError("read_table got context beside a description of columns, which names it: leave it out.")
        data_columns, context_columns = _described(opened, columns)
    else:
        data_columns, context_columns = _chosen(opened, columns, context, categories)
    rows, gaps = _read(opened, [*data_columns, *context_columns], dtype, drop_missing)
    width = len(data_columns)
    return Table(
        data=rows[:, :width],
        context=rows[:, width:] if context_columns else None,
        names=tuple(column.name for column in data_columns),
        context_names=tuple(name for column in context_columns for name in column.encoded_names),
        columns={
            "data": [column.name for column in data_columns],
            "context": [{"name": column.name, "categories": column.categories} for column in context_columns],
        },
        label=opened.label,
        rows=np.delete(np.arange(1, gaps.length + 1), gaps.rows - 1) if len(gaps.rows) else None,
        missing=gaps if len(gaps.rows) else None,
    )


def _check_names(source: Source) -> None:
    name = _repeated(filter(None, source.names))
    if name is not None:
        raise ValueError(f"read_table expected names that differ, got two columns {quoted(name)} in {source.label}.")


def _repeated(names: Iterable[str]) -> str | None:
    """Return the first repeated name, if any."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _chosen(
    source: Source, columns: Sequence[str] | None, context: Sequence[str], categories: Sequence[str]
) -> tuple[list[Column], list[Column]]:
    """Return the requested columns of data and of context, or all the rest."""
    for name, value in (("columns", columns), ("context", context), ("categories", categories)):
        if isinstance(value, str) or not isinstance(value, (Sequence, type(None))):
            raise TypeError(f"read_table expected {name} to be a sequence of names, got {value!r}.")
    given = set(context)
    names = [name for name in source.names if name not in given] if columns is None else list(columns)
    _check_known(source, [*names, *context])
    twice = _repeated([*names, *context])
    if twice is not None:
        raise ValueError(f"read_table expected each column once, in columns or in context, got {quoted(twice)} twice.")
    for name in categories:
        if name not in context:
            raise ValueError(
                f"read_table expected categories among the columns of context, got {name!r}: add it there."
            )
    if not names:
        raise ValueError(f"read_table expected columns of data beside the context, got none in {source.label}.")
    return _numeric(source, names), _surveyed(source, context, categories)


def _numeric(source: Source, names: Sequence[str]) -> list[Column]:
    """Return columns of data, which must be numeric."""
    for name in names:
        if source.holds_text(name):
            raise ValueError(
                f"read_table expected data of numbers, got text in {_place(source, name)}: "
                "leave it out or make it context."
            )
    return _columns(source, names)


def _columns(source: Source, names: Sequence[str]) -> list[Column]:
    """Return columns of numbers."""
    return [Column(name, _place(source, name), decimal=source.decimal) for name in names]


def _surveyed(source: Source, names: Sequence[str], categories: Sequence[str]) -> list[Column]:
    """Return columns of context, with the categories of those that hold text or labels."""
    kinds = {name: source.holds_text(name) for name in names} | dict.fromkeys(categories, True)
    surveys = {
        name: Survey(name, _place(source, name), bool(kind), source.decimal)
        for name, kind in kinds.items()
        if kind is not False
    }
    if surveys:
        with closing(source.batches(list(surveys))) as batches:
            for batch in batches:
                for survey, cells in zip(surveys.values(), batch, strict=True):
                    survey.add(cells)
    plain = {column.name: column for column in _columns(source, names)}
    return [surveys[name].column() if name in surveys else plain[name] for name in names]


def _described(source: Source, description: Mapping[str, Any]) -> tuple[list[Column], list[Column]]:
    """Return the columns in the description of another table."""
    try:
        data = list(map(str, description["data"]))
        context = [(str(each["name"]), each["categories"]) for each in description["context"]]
        if any(categories is not None and not categories for _, categories in context):
            raise LookupError("a column of no categories")
    except (LookupError, TypeError):
        raise ValueError(
            "read_table expected columns as names or as the columns of another table, got "
            f"{shown(str(description), 200)}."
        ) from None
    if not source.is_named and not context and len(data) == len(source.names):
        source.names = tuple(data)
    _check_known(source, [*data, *(name for name, _ in context)])
    for name, _ in context:
        source.holds_text(name)
    return _numeric(source, data), [
        Column(name, _place(source, name), categories, source.decimal) for name, categories in context
    ]


def _check_known(source: Source, names: Sequence[str]) -> None:
    known = set(source.names)
    unknown = next((name for name in names if name == "" or name not in known), None)
    if unknown is None:
        return
    if unknown == "":
        place = source.names.index("") + 1 if "" in source.names else 1
        raise ValueError(
            f"read_table expected a name for every column, got none for column {place} of {source.label}: "
            "name it, or choose which columns to read."
        )
    near = difflib.get_close_matches(unknown, source.names, 1) if len(source.names) <= MOST_COMPARED else []
    hint = f"did you mean {quoted(near[0])}?" if near else f"it has {listed(source.names)}."
    named = "" if source.is_named else ", whose columns have no names of their own"
    raise ValueError(f"read_table found no column {quoted(unknown)} in {source.label}{named}: {hint}")


def _place(source: Source, name: str) -> str:
    return f"column {quoted(name)} of {source.label}"


def _read(
    source: Source, columns: Sequence[Column], dtype: str | None, drop_missing: bool
) -> tuple[np.ndarray[Any, Any], Gaps]:
    """Read and encode the columns, (rows, numbers); also return their missing values.

    Raises:
        ValueError: For missing values, unless they are to be dropped, and if no rows remain.
    """
    names = [column.name for column in columns]
    mapped = None if drop_missing else _mapped(source, names)
    gaps = Gaps(columns)
    width = sum(len(column.encoded_names) for column in columns)
    with Spool(width, BYTES_IN_MEMORY) as spool, closing(source.batches(names)) as batches:
        for batch in batches:
            rows = encoded(columns, batch, gaps.length + 1)
            is_whole = gaps.add(rows, batch)
            if mapped is None and (drop_missing or not gaps.first):
                spool.append(rows if is_whole.all() else rows[is_whole])
    if not gaps.length:
        raise ValueError(f"read_table expected rows of data, got none in {source.label}.")
    if gaps.first and not drop_missing:
        raise ValueError(
            f"{gaps.first}: fill it in, drop that row or leave the column out. In all, {gaps}. drop_missing=True, or "
            "--drop-missing, leaves such rows out."
        )
    if len(gaps.rows) == gaps.length:
        raise ValueError(f"read_table expected rows without missing values, got none in {source.label}: {gaps}.")
    return spool.rows(dtype) if mapped is None else mapped, gaps


def _mapped(source: Source, names: Sequence[str]) -> np.ndarray[Any, Any] | None:
    """Return the array mapped from the file if it is large and has exactly these columns in floating point."""
    if not isinstance(source, ArraySource) or names != list(source.names) or source.array.dtype.kind != "f":
        return None
    return source.array if source.array.nbytes > BYTES_IN_MEMORY else None
