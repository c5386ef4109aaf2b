"""Errors about columns and rows by number, said with names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = ["named"]


@contextmanager
def named(table: Table) -> Iterator[None]:
    r"""While entered, errors of `fit` call the columns of `table` by name, and count its rows as `read_table` does.

    Example:
        >>> import io
        >>> from pyro_maf.datasets import read_table
        >>> with named(read_table(io.BytesIO(b"a,b\n1,2\n"))):
        ...     raise ValueError("fit expected data above 0 in column 1, got -1 in row 0: move it.")
        Traceback (most recent call last):
            ...
        ValueError: fit expected data above 0 in column 'b', got -1 in data row 1 (counted from 1): move it.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        names = table.context_names if re.match(r"fit expected (finite )?(validation )?context", text) else table.names
        text = re.sub(r"\bcolumn (\d+)", lambda found: f"column {names[int(found[1])]!r}", text)
        text = re.sub(r"\brow (\d+)", lambda found: f"data row {int(found[1]) + 1} (counted from 1)", text)
        error.args = (text,)
        raise
