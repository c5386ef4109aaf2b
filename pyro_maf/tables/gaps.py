"""Missing values of a table: their number, columns and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_maf._core.text import quoted
from pyro_maf.tables.columns import Column

__all__ = ["Gaps"]

MOST_ROWS, MOST_COLUMNS = 3, 5


class Gaps:
    """Missing values of a table, collected batch by batch.

    Args:
        columns: The columns that are read.

    Attributes:
        length: Number of rows.
        rows: Numbers of the rows with a missing value, counted from 1.
        first: The first missing value, as the beginning of an error; "" without one.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.length = 0
        self.rows = np.empty(0, np.int64)
        self.first = ""
        self._columns = columns
        widths = [len(column.encoded_names) for column in columns]
        self._starts = np.cumsum([0, *widths[:-1]])
        self._counts = np.zeros(len(columns), np.int64)
        self._examples: dict[int, list[int]] = {}

    def add(self, numbers: np.ndarray[Any, Any], cells: Sequence[Any]) -> np.ndarray[Any, Any]:
        """Record a batch; return the mask of its rows without a missing value.

        Args:
            numbers: The encoded columns, (rows, numbers), NaN for missing values.
            cells: The cells, by column.
        """
        before, self.length = self.length, self.length + len(numbers)
        missing = np.isnan(numbers)
        if not missing.any():
            return np.ones(len(numbers), bool)
        missing = missing[:, self._starts]
        gone = missing.any(1)
        if not self.first:
            row = int(gone.argmax())
            place = int(missing[row].argmax())
            self.first = self._columns[place].complaint(cells[place], row, before + 1)
        self.rows = np.concatenate([self.rows, np.flatnonzero(gone) + before + 1])
        self._counts += missing.sum(0)
        for place in np.flatnonzero(missing.any(0)).tolist():
            examples = self._examples.setdefault(place, [])
            if len(examples) <= MOST_ROWS:
                rows = np.flatnonzero(missing[:, place])[: MOST_ROWS + 1] + before + 1
                examples.extend(rows.tolist())
        return ~gone

    def __str__(self) -> str:
        most = np.argsort(-self._counts, kind="stable")[:MOST_COLUMNS].tolist()
        parts = [self._of_column(place) for place in most if self._counts[place]]
        more = int((self._counts > 0).sum()) - len(parts)
        listed = ", ".join(parts) + (f" and {more:,} more columns" if more else "")
        rows = "1 row has" if len(self.rows) == 1 else f"{len(self.rows):,} rows have"
        return f"of {self.length:,} rows, {rows} a missing value: {listed}"

    def _of_column(self, place: int) -> str:
        count, examples = int(self._counts[place]), self._examples[place]
        rows = ", ".join(map(str, examples[:MOST_ROWS])) + ", ..." * (len(examples) > MOST_ROWS)
        return f"{quoted(self._columns[place].name)} {count:,} (row{'s' * (count > 1)} {rows})"
