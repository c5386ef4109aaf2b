"""The rows that a model is fitted to: conversion and checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_maf.distributions import FlowPrior
from pyro_maf.support import Support
from pyro_maf.tables.layout import Layout, check_paired, is_frame, number_of_rows, numbers, part_of
from pyro_maf.training.repeats import Copies, copies_of
from pyro_maf.training.units import Units, context_units_of, units_of

__all__ = [
    "Rows",
    "check_rounded",
    "check_training",
    "check_varying",
    "column_labels",
    "divide",
    "measured",
    "number_of_columns",
    "read_rows",
    "some_rows",
    "split",
    "strays",
]

LEAST_ROWS = 10
LEAST_HELD_OUT = 3
IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.bool)
"""Dtypes whose every value float32 represents exactly."""


class Rows(NamedTuple):
    """Data (rows, D) and, for a conditional model, as many rows of context (rows, C)."""

    data: Tensor
    context: Tensor | None

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the data and of the context; without a context, twice that of the data."""
        return self.data.dtype, (self.data if self.context is None else self.context).dtype

    def take(self, index: Tensor | slice) -> Rows:
        """Select the rows at `index`."""
        return Rows(self.data[index], None if self.context is None else self.context[index])

    def rounded(self, dtypes: tuple[torch.dtype, torch.dtype]) -> Rows:
        """Convert the rows to the dtypes of a density's values and of its context."""
        data, context = dtypes
        return Rows(self.data.to(data), None if self.context is None else self.context.to(context))

    def to(self, device: torch.device) -> Rows:
        """Move the rows to `device`."""
        return Rows(self.data.to(device), None if self.context is None else self.context.to(device))


def number_of_columns(name: str, value: Any) -> int:
    """Number of columns of a table; a vector is one.

    Raises:
        ValueError: For a value that is not a table.
        TypeError: For a value that is not numeric.
    """
    table = numbers("fit", name, value)
    if table.dim() not in (1, 2) or not table.numel():
        raise ValueError(f"fit expected {name} of shape (rows, columns), got {tuple(table.shape)}.")
    return 1 if table.dim() == 1 else table.shape[1]


def column_labels(value: Any, width: int) -> list[str]:
    """Labels of `width` columns in warnings: the names in a frame, the numbers elsewhere."""
    return [_column_name(value, column) for column in range(width)]


def some_rows(name: str, value: Any, width: int, most: int) -> np.ndarray[Any, Any]:
    """Draw rows of a table that `read_rows` has checked, (rows, columns) in float64.

    For the same number of rows the draw is the same at every call; of a table mapped from a file no others are read.

    Args:
        name: "data" or "context".
        value: The table.
        width: Number of its columns.
        most: Maximum number of rows.
    """
    total = number_of_rows(value)
    if total > most:
        value = part_of(value, np.sort(np.random.default_rng(0).choice(total, most, replace=False)))
    return numbers("fit", name, value).double().reshape(-1, width).numpy()


def read_rows(
    model: Any,
    data: Any,
    context: Any,
    *,
    support: Support,
    role: str = "",
    first: int | None = None,
) -> Rows:
    """Convert data and context to tensors on the CPU, and check them.

    They are of float32 if that is exact, and otherwise of float64.

    Args:
        model: The model, whose `input_dim` and `context_dim` the widths must match; a simplex has one column more.
        data, context: Tensors, arrays, data frames or nested lists; context is None for a model without one.
        support: The support of the data.
        role: "" or "validation ", the prefix of "data" and "context" in errors.
        first: For a part of a larger table, the number of its first row there.

    Raises:
        ValueError: For wrong shapes, values that are not finite or not inside the support, or a context missing,
            superfluous or of another length.
            TypeError: For values that are not numeric.
    """
    who = type(model).__name__
    more = ", and 1 for a simplex" * (support.event_size - model.input_dim)
    table = _read_table(f"{role}data", data, support.event_size, f"input_dim of {who}{more}", first)
    _check_inside(f"{role}data", table, data, support, first)
    if not model.context_dim:
        if context is not None:
            raise ValueError(
                f"fit got {role}context for {who}, which takes none: leave it out or build a conditional model."
            )
        return Rows(table, None)
    if context is None:
        raise ValueError(
            f"fit expected {role}context with {model.context_dim} columns (context_dim of {who}), got none."
        )
    given = _read_table(f"{role}context", context, model.context_dim, f"context_dim of {who}", first)
    if len(given) != len(table):
        raise ValueError(
            f"fit expected as many rows of {role}context as of {role}data, got {len(given)} and {len(table)}."
        )
    check_paired("fit", f"{role}data", data, context)
    return Rows(table, given)


def measured(rows: Rows, support: Support) -> tuple[Units, Units | None]:
    """Return the units of the columns of the unconstrained data, and of those of the context."""
    context_units = None if rows.context is None else context_units_of(rows.context)
    return units_of(support.unconstrain(rows.data)[0]), context_units


def strays(data: Tensor, support: Support) -> bool:
    """True if values inside the support leave it when rounded to float32, as 1 - 1e-9 and 1e-40 do.

    1e-40 counts, since draws on a support that ends at 0 are at least the smallest normal number.
    """
    if support.name == "real" or data.dtype != torch.float64:
        return False
    rounded = data.float()
    rounded = torch.where(rounded.abs() < torch.finfo(torch.float32).tiny, 0.0, rounded)
    return bool(support.outside(rounded).any())


