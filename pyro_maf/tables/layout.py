"""Forms of tables, and names of columns: tensors, arrays, data frames, nested lists, dictionaries of draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeGuard, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.tables.categories import Categories, Label, coded, is_missing, label_of, one_hot, restored

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "NAMELESS",
    "NUMERIC_KINDS",
    "REAL_KINDS",
    "FloatArray",
    "Layout",
    "TableLike",
    "as_pandas",
    "is_frame",
    "is_indexed",
    "listed_names",
    "number_of_columns",
    "number_of_rows",
    "numbers",
    "part_of",
    "with_frame",
]

REAL_KINDS, NUMERIC_KINDS, TIME_KINDS = "fiu", "fiub", "mM"
"""Kinds of numpy dtypes: real numbers, these and truth values, and times."""


class ArrayLike(Protocol):
    """A value that numpy can convert to an array: a numpy, JAX or xarray array, or a pandas series."""

    def __array__(self) -> NDArray[np.generic]: ...


class DataFrameLike(Protocol):
    """A data frame, such as one of pandas."""

    @property
    def columns(self) -> Iterable[Hashable]:
        """Names of the columns."""

    @property
    def iloc(self) -> object:
        """Rows by position."""

    def __len__(self) -> int: ...


FloatArray: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
Entry: TypeAlias = Tensor | ArrayLike | Sequence[object]
TableLike: TypeAlias = Entry | DataFrameLike | Mapping[Any, Entry]
"""Rows of numbers: a tensor, an array, nested lists, a data frame, or a dictionary of tensors or arrays (rows, ...)."""

K = TypeVar("K")
T = TypeVar("T")


class Layout(NamedTuple):
    """The form of a table, and the names of its columns.

    Attributes:
        form: "frame", "dict" or "rows", which is the form of samples; "rows" has names only for a table from a file.
        names: Names of the columns of a frame, or of the entries of a dictionary, such as the sites of a posterior.
        shapes: Shape of one row of each entry; () for a column.
        categories: Categories of each column, or None for a column of numbers; () if there are none.
        dtypes: Dtypes of the columns of a frame, by name, to which samples are converted.
        one_hot: Whether categories are encoded one-hot, as in a context.

    Example:
        >>> layout = Layout.of({"mu": torch.zeros(9), "b": torch.zeros(9, 2)})
        >>> layout.labels
        ['mu', 'b[0]', 'b[1]']
        >>> layout.like(torch.tensor([[1.0, 2.0, 3.0]]))
        {'mu': tensor([1.]), 'b': tensor([[2., 3.]])}
    """

    form: str = "rows"
    names: tuple[Hashable, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    categories: tuple[Categories, ...] = ()
    dtypes: tuple[str, ...] = ()
    one_hot: bool = False

    @classmethod
    def of(cls, value: TableLike | None) -> Layout:
        """Layout of a table that `numbers` accepts."""
        if isinstance(value, Mapping):
            return cls("dict", tuple(value), tuple(_shape(entry)[1:] for entry in value.values()))
        if is_frame(value):
            return cls("frame", tuple(value.columns), ((),) * len(value.columns))
        if is_indexed(value) and value.name is not None:
            return cls("frame", (value.name,), ((),))
        return cls()

    @classmethod
    def named(
        cls, entries: Sequence[tuple[Hashable, Sequence[int]]], labels: Sequence[Sequence[Label] | None] = ()
    ) -> Layout:
        """Layout of a dictionary with entries of these names and row shapes, and categories as from `as_labels`."""
        categories = tuple(None if each is None else tuple(each) for each in labels)
        return cls("dict", tuple(name for name, _ in entries), tuple(tuple(shape) for _, shape in entries), categories)

    def as_entries(self) -> tuple[tuple[str, Sequence[int]], ...]:
        """Names and shapes as arguments of `named`; () if the columns have no names."""
        return tuple(zip(map(str, self.names), self.shapes, strict=True))

    def as_labels(self) -> list[list[Label] | None]:
        """Categories of each column as JSON values; [] if there are none."""
        if not self.in_categories:
            return []
        return [None if each is None else list(map(label_of, each)) for each in self.categories]

    @property
    def labels(self) -> list[str]:
        """Name of each number in a row."""
        return [label for name, shape in zip(self.names, self.shapes, strict=True) for label in _labels(name, shape)]

    @property
    def columns(self) -> list[tuple[str, list[Label] | None]]:
        """Name of each number in a row, with its categories as JSON values, or None."""
        return list(zip(self.labels, self.as_labels() or itertools.repeat(None), strict=False))

    @property
    def encoded_labels(self) -> list[str]:
        """Name of each number in a row that `coded` encodes."""
        if not self.one_hot:
            return self.labels
        return [
            label
            for name, among in self.columns
            for label in ([name] if among is None else [f"{name}={each}" for each in among])
        ]

    @property
    def in_categories(self) -> list[int]:
        """Indices of the categorical columns."""
        return [index for index, categories in enumerate(self.categories) if categories is not None]

    def coded(self, who: str, role: str, value: TableLike) -> TableLike:
        """Select this layout's columns from a frame or dictionary, with categories as numbers; return others unchanged.

        Raises:
            InputError: For a value that is not a category, if they are one-hot.
        """
        if not self.in_categories or not (isinstance(value, Mapping) or is_frame(value)):
            return value
        pairs = list(zip(self.names, self.categories, strict=True))
        if not self.one_hot:
            codes = {name: coded(value[name], among) for name, among in pairs if among is not None}
            if isinstance(value, Mapping):
                return {**value, **codes}
            frame = value.copy()
            for name, column in codes.items():
                frame[name] = column
            return frame
        columns: dict[str, Entry] = {}
        for name, among in pairs:
            if among is not None:
                columns.update(one_hot(who, role, name, value[name], among))
            else:
                one: TableLike = value[name] if isinstance(value, Mapping) else value[[name]]
                columns[str(name)] = numbers(who, role, one).flatten()
        return columns

    def pick(self, who: str, role: str, value: TableLike, source: str = "the fit") -> TableLike:
        """Select the columns of this layout, in its order, from a table with names; return others unchanged.

        Categories become their numbers, -1 for unknown ones, or one-hot. `source` names the origin of the layout in
        messages.

        Raises:
            ValueError: If a column is missing, or an entry has another shape.
        """
        value = self._one_row(value)
        other = Layout.of(value)
        if not self.names or not other.names or other[1:3] == self[1:3]:
            return self.coded(who, role, value)
        by_name = {str(name): name for name in other.names}
        wanted = self.names if isinstance(value, Mapping) else self.labels
        missing = [name for name in wanted if str(name) not in by_name]
        if missing:
            raise ValueError(
                f"{who} expected {role} with column {str(missing[0])!r}, as in {source}, got "
                f"{listed_names(other.names)}."
            )
        names = [by_name[str(name)] for name in wanted]
        if not isinstance(value, Mapping):
            return self.coded(who, role, cast("DataFrame", value)[names])
        picked = {name: value[name] for name in names}
        for name, shape, expected in zip(wanted, Layout.of(picked).shapes, self.shapes, strict=True):
            if shape != expected:
                raise ValueError(
                    f"{who} expected {role} {str(name)!r} of shape {_with_rows(expected)}, got {_with_rows(shape)}."
                )
        return self.coded(who, role, picked)

    def has_all(self, value: TableLike) -> bool:
        """Return whether a table with names has all columns of this layout."""
        value = self._one_row(value)
        names = {str(name) for name in Layout.of(value).names}
        wanted = self.names if isinstance(value, Mapping) else self.labels
        return bool(self.names) and names.issuperset(map(str, wanted))

    def _one_row(self, value: TableLike) -> TableLike:
        """Convert a row of a frame, or a dictionary of single numbers, to a one-row table; return others unchanged."""
        value = as_pandas(value)
        if isinstance(value, Mapping):
            if not any(_shape(entry) for entry in value.values()):
                return {name: _one_entry(entry) for name, entry in value.items()}
        elif (
            is_indexed(value)
            and not is_frame(value)
            and self.names
            and set(self.labels) <= {str(label) for label in value.index}
            and (value.name is not None or self.labels != ["0"])  # the column that a series without a name becomes
        ):
            return value.to_frame().T.infer_objects()
        return with_frame(value)

    def spread(self, who: str, option: str, values: Mapping[K, T], default: T, width: int) -> T | list[T]:
        """Expand an option by name of column or entry, or by number without names, to one value per column.

        Returns:
            The value that all columns share, or a list with one per column, with the default for those without a value.

        Raises:
            ValueError: For a name that no column has.
        """
        layout = self if self.names else Layout("rows", tuple(range(width)), ((),) * width)
        by_name = {str(name): value for name, value in values.items()}
        for name in by_name:
            if name not in (*layout.labels, *map(str, layout.names)):
                raise ValueError(
                    f"{who} expected {option} of columns {listed_names(layout.names)}, got one of {name!r}."
                )
        spread = [
            by_name.get(label, by_name.get(str(name), default))
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            for label in _labels(name, shape)
        ]
        return spread[0] if all(value == spread[0] for value in spread) else spread

    def like(self, rows: Tensor) -> Tensor | DataFrame | dict[str, Tensor]:
        r"""Convert rows, (\*batch, columns), to this layout: a data frame for (rows, columns), or a dictionary."""
        if self.form == "frame":
            from pandas import DataFrame

            frame = DataFrame(rows.detach().cpu().numpy(), columns=list(self.names))
            return restored(frame, self.categories, self.dtypes) if self.dtypes else frame
        return self.entries(rows) if self.form == "dict" else rows

    def entries(self, rows: Tensor) -> dict[str, Tensor]:
        r"""Split rows, (\*batch, columns), into entries by name, (\*batch, \*shape) each."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], -1)
        return {
            str(name): part.reshape((*rows.shape[:-1], *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


NAMELESS = Layout()


def is_frame(value: object) -> TypeGuard[DataFrame]:
    """Return whether a value is a data frame."""
    return all(hasattr(value, attribute) for attribute in ("columns", "items", "dtypes"))


def is_indexed(value: object) -> TypeGuard[Series[Any]]:
    """Return whether a value is a series or a data frame, whose rows have labels."""
    return hasattr(value, "iloc")


def as_pandas(value: T) -> T:
    """Convert a frame or series of another library, such as polars or pyarrow, to pandas; return others unchanged."""
    is_table = hasattr(value, "columns") or (getattr(value, "ndim", 1) == 1 and not isinstance(value, Mapping))
    return value.to_pandas() if is_table and hasattr(value, "to_pandas") else value


def with_frame(value: T) -> T:
    """Return a series of texts or other categories as a frame of one column, and other values unchanged."""
    if not is_indexed(value) or is_frame(value) or getattr(value.dtype, "kind", "O") in NUMERIC_KINDS:
        return value
    return cast(T, value.to_frame())


def number_of_rows(value: TableLike) -> int:
    """Number of rows of a table."""
    return len(cast(Sized, next(iter(value.values()), ()) if isinstance(value, Mapping) else value))


def number_of_columns(who: str, name: str, value: TableLike) -> int:
    """Number of columns of a table; 1 for a vector.

    Raises:
        ValueError: For a value that is not a table.
        TypeError: For a value that is not numeric.
    """
    is_shaped = len(getattr(value, "shape", ())) in (1, 2)
    table = numbers(who, name, part_of(value, slice(1)) if is_shaped else value)
    if table.dim() not in (1, 2) or not table.numel():
        raise ValueError(f"{who} expected {name} of shape (rows, columns), got {tuple(table.shape)}.")
    return 1 if table.dim() == 1 else table.shape[1]


def part_of(value: TableLike, index: slice | NDArray[np.int_]) -> TableLike:
    """Select rows of a table, in its form; of a memory-mapped table, only these are read."""
    if isinstance(value, Mapping):
        return {name: cast(Entry, part_of(entry, index)) for name, entry in value.items()}
    if is_indexed(value):
        return value.iloc[index]
    if isinstance(value, Sequence) and isinstance(index, slice):
        return value[index]
    return value[index] if isinstance(value, Tensor) else np.asanyarray(value)[index]


def numbers(who: str, name: str, value: TableLike) -> Tensor:
    """Convert a table to a CPU tensor: a tensor keeps its dtype, others become float32 or, if needed, float64.

    An entry (rows, ...) of a dictionary gives one column for each number in its rows. None among numbers becomes NaN.

    Raises:
        TypeError: For values that are not numeric.
        ValueError: For values that are not a table.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{who} expected {name} of real numbers, got {value.dtype}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{who} expected {name} to be a dense tensor, got {value.layout}: pass it .to_dense().")
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return _side_by_side(who, name, value)
    if is_frame(value):
        columns = [_column_of_frame(who, name, label, column) for label, column in value.items()]
        return torch.from_numpy(np.stack(columns, 1)) if columns else torch.empty(len(value), 0)
    if isinstance(value, np.ma.MaskedArray) and value.dtype.kind in NUMERIC_KINDS:
        # Masked entries are missing, whatever their value.
        value = np.ma.filled(value.astype(np.float64), np.nan)
    try:
        array = _without_objects(np.asarray(value))
    except ValueError:
        raise ValueError(f"{who} expected {name} to be a table, got rows of different lengths.") from None
    if array.dtype.kind not in NUMERIC_KINDS:
        advice = ": pass its draws, get_samples()" if hasattr(value, "get_samples") else ""
        if isinstance(value, str) and name == "data":
            advice = ": pyro_maf.datasets.read_table reads a file"
        elif isinstance(value, (str, list, tuple)) and array.dtype.kind == "U" and array.ndim < 2:
            advice = f": pass the columns, as frame[{np.atleast_1d(array).tolist()}]"
        raise TypeError(
            f"{who} expected {name} to be a tensor, array or data frame of numbers, "
            f"got {type(value).__name__} of {array.dtype}{advice}."
        )
    # A copy: torch accepts neither negative strides nor foreign byte orders, and warns about read-only arrays.
    return torch.from_numpy(np.array(array, _dtype_for(array.dtype), order="C"))


def _side_by_side(who: str, name: str, value: Mapping[str, Entry]) -> Tensor:
    """Concatenate the entries of a dictionary as columns."""
    entries = {label: numbers(who, f"{name} {label!r}", entry) for label, entry in value.items()}
    lengths = {label: len(entry) if entry.dim() else None for label, entry in entries.items()}
    if not entries or None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(
            f"{who} expected {name} as a dictionary of (rows, ...), as many rows each, got "
            f"{', '.join(f'{label!r} of shape {tuple(entry.shape)}' for label, entry in entries.items()) or 'none'}."
        )
    flat = [entry.flatten(1) if entry.dim() > 1 else entry[:, None] for entry in entries.values()]
    if any(entry.dtype != torch.float32 for entry in flat):
        flat = [entry.double() for entry in flat]
    return torch.cat(flat, -1)


def _without_objects(values: NDArray[Any]) -> NDArray[Any]:
    """Convert rows of objects to float64 if all are numbers or missing; return others unchanged."""
    if values.dtype.kind != "O" or not values.ndim:
        return values
    each = [np.nan if is_missing(value) else value for value in values.ravel().tolist()]
    if not all(isinstance(value, (Real, Decimal)) for value in each):
        return values
    return np.array(each, np.float64).reshape(values.shape)


def _column_of_frame(who: str, name: str, label: Hashable, column: Series[Any]) -> FloatArray:
    given = column.dtype
    if getattr(given, "kind", "O") == "O":
        column = type(column)(_without_objects(column.to_numpy()))
    if getattr(column.dtype, "kind", "O") not in NUMERIC_KINDS:
        raise TypeError(
            f"{who} expected {name} of numeric columns, got column {label!r} of {given}: {_advice(column)}."
        )
    # Nullable and sparse dtypes of pandas name the corresponding numpy dtype.
    dtype: Any = getattr(column.dtype, "numpy_dtype", getattr(column.dtype, "subtype", column.dtype))
    return column.to_numpy(dtype=_dtype_for(dtype), na_value=np.nan)


def _advice(column: Series[Any]) -> str:
    """Advice about a column of a data frame that is not numeric."""
    if getattr(column.dtype, "kind", "O") in TIME_KINDS:
        return "put seconds or days since the first in its place, or drop it"
    return "drop it or encode it"


def _dtype_for(dtype: np.dtype[np.generic]) -> type[np.float32 | np.float64]:
    """float32 if it represents every value of the dtype, otherwise float64."""
    return np.float32 if np.can_cast(dtype, np.float32) else np.float64


def _one_entry(number: Entry) -> Entry:
    if isinstance(number, Tensor):
        return number.reshape(1)
    # None is a missing number, as in a row of a data frame.
    return np.asarray([np.nan if number is None else number]).reshape(1)


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape if hasattr(value, "shape") else np.shape(np.asarray(value)))


def _labels(name: Hashable, shape: Sequence[int]) -> list[str]:
    places = itertools.product(*map(range, shape))
    return [f"{name}[{','.join(map(str, place))}]" if shape else str(name) for place in places]


def _with_rows(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, ('rows', *shape)))}{',' * (not shape)})"


def listed_names(names: Sequence[Hashable]) -> str:
    """Names of columns in quotes: all of them, or the first few and the number of others."""
    shown = ", ".join(repr(str(name)) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
