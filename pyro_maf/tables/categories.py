"""Categorical columns: conversion of the texts and truth values of a data frame to numbers and back."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.checks import InputError
from pyro_maf._core.messages import shown

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "LEAST_REPEATS",
    "MOST_CATEGORIES",
    "Categories",
    "Label",
    "categories_of",
    "coded",
    "decoded",
    "is_missing",
    "label_of",
    "one_hot",
    "restored",
]

Categories: TypeAlias = tuple[Hashable, ...] | None
"""Categories of a column in order, numbered 0, 1, ...; None for a column of numbers."""
Label: TypeAlias = str | bool | int | float
"""A category as a JSON value."""

MOST_CATEGORIES = 1000
LEAST_REPEATS = 2
"""Maximum number of categories, and minimum average number of rows per category; with fewer, they are row names."""


def categories_of(who: str, frame: DataFrame) -> tuple[Categories, ...]:
    """Categories of each column of a data frame that holds texts, truth values or a categorical type.

    Columns of numbers, and of other objects such as dates, have None.

    Raises:
        InputError: For a missing value among categories, with row and column, or for a column with a single category.
        ValueError: For a column whose categories hardly repeat, such as names.

    Example:
        >>> from pandas import DataFrame
        >>> categories_of("fit", DataFrame({"a": [1.5, 2.5] * 2, "b": ["red", "blue"] * 2, "c": [True, False] * 2}))
        (None, ('blue', 'red'), (False, True))
    """
    return tuple(_categories(who, place, name, frame.iloc[:, place]) for place, name in enumerate(frame.columns))


def _categories(who: str, place: int, name: Hashable, column: Series[Any]) -> Categories:
    kind = getattr(column.dtype, "kind", "O")
    dtype: Any = column.dtype
    is_categorical = hasattr(dtype, "categories")
    if not is_categorical and kind not in "ObTU":
        return None
    missing = column.isna().to_numpy()
    values = column[~missing].unique()
    if not is_categorical and not all(isinstance(value, (str, bool, np.bool_)) for value in values):
        return None
    if missing.any():
        row = int(missing.argmax())
        raise InputError(
            f"{who} expected a category, got a missing value in row {row}, column {name!r} ({int(missing.sum())} of "
            f"{len(column)} rows have one): fill it in, as by fillna('unknown'), or drop those rows.",
            row=row,
            column=place,
        )
    if len(values) == 1:
        raise InputError(
            f"{who} expected data that varies in every column, got {values.tolist()[0]!r} in every row of column "
            f"{name!r}: drop that column.",
            column=place,
        )
    if len(values) > min(MOST_CATEGORIES, max(2, len(column) // LEAST_REPEATS)):
        raise ValueError(
            f"{who} expected categories that repeat, got {len(values)} in {len(column)} rows of column {name!r}: "
            "drop it or merge the rare ones."
        )
    order = list(dtype.categories) if is_categorical else sorted(values, key=lambda value: (str(value), value))
    present = set(values.tolist())
    return tuple(value.item() if isinstance(value, np.generic) else value for value in order if value in present)


def label_of(category: Hashable) -> Label:
    """The category as a JSON value: itself, or its text if it has another type, such as an interval."""
    return category if isinstance(category, (str, bool, int, float)) else str(category)


def coded(values: object, categories: Sequence[Hashable]) -> NDArray[np.float32]:
    """Numbers of values among the categories: -1 for unknown values, NaN for missing ones.

    Example:
        >>> coded(["red", "green", None], ("blue", "red")).tolist()
        [1.0, -1.0, nan]
    """
    number = {category: index for index, category in enumerate(categories)}
    each = np.asarray(values, dtype=object).tolist()
    codes = {
        value: np.nan if is_missing(value) else number.get(value, number.get(label_of(value), -1))
        for value in set(each)
    }
    return np.array([codes[value] for value in each], np.float32)


def is_missing(value: object) -> bool:
    """Return whether a value is None, NaN or pandas's NA, whose comparison with itself is NA."""
    is_itself = value == value
    return value is None or not (isinstance(is_itself, (bool, np.bool_)) and is_itself)


def one_hot(
    who: str, role: str, name: Hashable, values: object, categories: Sequence[Hashable]
) -> dict[str, NDArray[np.float32]]:
    """Encode a column of categories one-hot, as a dictionary of named columns.

    Raises:
        InputError: For a value that is not a category.

    Example:
        >>> one_hot("fit", "context", "colour", ["red", "blue", "red"], ("blue", "red"))["colour=red"].tolist()
        [1.0, 0.0, 1.0]
    """
    codes = np.atleast_1d(coded(values, categories))
    if (unknown := ~(codes >= 0)).any():
        row = int(unknown.argmax())
        got = np.atleast_1d(np.asarray(values, dtype=object))[row]
        raise InputError(
            f"{who} expected {role} with one of the categories {shown(repr(tuple(categories)))} in column {name!r}, "
            f"got {got!r} in row {row}.",
            row=row,
        )
    columns = np.eye(len(categories), dtype=np.float32)[codes.astype(int)].T
    return {f"{name}={category}": column for category, column in zip(categories, columns, strict=True)}


def decoded(numbers: NDArray[np.floating], categories: Sequence[Hashable]) -> list[Hashable]:
    """The categories with these numbers."""
    return [categories[number] for number in numbers.astype(int).tolist()]


def restored(frame: DataFrame, categories: Sequence[Categories], dtypes: Sequence[str]) -> DataFrame:
    """Convert a frame of numbers back to categories, where there are any, and to these dtypes by name."""
    frame = frame.copy()
    for place, dtype in enumerate(dtypes):
        column: Any = frame.iloc[:, place]
        among = categories[place] if categories else None
        if among is not None:
            column = type(column)(decoded(column.to_numpy(), among), index=frame.index, dtype=object)
        elif dtype.lower().startswith(("int", "uint")):
            column = column.round()
        elif (str(column.dtype), dtype) == ("float32", "float64"):
            column = column.astype(str)  # 23.7 in float32 becomes 23.7 again, not 23.700000762939453
        with contextlib.suppress(NotImplementedError):  # pandas has no name for some Arrow types, such as decimals
            column = column.astype(dtype)
        frame.isetitem(place, column)
    return frame
