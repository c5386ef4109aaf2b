"""Data, context and weights of any form, with the names of their columns and rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf._core.checks import InputError
from pyro_maf._core.messages import quoted, shown
from pyro_maf.tables.categories import categories_of
from pyro_maf.tables.layout import NAMELESS, Layout, TableLike, as_pandas, is_frame, listed_names, with_frame
from pyro_maf.tables.reader import LEAST_ROWS, Labels, check_paired
from pyro_maf.tables.table import Table

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["NamedRows", "named_rows"]


class NamedRows(NamedTuple):
    """Data and context, with the names of their columns and rows.

    Attributes:
        data: Rows (N, D).
        context: Context of the rows, (N, C), or None.
        labels, context_labels: Names of columns and rows in messages.
        weights: Weights (N,), or None.
        layout, context_layout: Form and column names of the data, also for samples of it, and of the context.
    """

    data: TableLike
    context: TableLike | None
    labels: Labels
    context_labels: Labels
    weights: TableLike | None = None
    layout: Layout = NAMELESS
    context_layout: Layout = NAMELESS

    def check_apart(self, who: str) -> None:
        """Raise if a column is both in the data and in the context, with the same values."""
        data, context = self.data, self.context
        if not (isinstance(data, Mapping) or is_frame(data)) or not (isinstance(context, Mapping) or is_frame(context)):
            return
        for name in set(self.layout.names) & set(self.context_layout.names):
            if np.array_equal(_array(data[name]), _array(context[name])):
                raise ValueError(
                    f"{who} expected other columns of data than of context, got {name!r} in both: leave it out of the "
                    f"data, as by frame.drop(columns={[name]})."
                )

    def coded(self, who: str) -> NamedRows:
        """Encode categories of a data frame as numbers: texts, truth values and categorical columns.

        Raises:
            ValueError: As `categories_of`, and for a frame without rows.
        """
        frame = with_frame(self.data)
        if not is_frame(frame):
            return self
        if not len(frame):
            raise ValueError(f"{who} expected at least {LEAST_ROWS} rows of data, got 0.")
        categories = categories_of(who, frame)
        if not any(categories):
            return self
        layout = self.layout._replace(categories=categories)
        data = layout.coded(who, "data", frame)
        return self._replace(data=data, layout=layout)

    def with_context_coded(self, who: str, layout: Layout) -> NamedRows:
        """Encode categories of a context's data frame one-hot: texts and categorical columns.

        The categories are those of the layout, and any other value raises; without a layout, they are those of the
        rows.
        """
        frame = with_frame(self.context)
        if not is_frame(frame):
            return self
        check_paired(who, "data", self.data, "context", frame)
        if not layout.in_categories:
            each = categories_of(who, frame)
            # Truth values are numbers here.
            categories = tuple(None if among is None or set(among) <= {False, True} else among for among in each)
            layout = Layout.of(frame)._replace(categories=categories, one_hot=True)
        context = layout.pick(who, "context", frame)
        if not layout.in_categories:
            return self
        return self._replace(context=context, context_layout=layout, context_labels=Labels.of(context))

    def coded_as(self, who: str, layout: Layout) -> NamedRows:
        """Select the columns of a layout by name, and encode its categories as numbers; like `coded` if it has none.

        Raises:
            InputError: For a value that is not one of the categories.
            ValueError: For a missing column.
        """
        if not layout.in_categories or not is_frame(self.data):
            return self.coded(who)
        frame = cast("DataFrame", layout.pick(who, "data", self.data))
        original = self.data[list(frame.columns)]
        dtypes = tuple(map(str, original.dtypes))
        _check_no_others(who, layout, frame, original, "of the density", "fit a new density")
        form = Layout("frame", tuple(frame.columns), layout.shapes, layout.categories, dtypes)
        return self._replace(data=frame, layout=form, labels=Labels.of(frame))

    def as_in(self, who: str, layout: Layout, context_layout: Layout, role: str = "", name: str = "data") -> NamedRows:
        """Select the columns of a fit's layouts, by name where both have names.

        The context may be among the columns of data.

        Args:
            who: The caller, for error messages.
            layout, context_layout: The layouts of the fit.
            role, name: Words for the rows in messages: "validation " or "", and "data" or "rows".

        Raises:
            ValueError: For a missing column, for categories that differ from the layout's, and as `check_paired`.
        """
        self._check_categories(who, f"{role}{name}", layout)
        data = layout.pick(who, f"{role}{name}", self.data)
        if role and layout.in_categories and is_frame(data) and is_frame(self.data):
            original = self.data[list(data.columns)]
            _check_no_others(who, layout, data, original, "of the data", f"leave that {role}row out")
        context = self.context
        if context is None and context_layout.has_all(self.data):
            context = self.data
        if context is not None:
            picked = context_layout.pick(who, f"{role}context", context)
            # Categories are picked as a dictionary, without the index of a frame.
            paired = context if is_frame(context) else picked
            check_paired(who, f"{role}{name}", data, f"{role}context", paired)
            context = picked
        return self._replace(
            data=data,
            context=context,
            labels=self.labels if data is self.data else Labels.of(data),
            context_labels=self.context_labels if context is self.context else Labels.of(context),
            layout=layout if layout.names else self.layout,
            context_layout=context_layout if context_layout.names else self.context_layout,
        )

    def _check_categories(self, who: str, role: str, layout: Layout) -> None:
        """Raise if numbers, as in a `Table`, stand for other categories than those of a layout."""
        for name, among, expected in zip(
            self.layout.names, self.layout.categories, layout.categories or itertools.repeat(None), strict=False
        ):
            if among is not None and among != expected:
                raise ValueError(
                    f"{who} expected {role} with the categories {shown(repr(expected))} of column {name!r}, got "
                    f"{shown(repr(among))}: read it with columns= and context=, the layouts of the fit."
                )


def named_rows(
    who: str,
    data: TableLike | Table,
    context: TableLike | None,
    weights: str | TableLike | None = None,
    role: str = "",
) -> NamedRows:
    """Return the rows of a `Table`, which has a context and names, or of other data and context.

    Weights may be the name of the data column that holds them, which is then removed from the data. Messages mention
    data, context and weights of a role, "validation " or "".

    Raises:
        ValueError: For a context or weights in addition to those of a `Table`, for an unknown name, and for columns
            with the same name.
    """
    data, context = as_pandas(data), as_pandas(context)
    if not isinstance(data, Table):
        _check_differ(who, f"{role}data", data)
        _check_differ(who, f"{role}context", context)
        if isinstance(weights, str):
            data, weights = _without_column(who, f"{role}weights", data, weights)
        layout = Layout.of(data)
        if layout.form == "frame":
            kinds = data.dtypes if is_frame(data) else [cast("Series[Any]", data).dtype]
            layout = layout._replace(dtypes=tuple(map(str, kinds)))
        names = Labels.of(data), Labels.of(context)
        return NamedRows(data, context, *names, weights, layout, Layout.of(context))
    if context is not None:
        raise ValueError(f"{who} got a context with a Table, which has its own: leave it out.")
    if isinstance(weights, str):
        raise ValueError(
            f"{who} got weights={weights!r} with a Table: name that column when it is read, as "
            f"read_table(..., weights={weights!r}), or give an array."
        )
    if weights is None:
        weights = data.weights
    elif data.weights is not None:
        raise ValueError(f"{who} got weights with a Table that has its own: leave them out.")
    labels, context_labels = (
        Labels(tuple(map(quoted, names)), data.numbers) for names in (data.names, data.context_names)
    )
    return NamedRows(data.data, data.context, labels, context_labels, weights, data.layout, data.context_layout)


def _without_column(who: str, option: str, value: TableLike, name: str) -> tuple[TableLike, TableLike]:
    """Split a table with names into its other columns or entries and the one of weights."""
    names = Layout.of(value).names
    wanted = next((each for each in names if str(each) == name), None)
    if wanted is None or len(names) < 2:
        named = f"columns {listed_names(names)}" if names else "columns without names"
        raise ValueError(f"{who} expected {option} as one of several columns or as an array, got {name!r} of {named}.")
    if isinstance(value, Mapping):
        return {each: entry for each, entry in value.items() if each != wanted}, value[wanted]
    frame = cast("DataFrame", value)
    return frame[[each for each in names if each != wanted]], frame[[wanted]]


def _check_no_others(who: str, layout: Layout, coded: DataFrame, frame: DataFrame, owner: str, advice: str) -> None:
    """Raise for a frame with values, coded as -1, outside the categories of a layout."""
    for place in layout.in_categories:
        unknown = (coded.iloc[:, place] == -1).to_numpy()
        if unknown.any():
            row = int(unknown.argmax())
            raise InputError(
                f"{who} expected one of the categories {shown(repr(layout.categories[place]))} {owner}, got "
                f"{frame.iloc[row, place]!r} in row {row}, column {coded.columns[place]!r}: {advice}.",
                row=row,
                column=place,
            )


def _check_differ(who: str, role: str, value: TableLike | None) -> None:
    """Raise if columns have the same name, by which they could not be distinguished."""
    names = Counter(() if value is None else Layout.of(value).labels)
    if names and names.total() > len(names):
        name, count = names.most_common(1)[0]
        raise ValueError(
            f"{who} expected {role} whose columns have names that differ, got {count} columns {name!r}: rename or drop "
            "all but one."
        )


def _array(column: object) -> NDArray[Any]:
    return column.detach().cpu().double().numpy() if isinstance(column, Tensor) else np.asarray(column)
