"""Errors of one line: Pyro adds a table of shapes to every error that is raised while a program is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["RefusalError", "without_empty_tables"]

TABLE = "\nTrace Shapes:"
MOST_LINES = 6
EMPTY = ("Param Sites:", "Sample Sites:")


class RefusalError(ValueError):
    r"""A `ValueError` about the structure of a model or a guide, without Pyro's table of shapes.

    Example:
        >>> str(RefusalError("AutoIAF found no latent variables.\nTrace Shapes:\n Param Sites:\nSample Sites:"))
        'AutoIAF found no latent variables.'
    """

    def __str__(self) -> str:
        return super().__str__().partition(TABLE)[0]


@contextmanager
def without_empty_tables() -> Iterator[None]:
    """Context that removes empty tables of shapes from error messages, and shortens long tensors in them."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        message = error.args[0] if len(error.args) == 1 else None
        if isinstance(message, str):
            said, *tables = message.split(TABLE)
            error.args = (TABLE.join([_cut(said), *(table for table in tables if not _is_empty(table))]),)
        raise


def _cut(text: str) -> str:
    """Shorten the hundreds of lines that a tensor of draws may take in a text."""
    lines = text.splitlines()
    return text if len(lines) <= MOST_LINES else "\n".join([*lines[:MOST_LINES], f"... ({len(lines)} lines)"])


def _is_empty(table: str) -> bool:
    return all(line.strip() in EMPTY for line in table.strip().splitlines())
