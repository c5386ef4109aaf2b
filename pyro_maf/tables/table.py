"""Reading of tables of numbers into data and context, with a description of their columns."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.checks import InputError
from pyro_maf._core.messages import listed, quoted
from pyro_maf.tables.categories import Categories
from pyro_maf.tables.columns import Cells, Column, Survey
from pyro_maf.tables.layout import NAMELESS, FloatArray, Layout
from pyro_maf.tables.sources import ArraySource, FileOrStream, Source, open_source
from pyro_maf.tables.spool import Spool

__all__ = ["Gaps", "Table", "read_table"]

BYTES_IN_MEMORY = 2**29
MOST_COMPARED = 2000
"""Maximum number of names that are searched for one similar to an unknown name, since each takes time."""
MOST_ROWS, MOST_COLUMNS = 3, 5
"""Number of rows, and of columns, with missing values that a message names."""


class Gaps:
    """Missing values in the columns of a table, collected batch by batch.

    Attributes:
        length: Number of rows.
        rows: Numbers of the rows with a missing value, counted from 1.
        first: Column, row, counted from 1, and description of the first missing value, for an error message; or None.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.length = 0
        self.rows = np.empty(0, np.int64)
        self.first: tuple[Column, int, str] | None = None
        self._columns = columns
        widths = [len(column.encoded_names) for column in columns]
        self._starts = np.cumsum([0, *widths[:-1]])
        self._counts = np.zeros(len(columns), np.int64)
        self._examples: dict[int, list[int]] = {}

    def add(self, numbers: NDArray[np.float64], cells: Sequence[Cells]) -> NDArray[np.bool_]:
        """Record a batch of cells, encoded as numbers with NaN for missing values; return the mask of complete rows."""
        before, self.length = self.length, self.length + len(numbers)
        missing = np.isnan(numbers)
        if not missing.any():
            return np.ones(len(numbers), bool)
        missing = missing[:, self._starts]
        gone = np.asarray(missing.any(1))
        if not self.first:
            row = int(gone.argmax())
            place = int(missing[row].argmax())
            column = self._columns[place]
            self.first = column, before + 1 + row, column.complaint(cells[place], row, before + 1)
        self.rows = np.concatenate([self.rows, np.flatnonzero(gone) + before + 1])
        self._counts += missing.sum(0)
        for place in np.flatnonzero(missing.any(0)).tolist():
            examples = self._examples.setdefault(place, [])
            if len(examples) <= MOST_ROWS:
                rows = np.flatnonzero(missing[:, place])[: MOST_ROWS + 1] + before + 1
                examples.extend(rows.tolist())
        return ~gone

    def error(self) -> InputError | None:
        """Error about the first missing value, with the total number; None if there is none."""
        if self.first is None:
            return None
        column, row, complaint = self.first
        return column.error(
            f"{complaint}: fill it in, drop that row or leave the column out. In all, {self}. drop_missing=True, or "
            "--drop-missing, leaves such rows out.",
            row,
        )

    def __str__(self) -> str:
        most = np.argsort(-self._counts, kind="stable")[:MOST_COLUMNS].tolist()
        parts = [self._of_column(place) for place in most if self._counts[place]]
        more = int((self._counts > 0).sum()) - len(parts)
        listed = ", ".join(parts) + (f" and {more:,} more columns" if more else "")
        rows = "1 row has" if len(self.rows) == 1 else f"{len(self.rows):,} rows have"
        return f"of {self.length:,} rows, {rows} a missing value: {listed}"

    def _of_column(self, place: int) -> str:
        count, examples = int(self._counts[place]), self._examples[place]
        rows = ", ".join(map(str, examples[:MOST_ROWS])) + ", ..." * (len(examples) > MOST_ROWS)
        return f"{quoted(self._columns[place].name)} {count:,} (row{'s' * (count > 1)} {rows})"


