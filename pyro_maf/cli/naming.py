"""Translation of errors and warnings about column and row numbers to names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from pyro_maf._core.text import quoted
from pyro_maf.cli.errors import say

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = ["named", "with_names"]


@contextmanager
def named(table: Table) -> Iterator[None]:
    r"""Context in which errors of `fit` name the columns of `table`, and count its rows as `read_table` does.

    Its warnings, with names too, become lines on stderr, each printed once.

    Example:
        >>> import io
        >>> from pyro_maf.datasets import read_table
        >>> with named(read_table(io.BytesIO(b"a,b\n1,2\n"))):
        ...     raise ValueError("fit expected data above 0 in column 1, got -1 in row 0: move it.")
        Traceback (most recent call last):
            ...
        ValueError: fit expected data above 0 in column 'b', got -1 in data row 1 (counted from 1): move it.
    """
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = with_names(str(message), table)
        if text not in said:
            say(text)
        said.add(text)

    with warnings.catch_warnings():
        # Filters that turn warnings into errors are for programs; the command line has no program to debug.
        warnings.filterwarnings("always", "fit ", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except ValueError as error:
            error.args = (with_names(str(error), table),)
            raise


def with_names(text: str, table: Table) -> str:
    """Replace column numbers in a message of `fit` by names, and count rows from 1."""
    is_context = bool(re.match(r"fit expected (finite )?(validation )?context", text))

    def name(found: re.Match[str]) -> str:
        if found[3]:
            return f"data row {table.numbers(int(found[3]))} (counted from 1)"
        names = table.context_names if found[1] or is_context else table.names
        return f"{found[1] or ''}column {quoted(names[int(found[2])])}"

    # In one pass, since a name may look like a row number.
    return re.sub(r"\b(context )?column (\d+)|\brow (\d+)", name, text)
