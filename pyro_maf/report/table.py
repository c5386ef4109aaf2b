"""Tables of numbers, in memory or on disk, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf.datasets import Table as NamedTable
from pyro_maf.tables.layout import Layout, numbers

__all__ = ["Given", "Table", "given_columns"]

NUMERIC_KINDS = "fiub"
VALUES_AT_ONCE = 2**18
ROWS_AT_ONCE = 4096
MANY_DIGITS = 10_000
"""Values from here on, such as time stamps, may share more than the four digits that others are shown with."""


@dataclass(frozen=True)
class Given:
    """A column of context in its table: numeric, or categorical, which the density takes one-hot.

    Attributes:
        name: Name of the column.
        first: Index of its first value in a row of the encoded context.
        categories: Its categories in order, or None for a column of numbers.

    Example:
        >>> Given("colour", 1, ["blue", "red"]).text([30.5, 0.0, 1.0])
        'red'
    """

    name: str
    first: int
    categories: list[str] | None = None

    def text(self, context: list[float]) -> str:
        """Decode this column from a row of encoded context."""
        if self.categories is None:
            number = context[self.first]
            return f"{number:.4g}" if abs(number) < MANY_DIGITS else f"{number:.10g}"
        return self.categories[context.index(1.0, self.first) - self.first]


def given_columns(data: Any, tables: list[Table]) -> list[Given]:
    """Return the columns of context: those of `data` if it is a table, or a column for each value."""
    if not isinstance(data, NamedTable):
        return [Given(name, place) for table in tables[1:] for place, name in enumerate(table.names)]
    columns, first = [], 0
    for column in data.columns["context"]:
        columns.append(Given(column["name"], first, column["categories"]))
        first += len(column["categories"] or [0])
    return columns


class Table:
    """Rows of numbers that are read on demand, so that a `np.memmap` stays on disk.

    Args:
        role: "data" or "context", for errors.
        value: A tensor, an array, a data frame or nested lists; a vector is one column.
        width: Expected number of columns.
        names: Names of the columns, by default those of a data frame, or x1, x2 and so on.

    Raises:
        TypeError: For a value that is not numeric.
        ValueError: For another width, no rows, or another number of names.

    Example:
        >>> table = Table("data", [[1.0, 2.0], [3.0, 4.0]], 2)
        >>> table.names, table.take(np.array([1]), torch.zeros(()))
        (['x1', 'x2'], tensor([[3., 4.]]))
    """

    def __init__(self, role: str, value: Any, width: int, names: Sequence[str] | None = None) -> None:
        self.role = role
        self._values, found = _values(role, value)
        if self._values.ndim == 1 and width == 1:
            self._values = self._values[:, None]
        shape = tuple(self._values.shape)
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise ValueError(f"write_report expected {role} of shape (rows, {width}), 1 row or more, got {shape}.")
        self.names = _names(role, found if names is None else names, width)

    def __len__(self) -> int:
        return len(self._values)

    def take(self, index: np.ndarray[Any, Any], like: Tensor) -> Tensor:
        """Read the rows at `index`, in the dtype and on the device of `like`.

        Raises:
            ValueError: If one is not finite.
        """
        if isinstance(self._values, Tensor):
            rows = self._values[torch.from_numpy(index).to(self._values.device)].to(like)
        else:
            rows = torch.from_numpy(np.asarray(self._values[index], dtype=np.float64)).to(like)
        wrong = ~rows.isfinite()
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"write_report expected finite {self.role}, got {rows[row, column].item()} in data row "
                f"{index[row] + 1} (counted from 1), column {self.names[column]}: drop such rows or fill them in."
            )
        return rows

    def blocks(self, index: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Split `index` into blocks that are read and scored at once."""
        size = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // self._values.shape[1]))
        return [index[start : start + size] for start in range(0, len(index), size)]


def _values(role: str, value: Any) -> tuple[Any, Sequence[str] | None]:
    """Return the indexable form of a table, and its names if any."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"write_report expected {role} of real numbers, got {value.dtype}.")
        return value.detach(), None
    if isinstance(value, Mapping):
        return numbers("write_report", role, value), Layout.of(value).labels
    names = [str(name) for name in value.columns] if hasattr(value, "columns") else None
    try:
        array = value.to_numpy() if names is not None else np.asarray(value)
    except ValueError:
        raise ValueError(f"write_report expected {role} to be a table, got rows of different lengths.") from None
    if array.dtype.kind not in NUMERIC_KINDS:
        raise TypeError(f"write_report expected {role} of numbers, got {type(value).__name__} of {array.dtype}.")
    return array, names


def _names(role: str, names: Sequence[str] | None, width: int) -> list[str]:
    letter = "x" if role == "data" else "c"
    names = [f"{letter}{i + 1}" for i in range(width)] if names is None else [str(name) for name in names]
    if len(names) != width:
        raise ValueError(f"write_report expected {width} names of {role}, one for each column, got {len(names)}.")
    return names