@dataclass(frozen=True, repr=False)
class Table:
    """Named columns of numbers, float32 or float64, one event per row.

    Attributes:
        data: (rows, D): an array or, for a table larger than half a gibibyte, a read-only `np.memmap`.
        context: (rows, C), or None without a context.
        layout: Names of the data columns, and the categories of those that `data` holds as numbers 0, 1, ...
        context_layout: Names of the context columns, and the categories of those that are one-hot. Pass both layouts to
            `read_table` to read another table in the same way.
        label: Name of the file; "" for a table from elsewhere.
        rows: Number of each row in the file, counted from 1; None for all rows in order.
        missing: Rows left out because of missing values: how many, which ones and in which columns; None if none were.
        weights: Weight of each row, (rows,), or None.
    """

    data: FloatArray
    context: FloatArray | None
    layout: Layout
    context_layout: Layout
    label: str = ""
    rows: NDArray[np.int64] | None = None
    missing: Gaps | None = None
    weights: FloatArray | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the D columns of data."""
        return tuple(self.layout.labels)

    @property
    def context_names(self) -> tuple[str, ...]:
        """Names of the C columns of context; those of one-hot categories are column=category."""
        return tuple(self.context_layout.encoded_labels)

    @property
    def categories(self) -> tuple[Categories, ...]:
        """Categories of each column of data, or None for a column of numbers."""
        return self.layout.categories or (None,) * len(self.layout.names)

    @overload
    def numbers(self, places: int) -> int: ...
    @overload
    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def numbers(self, places: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """Row numbers in the file, counted from 1, of the rows at `places` in this table, counted from 0."""
        return places + 1 if self.rows is None else self.rows[places]

    def __repr__(self) -> str:
        condition = f" given {', '.join(self.context_names)}" if self.context_names else ""
        return f"Table({len(self.data)} rows of {', '.join(self.names)}{condition})"


def read_table(
    source: FileOrStream,
    *,
    columns: Sequence[str] | Layout | None = None,
    context: Sequence[str] | Layout = (),
    categories: Sequence[str] = (),
    array: str | None = None,
    dtype: str | None = None,
    drop_missing: bool = False,
    decimal: str = ".",
    encoding: str = "utf-8",
    weights: str | None = None,
) -> Table:
    r"""Read csv, tsv, parquet, npy or npz files, which may be larger than memory.

    The first bytes determine the format. Text may be compressed by gzip, bzip2 or xz; a header of names is optional.
    Columns without names are called x1, x2, ... Numbers are rounded to float32 if its precision suffices, which it does
    not for a column of 5.4e6 +- 0.1 or of time stamps. Tables of more than half a gibibyte are stored in a temporary
    file, which is deleted when the program ends, or mapped from the .npy file itself.

    Args:
        source: A path; "-" for standard input; or a binary stream.
        columns: The data columns, in this order; by default all that are not context. A column of repeating texts or
            truth values holds the number of the category, in alphabetical order: see `Table.categories`. Or the
            `layout` of another table or of a density: its columns are matched by name, with its categories, and other
            columns are ignored. A table without names may also have the same number of columns, in the same order.
        context: Columns that the distribution of the data depends on. A column of text, truth values or a dictionary is
            encoded one-hot, with its categories in alphabetical order. Or the `context_layout` that belongs to a
            `layout`.
        categories: Context columns whose numbers are labels, such as 0 to 9, and are treated as categories.
        array: Name of the array in an .npz file; optional if only one has rows and columns.
        dtype: "float32" or "float64", for a table that must match another one; an array mapped from its file keeps the
            dtype of the file.
        drop_missing: Leave out rows with a missing value in one of these columns: an empty cell, NaN, null, or text
            such as NA. `Table.rows` has the numbers of the other rows.
        decimal: Decimal mark of text, "." or ",".
        encoding: Encoding of text, by its Python name, such as "latin-1".
        weights: A numeric column with the weight of each row; it is neither data nor context.

    Returns:
        A `Table`.

    Cost:
        One pass over the file, after a pass over columns that may be text; the latter ends with the first part of the
        rows if none is.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the source or a choice of columns has the wrong type.
        ValueError: If the file is empty, damaged or ragged. If columns are unknown, repeated or without a name. If
            there is text among numbers or text that does not repeat, or a value is missing or not finite; the message
            has the row, counted from 1, the column, and the total numbers of missing values. If there are too many
            categories, or ones that the other table did not have.
        ModuleNotFoundError: For csv and parquet without the `cli` extra.

    Example:
        >>> import io
        >>> text = b"colour,length,width\nred,1.5,2\nblue,2.5,3\n"
        >>> table = read_table(io.BytesIO(text), context=["colour"])
        >>> table
        Table(2 rows of length, width given colour=blue, colour=red)
        >>> table.context.tolist()
        [[0.0, 1.0], [1.0, 0.0]]
        >>> other = io.BytesIO(b"width,length,colour\n9,8,red\n")
        >>> read_table(other, columns=table.layout, context=table.context_layout).data.tolist()
        [[8.0, 9.0]]
    """
    if decimal not in (".", ","):
        raise ValueError(f'read_table expected decimal "." or ",", got {decimal!r}.')
    opened = open_source(source, array, decimal, encoding)
    if (twice := _repeated(filter(None, opened.names))) is not None:
        raise ValueError(f"read_table expected names that differ, got two columns {quoted(twice)} in {opened.label}.")
    if isinstance(columns, Layout) or isinstance(context, Layout):
        data_columns, context_columns = _described(opened, columns, context or NAMELESS, categories)
    else:
        data_columns, context_columns = _chosen(opened, columns, context, categories, weights)
    of_weights = [] if weights is None else _weights(opened, weights, [*data_columns, *context_columns])
    rows, gaps = _read(opened, [*data_columns, *context_columns, *of_weights], dtype, drop_missing)
    width, end = len(data_columns), rows.shape[1] - len(of_weights)
    return Table(
        data=rows[:, :width],
        context=rows[:, width:end] if context_columns else None,
        weights=rows[:, end] if of_weights else None,
        layout=_layout(data_columns, str(rows.dtype)),
        context_layout=_layout(context_columns),
        label=opened.label,
        rows=np.delete(np.arange(1, gaps.length + 1), gaps.rows - 1) if len(gaps.rows) else None,
        missing=gaps if len(gaps.rows) else None,
    )


def _layout(columns: Sequence[Column], dtype: str | None = None) -> Layout:
    """The layout of the columns, of data if `dtype` is set, whose samples are data frames with texts, or of context."""
    names = tuple(column.name for column in columns)
    layout = Layout("rows", names, ((),) * len(names))
    if all(column.categories is None for column in columns):
        return layout
    categories = tuple(None if column.categories is None else tuple(column.categories) for column in columns)
    if dtype is None:
        return layout._replace(categories=categories, one_hot=True)
    dtypes = tuple("object" if among else dtype for among in categories)
    return layout._replace(form="frame", categories=categories, dtypes=dtypes)


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _chosen(
    source: Source,
    columns: Sequence[str] | None,
    context: Sequence[str],
    categories: Sequence[str],
    weights: str | None,
) -> tuple[list[Column], list[Column]]:
    """Return the requested columns of data and of context, or by default all the rest as data."""
    for name, value in (("columns", columns), ("context", context), ("categories", categories)):
        if isinstance(value, str) or not isinstance(value, (Sequence, type(None))):
            raise TypeError(f"read_table expected {name} to be a sequence of names, got {value!r}.")
    of_context = {*context, weights}
    names = [name for name in source.names if name not in of_context] if columns is None else list(columns)
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
        raise ValueError(f"read_table expected columns of data besides the context, got none in {source.label}.")
    return _labelled(source, names), _inferred(source, context, categories)


def _weights(source: Source, name: str, others: Sequence[Column]) -> list[Column]:
    """Return the column of weights, which must be numeric and not be used otherwise."""
    _check_known(source, [name])
    if any(column.name == name for column in others):
        raise ValueError(f"read_table expected weights that are neither data nor context, got {quoted(name)}: choose.")
    return [_number(source, name, "weights")]


def _number(source: Source, name: str, role: str = "data") -> Column:
    column = source.column(name)
    if source.holds_text(name):
        raise ValueError(
            f"read_table expected {role} of numbers, got text in {column.place}: leave it out or make it context."
        )
    return column


def _labelled(source: Source, names: Sequence[str]) -> list[Column]:
    """Return columns of data, numeric or categorical."""
    surveys = _surveyed(source, {name: source.holds_text(name) for name in names}, of_context=False)
    labels = {name: survey.labels() for name, survey in surveys.items()}
    return [labels.get(name) or _number(source, name) for name in names]


def _inferred(source: Source, names: Sequence[str], categories: Sequence[str]) -> list[Column]:
    """Return columns of context, with the categories of those that hold text or labels."""
    kinds = {name: source.holds_text(name) for name in names} | dict.fromkeys(categories, True)
    surveys = _surveyed(source, kinds, of_context=True)
    return [surveys[name].column() if name in surveys else source.column(name) for name in names]


def _surveyed(source: Source, kinds: Mapping[str, bool | None], *, of_context: bool) -> dict[str, Survey]:
    """Read the columns that may hold text; columns of data only as long as they may be labels."""
    surveys = {name: Survey(source.column(name), bool(kind)) for name, kind in kinds.items() if kind is not False}
    if surveys:
        with closing(source.batches(list(surveys))) as batches:
            for batch in batches:
                for survey, cells in zip(surveys.values(), batch, strict=True):
                    if of_context or survey.may_be_labels:
                        survey.add(cells)
                    if of_context:
                        survey.check_few()
                if not of_context and not any(survey.may_be_labels for survey in surveys.values()):
                    break
    return surveys


def _described(
    source: Source, layout: object, context: object, categories: Sequence[str]
) -> tuple[list[Column], list[Column]]:
    """Return the columns of data and of context that two layouts describe."""
    if categories or not (isinstance(layout, Layout) and isinstance(context, Layout)):
        raise ValueError("read_table expected columns and context as the two layouts of a table, got names with one.")
    data, given = layout.columns, context.columns
    if not source.is_named and len(data) + len(given) == len(source.names):
        source.names = tuple(name for name, _ in (*data, *given))
    _check_known(source, [name for name, _ in (*data, *given)])
    for name, _ in given:
        source.holds_text(name)
    return [
        _number(source, name) if among is None else replace(source.column(name, among), is_label=True)
        for name, among in data
    ], [source.column(name, among) for name, among in given]


def _check_known(source: Source, names: Sequence[str]) -> None:
    unknown = next((name for name in names if name == "" or name not in source.index), None)
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
    named = "" if source.is_named else ", whose columns have no names"
    raise ValueError(f"read_table found no column {quoted(unknown)} in {source.label}{named}: {hint}")


def _read(source: Source, columns: Sequence[Column], dtype: str | None, drop_missing: bool) -> tuple[FloatArray, Gaps]:
    """Read and encode the columns, (rows, numbers); raise for missing values, or drop and return their rows.

    A large floating-point array that has exactly these columns stays mapped from its file.
    """
    names, mapped = [column.name for column in columns], None
    if isinstance(source, ArraySource) and not drop_missing and names == list(source.names):
        is_large = source.array.nbytes > BYTES_IN_MEMORY and source.array.dtype.kind == "f"
        mapped = np.asanyarray(source.array) if is_large else None
    gaps = Gaps(columns)
    width = sum(len(column.encoded_names) for column in columns)
    with Spool(width, BYTES_IN_MEMORY) as spool, closing(source.batches(names)) as batches:
        for batch in batches:
            parts = [column.encode(cells, gaps.length + 1) for column, cells in zip(columns, batch, strict=True)]
            rows = np.concatenate(parts, 1)
            is_whole = gaps.add(rows, batch)
            if mapped is None and (drop_missing or not gaps.first):
                spool.append(rows if is_whole.all() else rows[is_whole])
    if not gaps.length:
        raise ValueError(f"read_table expected rows of data, got none in {source.label}.")
    if not drop_missing and (error := gaps.error()) is not None:
        raise error
    if len(gaps.rows) == gaps.length:
        raise ValueError(f"read_table expected rows without missing values, got none in {source.label}: {gaps}.")
    return spool.rows(dtype) if mapped is None else mapped, gaps
