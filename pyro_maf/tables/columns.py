"""Columns of a table in a file, numeric or categorical, and their cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.checks import InputError
from pyro_maf._core.messages import quoted, require, shown
from pyro_maf.tables.categories import LEAST_REPEATS, MOST_CATEGORIES, Label

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Cells", "Column", "Survey", "codes_of", "is_missing", "is_text", "number_in"]

Cells: TypeAlias = "NDArray[np.generic] | pyarrow.Array"
"""Cells of a column: a one-dimensional numpy or pyarrow array."""

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
DATE = re.compile(
    r"(\d{4}([-/.])\d{1,2}\2\d{1,2}|\d{1,2}([-/.])\d{1,2}\3(\d{4}|\d{2})|\d{1,2}[-. ]+[A-Za-z]{3,9}[-. ]+\d{2,4})"
    r"([T ,]|$)|\d{1,2}:\d{2}(:\d{2}|$)"
)

THOUSANDS = re.compile(r"[+-]?\d{1,3}[.,]\d{3}")
MARKS = {".": "point", ",": "comma"}
OTHER = {".": ",", ",": "."}
NO_DATES = "put numbers in their place, such as days or seconds since the first of them"


@dataclass(frozen=True)
class Column:
    """A column of a table and its encoding.

    Attributes:
        name: Name of the column.
        place: Name of the column and its table, for error messages.
        index: Position in the table, from 0.
        categories: Categories in order, or None for a column of numbers.
        decimal: Decimal mark in texts, a point or a comma.
        is_label: Whether categories are encoded by their numbers, as in a column of data, rather than one-hot.

    Example:
        >>> column = Column("colour", "column 'colour'", categories=["blue", "red"])
        >>> column.encoded_names
        ('colour=blue', 'colour=red')
        >>> column.encode(np.array(["red", "blue"]), first_row=1).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    name: str
    place: str
    index: int = 0
    categories: Sequence[Label] | None = None
    decimal: str = "."
    is_label: bool = False

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the encoded columns."""
        if self.categories is None or self.is_label:
            return (self.name,)
        return tuple(f"{self.name}={category}" for category in self.categories)

    def encode(self, cells: Cells, first_row: int) -> NDArray[np.float64]:
        """Encode cells as float64, (rows, 1) or one-hot (rows, categories), NaN for missing values.

        Raises:
            ValueError: For cells that are not finite numbers, or not among the categories. Rows count from `first_row`.
        """
        if self.categories is None:
            return self._numbers(cells, first_row)
        places = self._places(cells, first_row)
        codes = np.where(places < 0, np.nan, places)[:, None]
        return codes if self.is_label else np.where(np.isnan(codes), np.nan, np.eye(len(self.categories))[places])

    def complaint(self, cells: Cells, row: int, first_row: int) -> str:
        """Start of the error message about one of `cells`: expected and actual value, and position."""
        text = _text_in(cells, row)
        if self.categories is not None:
            among = [quoted(str(category)) for category in self.categories[:10]]
            expected = f"one of {', '.join(among)}{', ...' * (len(self.categories) > 10)}"
        elif is_missing(text) or math.isinf(number_in(text, self.decimal)):
            expected = "finite numbers"
        elif not math.isnan(number_in(text, self.decimal)):
            expected = "numbers that float32 holds"
        else:
            is_other = not math.isnan(number_in(text, OTHER[self.decimal]))
            expected = "numbers" + f" with a decimal {MARKS[self.decimal]}" * is_other
        place = f"data row {first_row + row} (counted from 1) of {self.place}"
        return f"read_table expected {expected}, got {_text_at(cells, row)} in {place}"

    def error(self, message: str, row: int) -> InputError:
        """Error about a row of this column, counted from 1."""
        return InputError(message, row=row - 1, column=self.index)

    @cached_property
    def _codes(self) -> dict[str, int]:
        return codes_of(self.categories or ())

    def _numbers(self, cells: Cells, first_row: int) -> NDArray[np.float64]:
        numbers = _numbers_of(cells, self.decimal)
        with np.errstate(over="ignore", invalid="ignore"):
            wrong = ~np.isfinite(numbers.astype(np.float32))
        if wrong.any():
            wrong &= ~_missing_in(cells)
        if wrong.any():
            row = int(wrong.argmax())
            advice = self._advice(_text_in(cells, row))
            raise self.error(f"{self.complaint(cells, row, first_row)}: {advice}.", first_row + row)
        return numbers[:, None]

    def _advice(self, text: str) -> str:
        """Advice about a cell without a valid number."""
        number = number_in(text, self.decimal)
        if math.isinf(number):
            return "fill it in, drop that row or leave the column out"
        if not math.isnan(number):
            return "divide the column by a power of 10 or leave it out"
        if _is_date(text):
            return f"{NO_DATES}, or leave the column out"
        other = OTHER[self.decimal]
        if self.decimal in text and not math.isnan(number_in(text.replace(other, ""), self.decimal)):
            return f"take the {MARKS[other]} between thousands out"
        if not math.isnan(number_in(text, other)):
            thousands = ", or take it out if it is between thousands" * bool(THOUSANDS.fullmatch(text.strip()))
            return f"replace the {MARKS[other]}{thousands}. decimal={other!r}, or --decimal {other}, reads such numbers"
        return "leave the column out or make it context"

    def _places(self, cells: Cells, first_row: int) -> NDArray[np.int_]:
        """Indices of cells among the categories, -1 for missing values."""
        import pyarrow
        import pyarrow.compute as pc

        texts, codes = _texts_of(cells), self._codes
        found = pc.index_in(texts, value_set=pyarrow.array(list(codes), texts.type))
        # A text that is not a category is at -1, the last place.
        places = np.array([*codes.values(), -1])[pc.fill_null(found, -1).to_numpy(zero_copy_only=False)]
        unknown = places < 0
        if unknown.any():
            unknown &= ~_missing_in(cells)
        if unknown.any():
            row = int(unknown.argmax())
            raise self.error(f"{self.complaint(cells, row, first_row)}.", first_row + row)
        return places


def codes_of(categories: Sequence[Label]) -> dict[str, int]:
    """Numbers of the categories by their texts in files; different programs write truth values differently.

    Example:
        >>> codes_of([False, True])
        {'False': 0, 'false': 0, 'FALSE': 0, 'True': 1, 'true': 1, 'TRUE': 1}
    """
    codes: dict[str, int] = {}
    for number, category in enumerate(categories):
        text = str(category)
        if isinstance(category, bool):
            texts = [text, text.lower(), text.upper()]
        elif isinstance(category, int):
            texts = [text, f"{text}.0"]
        else:
            texts = [text, text.removesuffix(".0") if isinstance(category, float) else text.strip()]
        for each in texts:
            codes.setdefault(each, number)
    return codes


class Survey:
    """Type inference for a column, batch by batch: numeric, or categorical with its categories.

    Args:
        column: The column, as one of numbers.
        holds_text: True for text, or for numbers that label categories; otherwise inferred from the cells.
    """

    def __init__(self, column: Column, holds_text: bool) -> None:
        self._column = column
        self._holds_text = holds_text
        self._texts: set[str] = set()
        self._number: str | None = None
        self._rows = 0

    def add(self, cells: Cells) -> None:
        """Add cells, a numpy or pyarrow array."""
        different = _texts_of(cells).unique()
        self._rows += len(cells)
        is_number = np.zeros(len(different), bool)
        if not self._holds_text:
            is_number = ~np.isnan(_numbers_of(different, self._column.decimal))
        if is_number.any():
            self._number = _text_at(different, int(is_number.argmax()))
        self._texts.update(
            different[place].as_py() or "" for place in np.flatnonzero(~is_number)[: MOST_CATEGORIES + 1]
        )
        self._texts.discard("")

    @property
    def may_be_labels(self) -> bool:
        """True if no cell so far is a number and there are not too many distinct texts."""
        return self._number is None and len(self._texts) <= MOST_CATEGORIES

    def labels(self) -> Column | None:
        """The column as a data column of labels if its texts vary, repeat and are not dates; otherwise None."""
        texts = self._texts
        if not self.may_be_labels or not 1 < len(texts) <= self._rows // LEAST_REPEATS or all(map(_is_date, texts)):
            return None
        return replace(self._column, categories=sorted(texts, key=_in_order), is_label=True)

    def check_few(self) -> None:
        """Raise if there are too many categories."""
        if len(self._texts) > MOST_CATEGORIES:
            advice = f"{NO_DATES}, or leave it out" if all(map(_is_date, self._texts)) else "leave it out"
            raise ValueError(
                f"read_table expected at most {MOST_CATEGORIES} categories, got more in {self._column.place}: {advice}."
            )

    def column(self) -> Column:
        """The inferred column, as a column of context.

        Raises:
            ValueError: If it holds both numbers and texts, or the same text in every row.
        """
        place = self._column.place
        if not self._holds_text and all(map(is_missing, self._texts)):
            return self._column
        texts = [text for text in self._texts if not is_missing(text)]
        if not self._holds_text and all(map(_is_date, texts)):
            raise ValueError(
                f"read_table expected numbers or categories, got dates or times, as {quoted(min(texts))}, in "
                f"{place}: {NO_DATES}, or name it among the categories."
            )
        if not self._texts:
            raise ValueError(f"read_table expected context with values, got none in {place}: leave it out.")
        if self._number is not None:
            raise ValueError(
                f"read_table expected numbers or text, got both in {place}, as {self._number} and {quoted(min(texts))}."
            )
        if len(self._texts) == 1:
            (text,) = self._texts
            raise ValueError(
                f"read_table expected context that varies, got {quoted(text)} in every row of {place}: leave it out."
            )
        return replace(self._column, categories=sorted(self._texts, key=_in_order))


def _in_order(category: Label) -> tuple[float, str]:
    """Sort key of a category: numbers first, by value."""
    number = number_in(str(category))
    return (math.inf if math.isnan(number) else number, str(category))


def number_in(text: str, decimal: str = ".") -> float:
    """Parse the number in a cell; NaN if there is none.

    Example:
        >>> number_in("+1.5e3"), number_in("1_5"), number_in("1,5", ","), number_in("1.500", ",")
        (1500.0, nan, 1.5, nan)
    """
    if decimal == ",":
        text = "" if "." in text else text.replace(",", ".", 1)
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _is_date(text: str) -> bool:
    """Return whether a cell holds a date or time rather than a number."""
    return DATE.match(text) is not None


def is_missing(text: str) -> bool:
    """Return whether a cell marks a missing number."""
    return text.casefold() in MISSING


def _numbers_of(column: Cells, decimal: str = ".") -> NDArray[np.float64]:
    """Convert a column to float64, NaN for cells without a number; `decimal` as in `number_in`."""
    if isinstance(column, np.ndarray):
        with np.errstate(invalid="ignore"):  # a signalling NaN counts as NaN
            return column.astype(np.float64)
    import pyarrow
    import pyarrow.compute as pc

    if is_text(column.type):
        column = _with_points(column) if decimal == "," else column
        try:
            column = pc.cast(column, pyarrow.float64())
        except pyarrow.ArrowInvalid:
            column = _without_gaps(column)
    if pyarrow.types.is_float16(column.type):
        return column.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.asarray(pc.cast(column, pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False))


def _with_points(column: pyarrow.Array) -> pyarrow.Array:
    """Replace the first comma of each text by a point; texts that have a point become null."""
    import pyarrow
    import pyarrow.compute as pc

    nothing = pyarrow.scalar(None, column.type)
    return pc.if_else(
        pc.match_substring(column, "."), nothing, pc.replace_substring(column, ",", ".", max_replacements=1)
    )


def _without_gaps(column: pyarrow.Array) -> pyarrow.Array:
    """Parse texts, including numbers that arrow does not parse."""
    import pyarrow
    import pyarrow.compute as pc

    column = pc.if_else(pyarrow.array(_missing_in(column)), pyarrow.scalar(None, column.type), column)
    try:
        return pc.cast(column, pyarrow.float64())
    except pyarrow.ArrowInvalid:  # unlike arrow, Python accepts a plus sign and spaces before a number
        texts = column.to_pylist()
        return pyarrow.array([math.nan if text is None else number_in(text) for text in texts], pyarrow.float64())


def _missing_in(column: Cells) -> NDArray[np.bool_]:
    """Mask of the cells of a column that mark a missing value."""
    if isinstance(column, np.ndarray):
        return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), bool)
    import pyarrow
    import pyarrow.compute as pc

    if not is_text(column.type):
        return np.asarray(pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False))
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(column, pyarrow.string())))
    is_one = pc.is_in(texts, value_set=pyarrow.array(sorted(MISSING)))
    return np.asarray(pc.or_kleene(is_one, pc.is_null(column)).to_numpy(zero_copy_only=False))


def _texts_of(column: Cells) -> pyarrow.Array:
    """Convert a column to stripped pyarrow texts; truth values become True and False, as in Python."""
    require("read_table", "pyarrow")
    import pyarrow
    import pyarrow.compute as pc

    if isinstance(column, np.ndarray):
        column = pyarrow.array(column)
    if pyarrow.types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    return pc.utf8_trim_whitespace(pc.cast(column, pyarrow.string()))


def _text_in(column: Cells, row: int) -> str:
    """Text of a cell, stripped; "" for null."""
    value = column[row]
    value = value.as_py() if hasattr(value, "as_py") else value.item()
    return "" if value is None else str(value).strip()


def _text_at(column: Cells, row: int) -> str:
    """Content of a cell, for an error message; text is quoted."""
    text = _text_in(column, row)
    if not text:
        return "an empty cell"
    return shown(text) if isinstance(column, np.ndarray) or not is_text(column.type) else quoted(text)


def is_text(kind: pyarrow.DataType) -> bool:
    """Return whether a pyarrow type is a text type."""
    from pyarrow import types

    # string_view is newer than the oldest supported pyarrow.
    names = ("is_string", "is_large_string", "is_string_view")
    return any(getattr(types, name)(kind) for name in names if hasattr(types, name))
