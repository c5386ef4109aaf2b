"""Tables in files for a density of a data frame: categories by their labels, truth values and whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow

    from pyro_maf.tables.categories import Categories, Label
    from pyro_maf.tables.layout import Layout
    from pyro_maf.tables.table import DescribedColumn, Description, Table

__all__ = ["arranged", "arrow_column", "arrow_type", "description"]


def description(layout: Layout, context: Sequence[tuple[str, list[str] | None]]) -> Description:
    """Description of the columns of a file, for `read_table`: those of categories are read as context, one-hot.

    Args:
        layout: Names and categories of the columns of data.
        context: Names and categories of the columns of context.
    """
    labels = layout.as_labels() or [None] * len(layout.labels)
    columns = list(zip(layout.labels, labels, strict=True))
    one_hot: list[DescribedColumn] = [
        {"name": name, "categories": list(_codes(among))} for name, among in columns if among is not None
    ]
    given: list[DescribedColumn] = [{"name": name, "categories": among} for name, among in context]
    return {"data": [name for name, among in columns if among is None], "context": one_hot + given}


def arranged(table: Table, layout: Layout) -> Table:
    """The table that was read by the `description` of a layout, with its categories as numbers among the data."""
    codes = {index: list(_codes(labels).values()) for index, labels in enumerate(layout.as_labels()) if labels}
    data = np.empty((len(table.data), len(layout.labels)), table.data.dtype)
    data[:, [index for index in range(data.shape[1]) if index not in codes]] = table.data
    start = 0
    for index, of_texts in codes.items():
        stop = start + len(of_texts)
        data[:, index] = np.asarray(of_texts)[_one_hot(table, start, stop).argmax(1)]
        start = stop
    rest = None if table.context is None else table.context[:, start:]
    return replace(table, data=data, context=None if rest is None or not rest.shape[1] else rest)


def _one_hot(table: Table, start: int, stop: int) -> NDArray[np.floating]:
    return np.asarray([] if table.context is None else table.context[:, start:stop])


def _codes(labels: Sequence[Label]) -> dict[str, int]:
    """Numbers of the texts of labels in files.

    Example:
        >>> _codes([False, True])
        {'False': 0, 'false': 0, 'FALSE': 0, 'True': 1, 'true': 1, 'TRUE': 1}
    """
    codes: dict[str, int] = {}
    for number, label in enumerate(labels):
        for text in _texts(label):
            codes.setdefault(text, number)
    return codes


def _texts(label: Label) -> tuple[str, ...]:
    """The texts of a label in files, as other programs write it."""
    text = str(label)
    if isinstance(label, bool):
        return text, text.lower(), text.upper()
    if isinstance(label, int):
        return text, f"{text}.0"
    return text, text.removesuffix(".0") if isinstance(label, float) else text.strip()


def arrow_type(categories: Categories, dtype: str, number: pyarrow.DataType) -> pyarrow.DataType:
    """Type of a column in files: that of its categories, whole numbers for a dtype of these, or else `number`."""
    import pyarrow

    if categories is None:
        return pyarrow.int64() if dtype.lower().startswith(("int", "uint")) else number
    kinds: tuple[tuple[type, pyarrow.DataType], ...] = (
        (bool, pyarrow.bool_()),
        (int, pyarrow.int64()),
        (float, pyarrow.float64()),
    )
    fitting = (kind for form, kind in kinds if all(type(each) is form for each in categories))
    return next(fitting, pyarrow.string())


def arrow_column(column: NDArray[np.floating], categories: Categories, kind: pyarrow.DataType) -> pyarrow.Array:
    """A column of numbers, (rows,), as written in files."""
    import pyarrow

    from pyro_maf.tables.categories import decoded

    if categories is None:
        return pyarrow.array(column.round().astype(np.int64) if kind == pyarrow.int64() else column, kind)
    values = decoded(column, categories)
    return pyarrow.array(list(map(str, values)) if kind == pyarrow.string() else values, kind)
