"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = ["Model", "Out", "Source", "read", "separated", "source_and_array"]

Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help='A table: csv, tsv, parquet, npy or npz:ARRAY, which may be larger than memory; "-" is standard input.',
        show_default=False,
    ),
]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The folder of a fit, or a .safetensors file.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option(metavar="FILE", help='Where to: a file ending in .csv or .parquet; "-" is standard output, as csv.'),
]


def source_and_array(source: str) -> tuple[str, str | None]:
    """A file and, where it is given as FILE.npz:ARRAY, which array of it.

    Example:
        >>> source_and_array("power.npz:train"), source_and_array("C:power.csv")
        (('power.npz', 'train'), ('C:power.csv', None))
    """
    path, colon, array = source.rpartition(":")
    return (path, array) if colon and path.endswith(".npz") else (source, None)


def read(source: str, columns: Any = None, context: Sequence[str] = (), categories: Sequence[str] = ()) -> Table:
    """The table in a file, in an array of one, or on standard input.

    Args:
        source: As the user gives it.
        columns: As in `read_table`; none at all means all.
        context: As in `read_table`.
        categories: As in `read_table`, but they need not be named in `context` too.

    Raises:
        ValueError, FileNotFoundError: As `read_table`.
    """
    from pyro_maf.datasets import read_table

    path, array = source_and_array(source)
    given = [*context, *(name for name in categories if name not in context)]
    return read_table(path, columns=columns or None, context=given, categories=categories, array=array)


def separated(values: list[str] | None) -> list[str]:
    """The items of an option that is given several times, or once with commas.

    Example:
        >>> separated(["a,b", "c"])
        ['a', 'b', 'c']
    """
    return [item.strip() for value in values or () for item in value.split(",") if item.strip()]
