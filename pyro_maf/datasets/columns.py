"""Columns of a table: of numbers, or of categories that become a 0 or 1 each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_maf.datasets.cells import is_missing, number_in, numbers_of, places_of, text_at, text_in, texts_of

__all__ = ["Column", "Survey"]

MOST_CATEGORIES = 1000


@dataclass(frozen=True)
class Column:
    """A column of a table, and how its cells become numbers.

    Attributes:
        name: What it is called.
        place: Where and in which table it stands, as errors say it.
        categories: Its texts in order, or None for a column of numbers.

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

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the numbers that a cell becomes."""
        if self.categories is None:
            return (self.name,)
        return tuple(f"{self.name}={category}" for category in self.categories)

    def encode(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        """Cells as float64, (rows, 1) or (rows, categories).

        Args:
            cells: An array of numpy or pyarrow.
            first_row: Of the table that is the first of `cells`, counted from 1.

        Raises:
            ValueError: For cells that are no finite numbers, or none of the categories.
        """
        return self._numbers(cells, first_row) if self.categories is None else self._one_hot(cells, first_row)

    def _numbers(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        numbers = numbers_of(cells)
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(numbers.astype(np.float32))
        if wrong.any():
            row = int(wrong.argmax())
            expected, advice = _complaint(text_in(cells, row), finite=bool(np.isfinite(numbers[row])))
            raise ValueError(
                f"read_table expected {expected}, got {text_at(cells, row)} in {self._at(first_row + row)}: {advice}."
            )
        return numbers[:, None]

    def _one_hot(self, cells: Any, first_row: int) -> np.ndarray[Any, Any]:
        categories = self.categories or []
        places = places_of(texts_of(cells), categories)
        if (places < 0).any():
            row = int((places < 0).argmax())
            shown = ", ".join(map(repr, categories[:10])) + ", ..." * (len(categories) > 10)
            raise ValueError(
                f"read_table expected one of {shown}, got {text_at(cells, row)} in {self._at(first_row + row)}."
            )
        return np.eye(len(categories))[places]

    def _at(self, row: int) -> str:
        return f"data row {row} (counted from 1) of {self.place}"


class Survey:
    """What a column of context turns out to hold, one batch after another: numbers, or which categories.

    Args:
        name, place: As in `Column`.
        holds_text: Whether it is known to hold text, or numbers that stand for categories; otherwise its cells tell.
    """

    def __init__(self, name: str, place: str, holds_text: bool) -> None:
        self._name = name
        self._place = place
        self._holds_text = holds_text
        self._texts: set[str] = set()
        self._number: str | None = None

    def add(self, cells: Any) -> None:
        """Take note of cells, an array of numpy or pyarrow.

        Raises:
            ValueError: For too many categories.
        """
        different = texts_of(cells).unique()
        is_number = np.zeros(len(different), bool) if self._holds_text else ~np.isnan(numbers_of(different))
        if is_number.any():
            self._number = text_at(different, int(is_number.argmax()))
        self._texts.update(
            different[place].as_py() or "" for place in np.flatnonzero(~is_number)[: MOST_CATEGORIES + 1]
        )
        self._texts.discard("")
        if len(self._texts) > MOST_CATEGORIES:
            raise ValueError(
                f"read_table expected at most {MOST_CATEGORIES} categories, got more in {self._place}: leave it out."
            )

    def column(self) -> Column:
        """What it is.

        Raises:
            ValueError: If it holds both numbers and texts, or the same text in every row.
        """
        if not self._holds_text and all(map(is_missing, self._texts)):
            return Column(self._name, self._place)
        if self._number is not None:
            text = min(text for text in self._texts if not is_missing(text))
            raise ValueError(
                f"read_table expected numbers or text, got both in {self._place}, as {self._number} and {text!r}."
            )
        if len(self._texts) == 1:
            (text,) = self._texts
            raise ValueError(
                f"read_table expected context that varies, got {text!r} in every row of {self._place}: leave it out."
            )
        return Column(self._name, self._place, sorted(self._texts, key=_in_order))


def _in_order(category: str) -> tuple[float, str]:
    """Labels that are numbers come first, as numbers."""
    number = number_in(category)
    return (math.inf if math.isnan(number) else number, category)


def _complaint(text: str, *, finite: bool) -> tuple[str, str]:
    """What was expected instead of a cell, and what to do about it."""
    if finite:
        return "numbers that float32 holds", "divide the column by a power of 10 or leave it out"
    if is_missing(text) or math.isinf(number_in(text)):
        return "finite numbers", "fill it in, drop that row or leave the column out"
    if not math.isnan(number_in(text.replace(",", ".", 1))):
        return "numbers with a decimal point", "replace the comma"
    return "numbers", "leave the column out or make it context"
