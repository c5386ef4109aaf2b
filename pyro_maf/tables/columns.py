"""Columns of a table: numeric, or categorical and encoded one-hot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_maf._core.text import quoted
from pyro_maf.tables.cells import (
    is_date,
    is_missing,
    missing_in,
    number_in,
    numbers_of,
    numbers_of_many,
    places_of,
    text_at,
    text_in,
    texts_of,
)

__all__ = ["Column", "Survey", "encoded"]

MOST_CATEGORIES = 1000
MANY_COLUMNS = 100
MARKS = {".": "point", ",": "comma"}
OTHER = {".": ",", ",": "."}
NO_DATES = "put numbers in their place, such as days or seconds since the first of them"


@dataclass(frozen=True)
class Column:
    """A column of a table and its encoding.

    Attributes:
        name: Its name.
        place: Its position and table, for errors.
        categories: Its categories in order, or None for a column of numbers.
        decimal: The decimal mark in its texts, a point or a comma.

    Example:
        >>> column = Column("colour", "column 'colour'", ["blue", "red"])
        >>> column.encoded_names
        ('colour=blue', 'colour=red')
        >>> column.encode(np.array(["red", "blue"]), first_row=1).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    name: str
    place: str
    categories: list[str] | None = None
    decimal: str = "."

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the encoded columns."""
        if self.categories is None:
            return (self.name,)
        return tuple(f"{self.name}={category}" for category in self.categories)

    def encode(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        """Encode cells as float64, (rows, 1) or (rows, categories), NaN for missing values.

        Args:
            cells: An array of numpy or pyarrow.
            first_row: Row of the table, counted from 1, of the first of `cells`.

        Raises:
            ValueError: For cells that are not finite numbers, or not among the categories.
        """
        return self._numbers(cells, first_row) if self.categories is None else self._one_hot(cells, first_row)

    def complaint(self, cells: Any, row: int, first_row: int) -> str:
        """Begin the error message for one of `cells`: who, expected and actual value, and position."""
        text = text_in(cells, row)
        if self.categories is not None:
            expected = "one of " + ", ".join(map(quoted, self.categories[:10])) + ", ..." * (len(self.categories) > 10)
        elif is_missing(text) or math.isinf(number_in(text, self.decimal)):
            expected = "finite numbers"
        elif not math.isnan(number_in(text, self.decimal)):
            expected = "numbers that float32 holds"
        else:
            is_other = not math.isnan(number_in(text, OTHER[self.decimal]))
            expected = "numbers" + f" with a decimal {MARKS[self.decimal]}" * is_other
        place = f"data row {first_row + row} (counted from 1) of {self.place}"
        return f"read_table expected {expected}, got {text_at(cells, row)} in {place}"

    def _numbers(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        numbers = numbers_of(cells, self.decimal)
        with np.errstate(over="ignore", invalid="ignore"):
            wrong = ~np.isfinite(numbers.astype(np.float32))
        if wrong.any():
            wrong &= ~missing_in(cells)
        if wrong.any():
            row = int(wrong.argmax())
            advice = self._advice(text_in(cells, row))
            raise ValueError(f"{self.complaint(cells, row, first_row)}: {advice}.")
        return numbers[:, None]

    def _advice(self, text: str) -> str:
        """Advice for a cell without a valid number."""
        number = number_in(text, self.decimal)
        if math.isinf(number):
            return "fill it in, drop that row or leave the column out"
        if not math.isnan(number):
            return "divide the column by a power of 10 or leave it out"
        if is_date(text):
            return f"{NO_DATES}, or leave the column out"
        other = OTHER[self.decimal]
        if self.decimal in text and not math.isnan(number_in(text.replace(other, ""), self.decimal)):
            return f"take the {MARKS[other]} between thousands out"
        if not math.isnan(number_in(text, other)):
            return f"replace the {MARKS[other]}. decimal={other!r}, or --decimal {other}, reads such numbers"
        return "leave the column out or make it context"

    def _one_hot(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        categories = self.categories or []
        places = places_of(texts_of(cells), categories)
        unknown = places < 0
        if not unknown.any():
            return np.eye(len(categories))[places]
        unknown &= ~missing_in(cells)
        if unknown.any():
            raise ValueError(f"{self.complaint(cells, int(unknown.argmax()), first_row)}.")
        return np.where(places[:, None] < 0, np.nan, np.eye(len(categories))[places])


def encoded(columns: Sequence[Column], batch: Sequence[Any], first_row: int) -> np.ndarray[Any, Any]:
    """Encode all columns of a batch of rows, (rows, numbers), each as `Column.encode`.

    Thousands of columns of text take a single call if all cells hold numbers.
    """
    if len(columns) > MANY_COLUMNS and all(column.categories is None for column in columns):
        numbers = numbers_of_many(batch)
        if numbers is not None:
            return numbers
    parts = [column.encode(cells, first_row) for column, cells in zip(columns, batch, strict=True)]
    return np.concatenate(parts, 1)


class Survey:
    """Type inference for a column of context, batch by batch: numeric, or categorical with its categories.

    Args:
        name, place, decimal: As in `Column`.
        holds_text: True for text, or numbers that are labels of categories; otherwise inferred from the cells.
    """

    def __init__(self, name: str, place: str, holds_text: bool, decimal: str = ".") -> None:
        self._name = name
        self._place = place
        self._holds_text = holds_text
        self._decimal = decimal
        self._texts: set[str] = set()
        self._number: str | None = None

    def add(self, cells: Any) -> None:
        """Add cells, an array of numpy or pyarrow.

        Raises:
            ValueError: For too many categories.
        """
        different = texts_of(cells).unique()
        is_number = (
            np.zeros(len(different), bool) if self._holds_text else ~np.isnan(numbers_of(different, self._decimal))
        )
        if is_number.any():
            self._number = text_at(different, int(is_number.argmax()))
        self._texts.update(
            different[place].as_py() or "" for place in np.flatnonzero(~is_number)[: MOST_CATEGORIES + 1]
        )
        self._texts.discard("")
        if len(self._texts) > MOST_CATEGORIES:
            advice = f"{NO_DATES}, or leave it out" if all(map(is_date, self._texts)) else "leave it out"
            raise ValueError(
                f"read_table expected at most {MOST_CATEGORIES} categories, got more in {self._place}: {advice}."
            )

    def column(self) -> Column:
        """The inferred column.

        Raises:
            ValueError: If it holds both numbers and texts, or the same text in every row.
        """
        if not self._holds_text and all(map(is_missing, self._texts)):
            return Column(self._name, self._place, decimal=self._decimal)
        texts = [text for text in self._texts if not is_missing(text)]
        if not self._holds_text and all(map(is_date, texts)):
            raise ValueError(
                f"read_table expected numbers or categories, got dates or times, as {quoted(min(texts))}, in "
                f"{self._place}: {NO_DATES}, or name it among the categories."
            )
        if not self._texts:
            raise ValueError(f"read_table expected context with values, got none in {self._place}: leave it out.")
        if self._number is not None:
            raise ValueError(
                f"read_table expected numbers or text, got both in {self._place}, as {self._number} and "
                f"{quoted(min(texts))}."
            )
        if len(self._texts) == 1:
            (text,) = self._texts
            raise ValueError(
                f"read_table expected context that varies, got {quoted(text)} in every row of {self._place}: leave it "
                "out."
            )
        return Column(self._name, self._place, sorted(self._texts, key=_in_order))


def _in_order(category: str) -> tuple[float, str]:
    """Sort key of a category: numbers first, by value."""
    number = number_in(category)
    return (math.inf if math.isnan(number) else number, category)
