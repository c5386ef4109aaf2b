"""A table in a file, as every format offers it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from pyro_maf.wording import shown

__all__ = ["NUMBERS_IN_A_BATCH", "Source", "one_line"]

NUMBERS_IN_A_BATCH = 2**21


class Source:
    """A table in a file, read in batches of columns. A subclass gives `names`, `holds_text` and `batches`.

    Attributes:
        label: What errors call it.
        names: Of its columns.
        is_named: Whether the names are its own; otherwise they are x1, x2, ...
        decimal: What decimals come after in its texts, a point or a comma.
    """

    names: tuple[str, ...]
    is_named: bool = True
    decimal: str = "."

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label

    def holds_text(self, name: str) -> bool | None:
        """Whether a column is of text, truth values or a dictionary; None where only its cells can tell.

        Raises:
            ValueError: If it is neither of these nor of numbers.
        """
        raise NotImplementedError

    def batches(self, names: Sequence[str]) -> Generator[list[Any], None, None]:
        """The columns called `names`, a batch of rows at a time: arrays of numpy, or of pyarrow.

        Close it where it may end early: it holds the file open.

        Raises:
            ValueError: If the file is damaged.
        """
        raise NotImplementedError

    def wrong(self, what: str) -> ValueError:
        """An error about the file as a whole."""
        return ValueError(f"read_table found {self.label} {what}")


def one_line(error: Exception) -> str:
    """The message of an error of another package, as the end of a sentence."""
    text = shown(" ".join(str(error).split()) or type(error).__name__, 200)
    return text.removesuffix(".") + "."
