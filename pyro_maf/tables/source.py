"""Interface of a table in a file, of any format."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from pyro_maf._core.text import shown

__all__ = ["NUMBERS_IN_A_BATCH", "Source", "one_line"]

NUMBERS_IN_A_BATCH = 2**21


class Source:
    """A table in a file, read in batches of columns. A subclass defines `names`, `holds_text` and `batches`.

    Attributes:
        label: Its name in errors.
        names: Names of its columns.
        is_named: True if the file has names; otherwise they are x1, x2, ...
        decimal: The decimal mark in its texts, a point or a comma.
    """

    names: tuple[str, ...]
    is_named: bool = True
    decimal: str = "."

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label

    def holds_text(self, name: str) -> bool | None:
        """True if a column is of text, truth values or a dictionary; None if its cells have to be read for that.

        Raises:
            ValueError: If it is neither of these nor numeric.
        """
        raise NotImplementedError

    def batches(self, names: Sequence[str]) -> Generator[list[Any], None, None]:
        """Iterate over batches of rows of the columns `names`: arrays of numpy, or of pyarrow.

        Close the generator if it may end early: it holds the file open.

        Raises:
            ValueError: If the file is damaged.
        """
        raise NotImplementedError

    def wrong(self, what: str) -> ValueError:
        """Return an error about the file as a whole."""
        return ValueError(f"read_table found {self.label} {what}")


def one_line(error: Exception) -> str:
    """Convert the message of another package's error to the end of a sentence."""
    text = shown(" ".join(str(error).split()) or type(error).__name__, 200)
    return text.removesuffix(".") + "."
