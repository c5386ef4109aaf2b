"""Arguments shared by several commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = [
    "BatchSize",
    "Categories",
    "Columns",
    "Context",
    "Decimal",
    "Device",
    "DropMissing",
    "Encoding",
    "Epochs",
    "Model",
    "Models",
    "Out",
    "Patience",
    "Rate",
    "Row",
    "Source",
    "option",
    "read",
    "separated",
    "source_and_array",
]


def option(help: str, metavar: str = "N") -> Any:
    """Declare an option of a command, with `metavar` for its value."""
    return typer.Option(help=help, metavar=metavar)


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
    option('The output: a file ending in .csv or .parquet; "-" is standard output, as csv.', "FILE"),
]
Columns = Annotated[list[str] | None, option("Columns to fit; by default all that are not context.", "NAMES")]
Context = Annotated[list[str] | None, option("Columns to condition on: numbers, or text as categories.", "NAMES")]
Categories = Annotated[
    list[str] | None, option("Columns to condition on whose numbers are labels, such as 0 to 9.", "NAMES")
]
Row = Literal["Gaussian", "MADE", "MADE MoG", "RealNVP (5)", "RealNVP (10)", "MAF (5)", "MAF (10)", "MAF MoG (5)"]
Models = Annotated[
    list[str] | None,
    option(f"Rows of the paper's table: {', '.join(get_args(Row))}, or as made-mog, maf-10; by default all.", "NAMES"),
]
Epochs = Annotated[int, option("Maximum number of epochs.")]
BatchSize = Annotated[int, option("Approximate number of rows in a batch.")]
Rate = Annotated[float, option("Initial learning rate; it is halved when the validation loss stalls.")]
Patience = Annotated[int, option("Epochs without a better validation loss after which to stop.")]
DropMissing = Annotated[bool, typer.Option("--drop-missing", help="Leave out rows with missing values.")]
Decimal = Annotated[Literal[".", ","], option('Decimal mark of text: "." or ",".', "MARK")]
Encoding = Annotated[str, option("Encoding of text that is not in UTF-8, such as latin-1 or cp1252.", "NAME")]
Device = Annotated[Literal["cpu", "cuda"], option("Device of the fit: cpu or cuda.", "DEVICE")]


def source_and_array(source: str) -> tuple[str, str | None]:
    """Split FILE.npz:ARRAY into the file and the name of the array, None for other files.

    Example:
        >>> source_and_array("power.npz:train"), source_and_array("C:power.csv")
        (('power.npz', 'train'), ('C:power.csv', None))
    """
    path, colon, array = source.rpartition(":")
    return (path, array) if colon and path.endswith(".npz") else (source, None)


def read(
    source: str,
    columns: Any = None,
    context: Sequence[str] = (),
    categories: Sequence[str] = (),
    dtype: str | None = None,
    **text: Any,
) -> Table:
    """Read the table in a file, in an array of a file, or on standard input.

    Args:
        source: The user's argument.
        columns: As in `read_table`; none means all.
        context: As in `read_table`.
        categories: As in `read_table`, but they need not be named in `context` too.
        dtype: As in `read_table`.
        **text: `drop_missing`, `decimal` and `encoding`, as in `read_table`.

    Raises:
        ValueError, FileNotFoundError: As `read_table`.
    """
    from pyro_maf.datasets import read_table

    path, array = source_and_array(source)
    given = [*context, *(name for name in categories if name not in context)]
    return read_table(
        path, columns=columns or None, context=given, categories=categories, array=array, dtype=dtype, **text
    )


def separated(values: list[str] | None) -> list[str]:
    """Split the items of an option that is repeated, or has commas.

    Example:
        >>> separated(["a,b", "c"])
        ['a', 'b', 'c']
    """
    return [item.strip() for value in values or () for item in value.split(",") if item.strip()]
