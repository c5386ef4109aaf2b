"""Rows of data and context in memory: conversion, checks and the split for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf._core.checks import InputError
from pyro_maf.support import Support
from pyro_maf.tables.layout import Layout, TableLike, check_paired, is_frame, numbers
from pyro_maf.tables.moments import Moments, context_moments_of, moments_of

__all__ = [
    "Labels",
    "Reader",
    "Rows",
    "Split",
    "Standardiser",
    "check_context",
    "copies_of",
    "hash_rows",
    "mixed",
    "repeat_as_a_whole",
    "table_of",
]

LEAST_ROWS = 10
LEAST_HELD_OUT = 3
REFUSED = "a density that takes none: leave it out"
IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.bool)
"""Dtypes whose every value float32 represents exactly."""

R = TypeVar("R")
Hashes = NDArray[np.uint64]
"""A hash of each row, (rows,)."""

# Constants of splitmix64, whose steps flip half of the bits of a number on average if one bit of it changes.
STEP = np.uint64(0x9E3779B97F4A7C15)
MIXES = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


class Standardiser(Protocol):
    """A density that standardises rows, in the dtypes of its values and of its context."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""

    @property
    def context_dtype(self) -> torch.dtype:
        """Dtype of the context."""

    def standardised(self, y: Tensor) -> Tensor:
        """Standardised data, in the dtype of the density's model."""

    def standardised_context(self, context: Tensor) -> Tensor:
        """Standardised context, likewise."""


class Rows(NamedTuple):
    """Data (rows, D) and, for a conditional model, as many rows of context (rows, C)."""

    data: Tensor
    context: Tensor | None

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the data and of the context; without a context, twice that of the data."""
        return self.data.dtype, (self.data if self.context is None else self.context).dtype

    @property
    def sizes(self) -> list[int]:
        """Number of rows in each block that is read at once: here there is one block."""
        return [len(self.data)]

    def take(self, index: Tensor | slice) -> Rows:
        """Select the rows at `index`."""
        return Rows(self.data[index], None if self.context is None else self.context[index])

    def read(self, blocks: Iterable[int]) -> Rows:
        """Return the rows of blocks: here all."""
        return self

    def sample(self) -> Rows:
        """Return as many rows as memory holds: here all."""
        return self

    def to(self, device: torch.device) -> Rows:
        """Move the rows to `device`."""
        return Rows(self.data.to(device), None if self.context is None else self.context.to(device))

    def rounded_for(self, density: Standardiser) -> Rows:
        """Convert the rows to the dtypes of a density's values and of its context."""
        return Rows(
            self.data.to(density.dtype), None if self.context is None else self.context.to(density.context_dtype)
        )

    def moments(self, support: Support) -> tuple[Moments, Moments | None]:
        """Return the moments of the columns of the unconstrained data, and of those of the context."""
        context = None if self.context is None else context_moments_of(self.context)
        return moments_of(support.unconstrain(self.data)[0]), context

    def leaves_in_float32(self, support: Support) -> bool:
        """True if values inside the support leave it when rounded to float32, as 1 - 1e-9 and 1e-40 do.

        1e-40 counts, since draws on a support that ends at 0 are at least the smallest normal number.
        """
        if support.name == "real" or self.data.dtype != torch.float64:
            return False
        rounded = self.data.float()
        rounded = torch.where(rounded.abs() < torch.finfo(torch.float32).tiny, 0.0, rounded)
        return bool(support.outside(rounded).any())

    def split(self, fraction: float, generator: torch.Generator) -> Split[Rows]:
        """Hold out a random fraction of the rows, at least one, for validation; none for a fraction of 0.

        Equal rows stay together, or the validation score would be that of rows that were trained on. A row with more
        copies than the number of validation rows is for training. If that leaves fewer than 3 distinct rows for
        validation, there are so few values that they are categories, and rows are drawn one by one.

        Args:
            fraction: Fraction of validation rows, below 1.
            generator: Generator of the draw.
        """
        distinct, number = copies_of(self)
        repeats = len(self.data) - distinct
        if not fraction:
            return Split(self, self.take(slice(0)), torch.empty(0, dtype=torch.int64), repeats)
        training, places = _divide(distinct, number, fraction, generator)
        return Split(self.take(training), self.take(places), places, repeats)