def check_training(rows: Rows, data: Any, context: Any) -> None:
    """Refuse too few rows, and constant columns.

    Args:
        rows: The rows.
        data, context: Their sources, for the columns' names.
    """
    if len(rows.data) < LEAST_ROWS:
        raise ValueError(f"fit expected at least {LEAST_ROWS} rows of data, got {len(rows.data)}.")
    check_varying("data", *rows.data.aminmax(dim=0), data)
    if rows.context is not None:
        check_varying("context", *rows.context.aminmax(dim=0), context)


def check_varying(name: str, low: Tensor, high: Tensor, value: Any) -> None:
    """Refuse constant columns.

    Args:
        name: "data" or "context".
        low, high: The range of each column.
        value: Their source, for the columns' names.
    """
    same = (low == high).nonzero()[:, 0].tolist()
    if not same:
        return
    others = [_column_name(value, column) for column in same[1:9]] + [f"{len(same) - 9} more"] * (len(same) > 9)
    which = f"that column, and likewise {', '.join(others)}" if others else "that column"
    raise ValueError(
        f"fit expected {name} that varies in every column, "
        f"got {low[same[0]].item():g} in every row of {_column_name(value, same[0])}: drop {which}."
    )


def check_rounded(
    rows: Rows, prior: FlowPrior, data: Any, context: Any, role: str = "", first: int | None = None
) -> None:
    """Refuse outliers so far out that they are infinite in the dtype of the model and the units of `prior`.

    Args:
        rows: The rows, in the dtypes of `prior`.
        prior: The prior that standardises them.
        data, context: Their sources, for the columns' names.
        role, first: As in `read_rows`.
    """
    _check_finite(f"{role}data", prior.standardised(rows.data), data, first)
    if rows.context is not None:
        _check_finite(f"{role}context", prior.standardised_context(rows.context), context, first)


def split(rows: Rows, fraction: float, generator: torch.Generator, copies: Copies | None = None) -> tuple[Rows, Rows]:
    """Split rows into training and validation rows, as `divide`."""
    training, held_out = divide(rows, fraction, generator, copies)
    return rows.take(training), rows.take(held_out)


def divide(
    rows: Rows, fraction: float, generator: torch.Generator, copies: Copies | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the indices of training and validation rows: a random `fraction`, at least one row, is for validation.

    Equal rows stay together, or the validation score would be that of rows that were trained on. A row with more
    copies than the number of validation rows is for training. If that leaves fewer than 3 distinct rows for
    validation, there are so few values that they are categories, and rows are drawn one by one.

    Args:
        rows: The rows to divide.
        fraction: Fraction of validation rows, between 0 and 1.
        generator: Generator of the draw.
        copies: The repeated rows, if already computed.
    """
    total = len(rows.data)
    aside = min(max(1, round(fraction * total)), total - 2)
    copies = copies_of(rows) if copies is None else copies
    if copies.distinct < total:
        number = copies.number.bincount()
        order = torch.randperm(copies.distinct, generator=generator)
        order = order[number[order] <= aside]
        held_out = order[number[order].cumsum(0) <= aside]
        if len(held_out) >= LEAST_HELD_OUT:
            is_held_out = torch.isin(copies.number, held_out)
            shuffled = torch.randperm(total, generator=generator)
            return shuffled[~is_held_out[shuffled]], shuffled[is_held_out[shuffled]]
    shuffled = torch.randperm(total, generator=generator)
    return shuffled[aside:], shuffled[:aside]


def _read_table(name: str, value: Any, width: int, width_name: str, first: int | None) -> Tensor:
    table = numbers("fit", name, value)
    shape = tuple(table.shape)
    if table.dim() == 1 and width == 1:
        table = table.unsqueeze(-1)
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(f"fit expected {name} of shape (rows, {width}), {width} being the {width_name}, got {shape}.")
    if not len(table):
        raise ValueError(f"fit expected {name} with rows in it, got shape {shape}.")
    table = table.to(torch.float32 if table.dtype in IN_FLOAT32 else torch.float64)
    _check_finite(name, table, value, first)
    return table


def _column_name(value: Any, column: int) -> str:
    labels = Layout.of(value).labels
    # The names of a frame may be of any type.
    return f"column {(list(value.columns) if is_frame(value) else labels)[column]!r}" if labels else f"column {column}"


def _check_finite(name: str, table: Tensor, value: Any, first: int | None) -> None:
    wrong = ~table.isfinite()
    if not wrong.any():
        return
    row, column = (int(index) for index in wrong.nonzero()[0])
    raise ValueError(
        f"fit expected finite {name}, got {table[row, column].item()} in row {row + (first or 0)}, "
        f"{_column_name(value, column)}{_so_many(wrong.any(1), first, 'rows have such values')}: "
        "drop those rows or fill them in."
    )


def _so_many(wrong: Tensor, first: int | None, what: str) -> str:
    """Count the rows in words, if all of them are in memory."""
    return "" if first is not None else f" ({int(wrong.sum())} of {len(wrong)} {what})"


def _check_inside(name: str, table: Tensor, value: Any, support: Support, first: int | None) -> None:
    outside = support.outside(table)
    if not outside.any():
        return
    wrong = support.outside_by_column(table)
    if not wrong.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"fit expected {name} of rows that sum to 1 (support simplex), got {table[row].sum().item():.7g} in row "
            f"{row + (first or 0)}{_so_many(outside, first, 'rows do not')}: divide each row by its sum."
        )
    row, column = (int(index) for index in wrong.nonzero()[0])
    raise ValueError(
        f"fit expected {name} of {support.values_of(column)} in {_column_name(value, column)} (support "
        f"{support.name_of(column)}), got {table[row, column].item()} in row {row + (first or 0)}"
        f"{_so_many(outside, first, 'rows are not inside')}: "
        "move those rows inside or choose another support."
    )
