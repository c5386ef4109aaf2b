"""What stands in the cells of a column: numbers, texts, or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_maf.extras import require
from pyro_maf.wording import quoted, shown

__all__ = [
    "is_missing",
    "is_text",
    "number_in",
    "numbers_of",
    "places_of",
    "text_at",
    "text_in",
    "texts_of",
]

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}

Column = Any
"""An array of numpy or pyarrow with one dimension."""


def number_in(text: str) -> float:
    """The number that a cell holds, NaN where it holds none.

    Example:
        >>> number_in("+1.5e3"), number_in("1_5")
        (1500.0, nan)
    """
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def is_missing(text: str) -> bool:
    """Whether a cell says that its number is missing."""
    return text.casefold() in MISSING


def numbers_of(column: Column) -> np.ndarray[Any, Any]:
    """The numbers of a column as float64, NaN where there is none."""
    if isinstance(column, np.ndarray):
        with np.errstate(invalid="ignore"):  # a NaN that signals is one all the same
            return column.astype(np.float64)
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        try:
            column = pc.cast(column, pyarrow.float64())
        except pyarrow.ArrowInvalid:  # one that arrow does not read; Python reads a sign and spaces before it
            return np.array([math.nan if text is None else number_in(text) for text in column.to_pylist()])
    if pyarrow.types.is_float16(column.type):
        return column.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.asarray(pc.cast(column, pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False))


def texts_of(column: Column) -> Any:
    """A column as texts of pyarrow without spaces around them; truth values are True and False, as Python writes them.

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
    """Where each text stands among `categories`, -1 where it does not."""
    import pyarrow
    import pyarrow.compute as pc

    places = pc.index_in(texts, value_set=pyarrow.array(categories, texts.type))
    return np.asarray(pc.fill_null(places, -1).to_numpy(zero_copy_only=False))


def text_in(column: Column, row: int) -> str:
    """What stands in a cell, without spaces around it; nothing where that is null."""
    value = column[row]
    value = value.as_py() if hasattr(value, "as_py") else value.item()
    return "" if value is None else str(value).strip()


def text_at(column: Column, row: int) -> str:
    """What stands in a cell, as an error shows it: text in quotes."""
    text = text_in(column, row)
    if not text:
        return "an empty cell"
    return shown(text) if isinstance(column, np.ndarray) or not is_text(column.type) else quoted(text)


def is_text(kind: Any) -> bool:
    """Whether a type of pyarrow is one of text."""
    from pyarrow import types

    # string_view is younger than the oldest pyarrow that will do.
    names = ("is_string", "is_large_string", "is_string_view")
    return any(getattr(types, name)(kind) for name in names if hasattr(types, name))