class Split(NamedTuple, Generic[R]):
    """Training and validation rows.

    Attributes:
        training: The training rows, in memory or on disk.
        held_out: The validation rows, perhaps none.
        places: Their indices in the table, from 0.
        repeats: Number of rows of the table that repeat an earlier one.
    """

    training: R
    held_out: Rows
    places: Tensor
    repeats: int


@dataclass(frozen=True)
class Labels:
    """Names of the columns and rows of a table in messages.

    Attributes:
        names: Names of the columns as they are to be shown; empty for their numbers from 0.
        count: Number of the row at an index, counted from 1; None for the index itself, from 0.

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
        # The names of a frame may be of any type.
        names = value.columns if value is not None and is_frame(value) else Layout.of(value).labels
        return cls(tuple(map(repr, names)))

    def column(self, index: int) -> str:
        """Name of a column."""
        return f"column {self.names[index] if self.names else index}"

    def row(self, index: int) -> str:
        """Name of a row."""
        return f"row {index}" if self.count is None else f"data row {self.count(index)} (counted from 1)"


NUMBERED = Labels()
"""Labels of a table without names."""


@dataclass(frozen=True)
class Reader:
    """Conversion of data and context to tensors, with checks whose errors name rows and columns.

    Attributes:
        who: The caller, for errors.
        width, context_width: Expected number of columns of data, and of context, 0 for none.
        refused: Density that refuses a context, and advice, for errors; as in `check_context`.
        sizes: Names of the widths, as "input_dim of MAF", for errors; empty without.
        labels, context_labels: Names of columns and rows.
        support: The support of the data; rows may lie anywhere if it is None.
        role: "" or "validation ", the prefix of "data" and "context" in errors.
    """

    who: str
    width: int
    context_width: int
    refused: str = REFUSED
    sizes: tuple[str, str] = ("", "")
    labels: Labels = NUMBERED
    context_labels: Labels = NUMBERED
    support: Support | None = None
    role: str = ""

    def read(self, data: TableLike, context: TableLike | None, places: Sequence[int] | None = None) -> Rows:
        """Convert data and context to tensors on the CPU, of float32 if that is exact and otherwise of float64.

        Args:
            data, context: The table, or some rows of it.
            places: Indices of these rows in the whole table, from 0; None if they are all.

        Raises:
            InputError: For values that are not finite or not inside the support.
            TypeError: For values that are not numeric.
            ValueError: For wrong shapes, or a context missing, superfluous or of another length.
        """
        size, context_size = self.sizes
        table = self._table("data", data, self.width, size)
        self._check_finite("data", table, self.labels, places)
        self._check_inside(table, places)
        more = f" ({context_size})" if context_size else ""
        check_context(self.who, f"{self.role}context", context, self.context_width, refused=self.refused, more=more)
        if context is None:
            return Rows(table, None)
        context_table = self._table("context", context, self.context_width, context_size)
        self._check_finite("context", context_table, self.context_labels, places)
        self.check_paired(data, context)
        return Rows(table, context_table)

    def check_paired(self, data: TableLike, context: TableLike) -> None:
        """Refuse a context of another length or order than the data."""
        check_paired(self.who, f"{self.role}data", data, f"{self.role}context", context)

    def check_training(self, rows: Rows) -> None:
        """Refuse too few rows, and constant columns."""
        if len(rows.data) < LEAST_ROWS:
            raise ValueError(f"{self.who} expected at least {LEAST_ROWS} rows of data, got {len(rows.data)}.")
        self.check_varying(*rows.data.aminmax(dim=0))
        if rows.context is not None:
            self.check_varying(*rows.context.aminmax(dim=0), of_context=True)

    def check_varying(self, low: Tensor, high: Tensor, *, of_context: bool = False) -> None:
        """Refuse constant columns, by the range of each column of data or of context."""
        same = (low == high).nonzero()[:, 0].tolist()
        if not same:
            return
        labels = self.context_labels if of_context else self.labels
        others = [labels.column(column) for column in same[1:9]] + [f"{len(same) - 9} more"] * (len(same) > 9)
        which = f"that column, and likewise {', '.join(others)}" if others else "that column"
        raise InputError(
            f"{self.who} expected {'context' if of_context else 'data'} that varies in every column, "
            f"got {low[same[0]].item():g} in every row of {labels.column(same[0])}: drop {which}.",
            column=same[0],
        )

    def check_rounded(self, rows: Rows, density: Standardiser, places: Sequence[int] | None = None) -> None:
        """Refuse outliers so far out that they are infinite in the units of a density and the dtype of its model.

        Args:
            rows: The rows, in the dtypes of `density`.
            density: The density that standardises them.
            places: As in `read`.
        """
        self._check_finite("data", density.standardised(rows.data), self.labels, places)
        if rows.context is not None:
            standard = density.standardised_context(rows.context)
            self._check_finite("context", standard, self.context_labels, places)

    def _table(self, name: str, value: TableLike, width: int, size: str) -> Tensor:
        name = f"{self.role}{name}"
        about = f"{width} being the {size}" if size else "1 row or more"
        table = table_of(self.who, name, value, width, about, least=not size)
        if not len(table):
            raise ValueError(f"{self.who} expected {name} with rows in it, got shape {tuple(table.shape)}.")
        return table.to(torch.float32 if table.dtype in IN_FLOAT32 else torch.float64)

    def _check_finite(self, name: str, table: Tensor, labels: Labels, places: Sequence[int] | None) -> None:
        wrong = ~table.isfinite()
        if not wrong.any():
            return
        row, column = wrong.nonzero()[0].tolist()
        place = row if places is None else int(places[row])
        raise InputError(
            f"{self.who} expected finite {self.role}{name}, got {table[row, column].item()} in {labels.row(place)}, "
            f"{labels.column(column)}{_tally(wrong.any(1), places, 'rows have such values')}: "
            "drop those rows or fill them in.",
            row=place,
            column=column,
        )

    def _check_inside(self, table: Tensor, places: Sequence[int] | None) -> None:
        support = self.support
        if support is None or not (outside := support.outside(table)).any():
            return
        wrong = support.outside_by_column(table)
        is_sum = not wrong.any()
        row, column = (int(outside.nonzero()[0]), 0) if is_sum else wrong.nonzero()[0].tolist()
        place = row if places is None else int(places[row])
        who = f"{self.who} expected {self.role}data of"
        if is_sum:
            raise InputError(
                f"{who} rows that sum to 1 (support simplex), got {table[row].sum().item():.7g} in "
                f"{self.labels.row(place)}{_tally(outside, places, 'rows do not')}: divide each row by its sum.",
                row=place,
            )
        raise InputError(
            f"{who} {support.values_of(column)} in {self.labels.column(column)} (support {support.name_of(column)}), "
            f"got {table[row, column].item()} in {self.labels.row(place)}"
            f"{_tally(outside, places, 'rows are not inside')}: move those rows inside or choose another support.",
            row=place,
            column=column,
        )


def check_context(who: str, name: str, context: object, columns: int, refused: str = REFUSED, more: str = "") -> None:
    """Refuse a context that is missing or superfluous.

    Args:
        who, name: Caller and argument, for errors.
        context: The context, or None.
        columns: Expected number of its columns, 0 for none.
        refused: Density without a context, and advice, as "MAF, which takes none: leave it out".
        more: Description of the expected columns.
    """
    if context is not None and not columns:
        raise ValueError(f"{who} got {name} for {refused}.")
    if context is None and columns:
        raise ValueError(f"{who} expected {name} with {columns} columns{more}, got none.")


def table_of(who: str, name: str, value: TableLike, width: int, about: str, least: int = 0) -> Tensor:
    """A table as a tensor of `width` columns, as by `numbers`; a vector is one column.

    Args:
        who, name: Caller and argument, for errors.
        value: The table.
        width: Number of columns.
        about: Description of the shape, for errors.
        least: Least number of rows.

    Raises:
        ValueError, TypeError: As `numbers`, and for another shape.
    """
    table = numbers(who, name, value)
    shape = tuple(table.shape)
    if len(shape) == width == 1:
        table = table[:, None]
    if table.dim() != 2 or table.shape[1] != width or len(table) < least:
        raise ValueError(f"{who} expected {name} of shape (rows, {width}), {about}, got {shape}.")
    return table


def copies_of(rows: Rows) -> tuple[int, Tensor]:
    """Group equal rows: the number of distinct ones, and the number of the group of each row, (rows,).

    Cost: that of `hash_rows`, and a sort.

    Example:
        >>> copies_of(Rows(torch.tensor([[7.0], [9.0], [7.0]]), None))
        (2, tensor([1, 0, 1]))
    """
    values, number = np.unique(hash_rows(rows), return_inverse=True)
    return len(values), torch.from_numpy(number)


def repeat_as_a_whole(rows: Rows) -> bool:
    """True if rows repeat as copies, rather than by chance since their columns have few values.

    Then some column has about as many distinct values as there are distinct rows.

    Example:
        >>> draws = torch.arange(60.0)[:, None]
        >>> repeat_as_a_whole(Rows(draws.repeat(2, 3), None))
        True
        >>> repeat_as_a_whole(Rows(torch.cat([draws % 4, draws % 5], 1), None))
        False
    """
    values = (len(np.unique(column)) for table in rows if table is not None for column in table.numpy().T)
    return 2 * max(values) > copies_of(rows)[0]


def hash_rows(rows: Rows) -> Hashes:
    """Hash each row, with its context, to 64 bits.

    Equal rows have the same hash, with 0 equal to -0; among a million distinct rows, two share a hash with a
    probability of 3e-8.

    Cost: some ten elementwise operations on a column.

    Example:
        >>> hashes = hash_rows(Rows(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0]]), None))
        >>> hashes[0] == hashes[2], hashes[0] == hashes[1]
        (np.True_, np.False_)
    """
    hashes: Hashes = np.zeros(1, np.uint64)
    for table in rows:
        if table is None:
            continue
        numbers = (table + 0.0).numpy()  # turns -0 into 0
        bits = np.uint32 if numbers.dtype.itemsize == 4 else np.uint64
        for column in numbers.T:
            hashes = mixed(hashes + STEP ^ np.ascontiguousarray(column).view(bits))
    return hashes


def mixed(hashes: Hashes) -> Hashes:
    """Flip half of the bits of each number on average if one bit of it changes."""
    for shift, factor in MIXES:
        hashes = (hashes ^ hashes >> shift) * factor
    return hashes ^ hashes >> LAST_SHIFT


def _divide(distinct: int, number: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of training and validation rows, from the number of distinct rows and the group of each."""
    total = len(number)
    aside = min(max(1, round(fraction * total)), total - 2)
    if distinct < total:
        count = number.bincount()
        order = torch.randperm(distinct, generator=generator)
        order = order[count[order] <= aside]
        held_out = order[count[order].cumsum(0) <= aside]
        if len(held_out) >= LEAST_HELD_OUT:
            is_held_out = torch.isin(number, held_out)
            shuffled = torch.randperm(total, generator=generator)
            return shuffled[~is_held_out[shuffled]], shuffled[is_held_out[shuffled]]
    shuffled = torch.randperm(total, generator=generator)
    return shuffled[aside:], shuffled[:aside]


def _tally(wrong: Tensor, places: Sequence[int] | None, what: str) -> str:
    """Count the rows in words, if they are all of the table."""
    return "" if places is not None else f" ({int(wrong.sum())} of {len(wrong)} {what})"
