"""Cells of a column: numbers, text, or missing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_maf._core.extras import require
from pyro_maf._core.text import quoted, shown

__all__ = [
    "is_date",
    "is_missing",
    "is_text",
    "missing_in",
    "number_in",
    "numbers_of",
    "numbers_of_many",
    "places_of",
    "text_at",
    "text_in",
    "texts_of",
]

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
DATE = re.compile(
    r"(\d{4}([-/.])\d{1,2}\2\d{1,2}|\d{1,2}([-/.])\d{1,2}\3(\d{4}|\d{2})|\d{1,2}[-. ]+[A-Za-z]{3,9}[-. ]+\d{2,4})"
    r"([T ,]|$)|\d{1,2}:\d{2}(:\d{2}|$)"
)

Column = Any
"""A one-dimensional array of numpy or pyarrow."""


def number_in(text: str, decimal: str = ".") -> float:
    """Parse the number in a cell; NaN if there is none.

    Args:
        text: The cell's text.
        decimal: The decimal mark, a point or a comma. With a comma, a text with a point is not a number: the point may
        separate thousands.

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


def is_date(text: str) -> bool:
    """True if a cell holds a date, a time or both rather than a number.

    Example:
        >>> list(map(is_date, ["2024-02-29T08:15:00Z", "29.2.2024 8:15", "2/29/24", "29-Feb-2024", "8:15", "1.5"]))
        [True, True, True, True, True, False]
    """
    return DATE.match(text) is not None


def is_missing(text: str) -> bool:
    """True if a cell marks a missing number."""
    return text.casefold() in MISSING


def numbers_of(column: Column, decimal: str = ".") -> np.ndarray[Any, Any]:
    """Convert a column to float64, NaN for cells without a number; `decimal` as in `number_in`."""
    if isinstance(column, np.ndarray):
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN too
            return column.astype(np.float64)
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = _with_points(column) if decimal == "," else column
        try:
            column = pc.cast(column, pyarrow.float64())
        except pyarrow.ArrowInvalid:
            column = _without_gaps(column)
    if pyarrow.types.is_float16(column.type):
        return column.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.asarray(pc.cast(column, pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False))


def numbers_of_many(columns: Sequence[Column]) -> np.ndarray[Any, Any] | None:
    """Parse columns of text to (rows, columns); None unless every cell is a finite number in the range of float32."""
    if any(isinstance(column, np.ndarray) for column in columns):
        return None
    kind = columns[0].type
    if not is_text(kind) or any(column.type != kind for column in columns):
        return None
    import pyarrow
    import pyarrow.compute as pc

    try:
        numbers = pc.cast(pyarrow.concat_arrays(columns), pyarrow.float64()).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowInvalid:
        return None
    with np.errstate(over="ignore"):
        if not np.isfinite(numbers.astype(np.float32)).all():
            return None
    return np.ascontiguousarray(numbers.reshape(len(columns), -1).T)


def _with_points(column: Column) -> Column:
    """Replace the first comma of texts by a point; null for texts that have a point."""
    import pyarrow
    import pyarrow.compute as pc

    nothing = pyarrow.scalar(None, column.type)
    return pc.if_else(
        pc.match_substring(column, "."), nothing, pc.replace_substring(column, ",", ".", max_replacements=1)
    )


def _without_gaps(column: Column) -> Column:
    """Parse texts, some of which arrow does not parse as numbers."""
    import pyarrow
    import pyarrow.compute as pc

    column = pc.if_else(pyarrow.array(missing_in(column)), pyarrow.scalar(None, column.type), column)
    try:
        return pc.cast(column, pyarrow.float64())
    except pyarrow.ArrowInvalid:  # unlike arrow, Python accepts a plus sign and spaces before a number
        texts = column.to_pylist()
        return pyarrow.array([math.nan if text is None else number_in(text) for text in texts], pyarrow.float64())


def missing_in(column: Column) -> np.ndarray[Any, Any]:
    """Mask of the cells of a column that mark a missing value.

    Example:
        >>> missing_in(np.array([1.0, math.nan])).tolist()
        [False, True]
    """
    if isinstance(column, np.ndarray):
        return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), bool)
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_text(column.type):
        return np.asarray(pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False))
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(column, pyarrow.string())))
    is_one = pc.is_in(texts, value_set=pyarrow.array(sorted(MISSING)))
    return np.asarray(pc.or_kleene(is_one, pc.is_null(column)).to_numpy(zero_copy_only=False))


def texts_of(column: Column) -> Any:
    """Convert a column to stripped texts of pyarrow; truth values become True and False, as in Python.

    Example:
        >>> texts_of(np.array([1, 2])).to_pylist()
        ['1', '2']
    """
    require("read_table", "pyarrow")
    import pyarrow
    import pyarrow.compute as pc

    if isinstance(column, np.ndarray):
        column = pyarrow.array(column)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    return pc.utf8_trim_whitespace(pc.cast(column, pyarrow.string()))


def places_of(texts: Any, categories: Sequence[str]) -> np.ndarray[Any, Any]:
    """Index of each text in `categories`, -1 for others."""
    import pyarrow
    import pyarrow.compute as pc

    places = pc.index_in(texts, value_set=pyarrow.array(categories, texts.type))
    return np.asarray(pc.fill_null(places, -1).to_numpy(zero_copy_only=False))


def text_in(column: Column, row: int) -> str:
    """Text of a cell, stripped; "" for null."""
    value = column[row]
    value = value.as_py() if hasattr(value, "as_py") else value.item()
    return "" if value is None else str(value).strip()


def text_at(column: Column, row: int) -> str:
    """Content of a cell in an error message: text is quoted."""
    text = text_in(column, row)
    if not text:
        return "an empty cell"
    return shown(text) if isinstance(column, np.ndarray) or not is_text(column.type) else quoted(text)


def is_text(kind: Any) -> bool:
    """True if a type of pyarrow is a text type."""
    from pyarrow import types

    # string_view is newer than the oldest supported pyarrow.
    names = ("is_string", "is_large_string", "is_string_view")
    return any(getattr(types, name)(kind) for name in names if hasattr(types, name))
