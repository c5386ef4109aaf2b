"""Conversion of rows to tensors, with checks whose errors name rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_maf._core.checks import InputError
from pyro_maf.support import Support
from pyro_maf.tables.layout import Layout, TableLike, is_frame, is_indexed, number_of_columns, number_of_rows, numbers
from pyro_maf.tables.rows import Rows, Standardiser

__all__ = ["Labels", "Reader", "check_context", "check_paired", "row_shape", "table_of"]

LEAST_ROWS = 10
REFUSED = "a density that takes none: leave it out"
IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.bool)
"""Dtypes all of whose values float32 represents exactly."""


@dataclass(frozen=True)
class Labels:
    """Names of the columns and rows of a table in messages.

    Attributes:
        names: Names of the columns as shown in messages; if empty, columns are numbered from 0.
        count: Maps the index of a row to its number, counted from 1; None to show the index, from 0.

    Example:
        >>> labels = Labels.of({"height": torch.zeros(3), "weight": torch.zeros(3)})
        >>> labels.column(1), labels.row(2)
        ("column 'weight'", 'row 2')
    """

    names: Sequence[str] = ()
    count: Callable[[int], int] | None = None

    @classmethod
    def of(cls, value: TableLike | None) -> Labels:
        """Labels of a table that `numbers` accepts."""
        # The names of a frame may have any type.
        names = value.columns if value is not None and is_frame(value) else Layout.of(value).labels
        return cls(tuple(map(repr, names)))

    def column(self, index: int) -> str:
        """Name of a column."""
        return f"column {self.names[index] if self.names else index}"

    def row(self, index: int) -> str:
        """Name of a row."""
        return f"row {index}" if self.count is None else f"data row {self.count(index)} (counted from 1)"


@dataclass(frozen=True)
class Reader:
    """Conversion of data, context and weights to tensors, with checks whose errors name rows and columns.

    Attributes:
        who: The caller, for error messages.
        width, context_width: Expected number of columns of data, and of context, 0 for none.
        refused: Density that takes no context, and advice, such as "MAF, which takes none: leave it out".
        sizes: Names of the widths, such as "input_dim of MAF", for error messages; may be empty.
        labels, context_labels: Names of columns and rows.
        support: The support of the data; None if rows may lie anywhere.
        context_shape: Shape of one row of context if it is an array such as an image, rather than a table whose columns
            have to vary and have units of their own.
        role: "" or "validation ", the prefix of "data" and "context" in error messages.
        places: Indices in the table of the rows that are read, if they are part of it.
    """

    who: str
    width: int
    context_width: int
    refused: str = REFUSED
    sizes: tuple[str, str] = ("", "")
    labels: Labels = Labels()
    context_labels: Labels = Labels()
    support: Support | None = None
    role: str = ""
    context_shape: tuple[int, ...] = ()
    places: Sequence[int] | None = None

    @property
    def context_columns(self) -> int:
        """Number of columns of a context that is a table; 0 if it is an array."""
        return 0 if len(self.context_shape) > 1 else self.context_width

    def at(self, places: Sequence[int] | None) -> Reader:
        """The reader for the rows of the table at these indices."""
        return replace(self, places=places)

    def read(self, data: TableLike, context: TableLike | None, weights: TableLike | None = None) -> Rows:
        """Convert rows to CPU tensors, in float32 if that is exact and otherwise in float64; weights likewise.

        Raises:
            InputError: For values that are not finite or not inside the support, and for negative weights.
            TypeError: For values that are not numeric.
            ValueError: For wrong shapes, or a context that is missing, superfluous or of another length.
        """
        size, context_size = self.sizes
        table = self._table("data", data, self.width, size)
        self._check_finite("data", table, self.labels)
        self._check_inside(table)
        more = f" ({context_size})" if context_size else ""
        check_context(self.who, f"{self.role}context", context, self.context_width, refused=self.refused, more=more)
        weight = None
        if weights is not None:
            weight = self._weights(weights, len(table))
            self.check_paired(data, weights, "weights")
            if self.places is None and weight[0] > 0 and bool((weight == weight[0]).all()):
                weight = None  # equal weights are equivalent to none
        if context is None:
            return Rows(table, None, weight)
        context_table = self._table("context", context, self.context_width, context_size, self.context_shape)
        self._check_finite("context", context_table, self.context_labels)
        self.check_paired(data, context)
        return Rows(table, context_table, weight)

    def check_paired(self, data: TableLike, other: TableLike, name: str = "context") -> None:
        """Check that the context, or other values of this name, have the length and order of the data."""
        check_paired(self.who, f"{self.role}data", data, f"{self.role}{name}", other)

    def check_training(self, rows: Rows, *, of_context: bool = True, of_draws: bool = False) -> None:
        """Check that there are enough rows, which chains of draws may lack, and that all columns vary.

        Rows of weight 0 do not count.
        """
        counted = rows.counted
        if rows.weights is not None:
            self.check_some_weight(float(rows.weights.sum()))
        if len(counted.data) < LEAST_ROWS:
            which = "" if rows.weights is None else " with a weight above 0"
            advice = ": join chains of draws, as get_samples() does without group_by_chain" * of_draws
            raise ValueError(
                f"{self.who} expected at least {LEAST_ROWS} rows of data{which}, got {len(counted.data)}{advice}."
            )
        self.check_varying(counted, of_context=of_context)

    def check_some_weight(self, total: float) -> None:
        """Check that not all weights are 0."""
        if not total:
            raise ValueError(f"{self.who} expected some {self.role}weights above 0, got 0 for every row.")

    def check_varying(self, rows: Rows, *, of_context: bool = True) -> None:
        """Check that all columns vary, including those of context."""
        context = rows.context if of_context and self.context_columns else None
        for name, table, labels in (("data", rows.data, self.labels), ("context", context, self.context_labels)):
            if table is None or not (same := (table == table[0]).all(0).nonzero()[:, 0].tolist()):
                continue
            others = [labels.column(column) for column in same[1:9]] + [f"{len(same) - 9} more"] * (len(same) > 9)
            which = f"that column, and likewise {', '.join(others)}" if others else "that column"
            value = table[0, same[0]].item()
            rounded = " in float64: subtract what the rows have in common while they are integers or text, or"
            raise InputError(
                f"{self.who} expected {name} that varies in every column, got {value:g} in every row of "
                f"{labels.column(same[0])}{rounded if abs(value) >= 2**53 else ':'} drop {which}.",
                column=same[0],
            )

    def check_rounded(self, rows: Rows, density: Standardiser) -> None:
        """Check that no outlier is infinite in the units of a density and the dtype of its model."""
        self._check_finite("data", density.standardised(rows.data), self.labels)
        if rows.context is not None:
            self._check_finite("context", density.standardised_context(rows.context), self.context_labels)

    def _table(self, name: str, value: TableLike, width: int, size: str, shape: tuple[int, ...] = ()) -> Tensor:
        name = f"{self.role}{name}"
        about = f"{width} being the {size}" if size else "1 row or more"
        table = table_of(self.who, name, value, width, about, least=not size, shape=shape)
        if not len(table):
            raise ValueError(f"{self.who} expected {name} with rows in it, got shape {tuple(table.shape)}.")
        return table.to(torch.float32 if table.dtype in IN_FLOAT32 else torch.float64)

    def _weights(self, weights: TableLike, rows: int) -> Tensor:
        table = numbers(self.who, f"{self.role}weights", weights).double()
        table = table[:, 0] if table.dim() == 2 and table.shape[1] == 1 else table
        if table.shape != (rows,):
            raise ValueError(
                f"{self.who} expected {self.role}weights of shape ({rows},), one for each row of data, "
                f"got {tuple(table.shape)}."
            )
        if not (wrong := ~((table >= 0) & table.isfinite())).any():
            return table
        row = int(wrong.nonzero()[0])
        place = self._place(row)
        raise InputError(
            f"{self.who} expected finite {self.role}weights of at least 0, got {table[row].item()} in "
            f"{self.labels.row(place)}{self._tally(wrong, 'rows have such weights')}: a weight says how often its "
            "row counts, so fill it in, or drop the row.",
            row=place,
        )

    def _check_finite(self, name: str, table: Tensor, labels: Labels) -> None:
        wrong = ~table.isfinite()
        if not wrong.any():
            return
        row, column = wrong.nonzero()[0].tolist()
        place = self._place(row)
        raise InputError(
            f"{self.who} expected finite {self.role}{name}, got {table[row, column].item()} in {labels.row(place)}, "
            f"{labels.column(column)}{self._tally(wrong.any(1), 'rows have such values')}: "
            "drop those rows or fill them in.",
            row=place,
            column=column,
        )

    def _check_inside(self, table: Tensor) -> None:
        support = self.support
        if support is None or not (outside := support.outside(table)).any():
            return
        wrong = support.outside_by_column(table)
        is_sum = not wrong.any()
        row, column = (int(outside.nonzero()[0]), 0) if is_sum else wrong.nonzero()[0].tolist()
        place = self._place(row)
        who = f"{self.who} expected {self.role}data of"
        if is_sum:
            raise InputError(
                f"{who} rows that sum to 1 (support simplex), got {table[row].sum().item():.7g} in "
                f"{self.labels.row(place)}{self._tally(outside, 'rows do not')}: divide each row by its sum.",
                row=place,
            )
        raise InputError(
            f"{who} {support.values_of(column)} in {self.labels.column(column)} (support {support.name_of(column)}), "
            f"got {table[row, column].item()} in {self.labels.row(place)}"
            f"{self._tally(outside, 'rows are not inside')}: move those rows inside or choose another support.",
            row=place,
            column=column,
        )

    def _place(self, row: int) -> int:
        """Index in the table of one of the rows."""
        return row if self.places is None else int(self.places[row])

    def _tally(self, wrong: Tensor, what: str) -> str:
        """Number of such rows in words, if the rows are the whole table."""
        return "" if self.places is not None else f" ({int(wrong.sum())} of {len(wrong)} {what})"


def check_paired(who: str, name: str, rows: TableLike, context_name: str, context: TableLike) -> None:
    """Check the length of a context or weights and, for data frames, that the index has the same order as the rows.

    Rows are paired by position, so a reordered index means that one of the two was shuffled or sorted alone.
    """
    lengths = number_of_rows(context), number_of_rows(rows)
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"{who} expected as many rows of {context_name} as of {name}, got {lengths[0]} and {lengths[1]}."
        )
    if not (is_indexed(rows) and is_indexed(context)):
        return
    if not rows.index.equals(context.index) and bool(rows.index.isin(context.index).all()):
        raise ValueError(
            f"{who} expected {context_name} in the order of the {name}, got an index with the same labels in another "
            f"order: sort one as the other, as by {context_name.split()[-1]}.loc[rows.index], or pass arrays where "
            "their rows do match."
        )


def check_context(who: str, name: str, context: object, columns: int, refused: str = REFUSED, more: str = "") -> None:
    """Raise for a missing context, with `more` about its columns, or one for a density that takes none (`refused`)."""
    if context is not None and not columns:
        raise ValueError(f"{who} got {name} for {refused}.")
    if context is None and columns:
        raise ValueError(f"{who} expected {name} with {columns} column{'s' * (columns > 1)}{more}, got none.")


def row_shape(who: str, name: str, value: TableLike) -> tuple[int, ...]:
    """Shape of one row: (height, width) of images (rows, height, width), (columns,) of a table. Raises as `numbers`."""
    if isinstance(value, Mapping) or is_frame(value):
        return (number_of_columns(who, name, value),)
    return tuple(np.shape(cast(Any, value))[1:]) or (1,)


def table_of(
    who: str, name: str, value: TableLike, width: int, about: str, *, least: int = 0, shape: tuple[int, ...] = ()
) -> Tensor:
    """Convert a table to a tensor of `width` columns, as `numbers` does; a vector is one column.

    Rows of `width` numbers in another shape may be flat. Fewer rows than `least`, or another shape, raise an error that
    describes the table by `about`.
    """
    table = numbers(who, name, value)
    got = tuple(table.shape)
    if len(got) == width == 1:
        table = table[:, None]
    if len(shape) > 1 and got[1:] == tuple(shape):
        table = table.flatten(1)
    if table.dim() != 2 or table.shape[1] != width or len(table) < least:
        expected = ", ".join(map(str, ("rows", *(shape or [width]))))
        raise ValueError(f"{who} expected {name} of shape ({expected}), {about}, got {got}.")
    return table
