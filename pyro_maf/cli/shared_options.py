"""Options that commands share, each declared once, and the conversion of a dataclass of options to a command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import typer

from pyro_maf.cli.errors import input_errors

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = [
    "Decimal",
    "Device",
    "Encoding",
    "Epochs",
    "ModelPath",
    "Models",
    "Out",
    "Row",
    "Source",
    "TableOptions",
    "TextOptions",
    "TrainingOptions",
    "as_command",
    "flag",
    "option",
    "separated",
    "source_and_array",
]


def option(help: str, metavar: str = "N") -> Any:
    """Declare an option of a command, with `metavar` for its value."""
    return typer.Option(help=help, metavar=metavar)


def flag(name: str, help: str) -> Any:
    """Declare an option without a value and without a negative form."""
    return typer.Option(f"--{name}", help=help)


Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help='A table: csv, tsv, parquet, npy or npz:ARRAY, which may be larger than memory; "-" is standard input.',
        show_default=False,
    ),
]
ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The folder of a fit, or a .safetensors file.", show_default=False)
]
Out = Annotated[Path, option('The output: a file ending in .csv or .parquet; "-" is standard output, as csv.', "FILE")]
Names: TypeAlias = list[str] | None
Row = Literal[
    "Gaussian", "MADE", "MADE MoG", "RealNVP (5)", "RealNVP (10)", "MAF (5)", "MAF (10)", "MAF MoG (5)", "NSF (5)"
]
Models = Annotated[
    Names,
    option(f"Rows of the paper's table: {', '.join(get_args(Row))}, or as made-mog, maf-10; by default all.", "NAMES"),
]
Epochs = Annotated[int, option("Maximum number of epochs.")]
Decimal = Annotated[Literal[".", ","], option('Decimal mark of text: "." or ",".', "MARK")]
Encoding = Annotated[str, option("Encoding of text that is not in UTF-8, such as latin-1 or cp1252.", "NAME")]
Device = Annotated[Literal["cpu", "cuda"], option("Device of the fit: cpu or cuda.", "DEVICE")]


@dataclass(kw_only=True)
class TextOptions:
    """The form of a text table, and the treatment of missing values."""

    drop_missing: Annotated[bool, flag("drop-missing", "Leave out rows with missing values.")] = False
    decimal: Decimal = "."
    encoding: Encoding = "utf-8"

    def read_from(self, source: str, **options: Any) -> Table:
        """Read the table in a file, in an array of a file, or on standard input.

        Args:
            source: The user's argument.
            **options: `columns` (empty for all), `context`, `categories`, `weights` and `dtype`, as in `read_table`.

        Raises:
            InputError, FileNotFoundError: As `read_table`.
        """
        from pyro_maf.datasets import read_table

        path, options["array"] = source_and_array(source)
        options["columns"] = options.get("columns") or None
        with input_errors():
            return read_table(
                path, drop_missing=self.drop_missing, decimal=self.decimal, encoding=self.encoding, **options
            )


@dataclass(kw_only=True)
class TableOptions(TextOptions):
    """The table to fit, and its columns."""

    data: Source
    columns: Annotated[Names, option("Columns to fit; by default all that are not context.", "NAMES")] = None
    context: Annotated[Names, option("Columns to condition on: numbers, or text as categories.", "NAMES")] = None
    categories: Annotated[
        Names, option("Columns to condition on whose numbers are labels, such as 0 to 9.", "NAMES")
    ] = None

    @property
    def stem(self) -> str:
        """Name of the table's file without suffixes; "table" for standard input."""
        if self.data == "-":
            return "table"
        path = Path(source_and_array(self.data)[0])
        return Path(path.stem if path.suffix in (".gz", ".bz2", ".xz") else path).stem

    def read(self, dtype: str | None = None, weights: str | None = None) -> Table:
        """Read the table, by default with its own precision and without weights.

        Raises:
            InputError, FileNotFoundError: As `read_table`.
        """
        categories = separated(self.categories)
        context = list(dict.fromkeys([*separated(self.context), *categories]))
        return self.read_from(
            self.data,
            columns=separated(self.columns),
            context=context,
            categories=categories,
            dtype=dtype,
            weights=weights,
        )


@dataclass(kw_only=True)
class TrainingOptions:
    """The training options of every model."""

    max_epochs: Epochs = 1000
    batch_size: Annotated[int | None, option("Approximate number of rows in a batch; 256 by default, or chosen.")] = (
        None
    )
    learning_rate: Annotated[float, option("Initial learning rate; it is halved when the validation loss stalls.")] = (
        2e-3
    )
    weight_decay: Annotated[
        float | None, option("Initial weight decay, which falls where nothing is gained; 1e-6 by default, or chosen.")
    ] = None
    patience: Annotated[
        int | None, option("Epochs without a better validation loss after which to stop; 30 by default, or chosen.")
    ] = None
    seed: Annotated[int, option("Seed of the weights, of the split of the rows and of the order of batches.")] = 0
    device: Device = "cpu"

    @property
    def fitting(self) -> dict[str, Any]:
        """The options that `pyro_maf.fit` takes."""
        return {each.name: getattr(self, each.name) for each in fields(TrainingOptions) if each.name != "device"}


def as_command(run: Callable[..., None]) -> Callable[..., None]:
    """Convert a function to a typer command whose options are the fields of the dataclass that `run` takes first.

    The fields of the class itself come first in the help, then those of its bases.

    Args:
        run: A function of the options and, optionally, of typer's context, `ctx`.
    """
    hints = get_type_hints(run)
    options = hints[next(iter(hints))]
    annotations = get_type_hints(options, include_extras=True)
    defaults = {each.name: Parameter.empty if each.default is MISSING else each.default for each in fields(options)}
    names = dict.fromkeys(name for cls in options.__mro__ for name in vars(cls).get("__annotations__", ()))

    def command(ctx: typer.Context, **values: object) -> None:
        run(options(**values), *([ctx] if "ctx" in hints else []))

    context = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [context]
        + [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotations[name])
            for name in names
        ]
    )
    command.__doc__ = run.__doc__
    return command


def source_and_array(source: str) -> tuple[str, str | None]:
    """Split FILE.npz:ARRAY into the file and the name of the array; the name is None for other files.

    Example:
        >>> source_and_array("power.npz:train"), source_and_array("C:power.csv")
        (('power.npz', 'train'), ('C:power.csv', None))
    """
    path, colon, array = source.rpartition(":")
    return (path, array) if colon and path.endswith(".npz") else (source, None)


def separated(values: Sequence[str] | None) -> list[str]:
    """Split the items of an option that is repeated or contains commas.

    Example:
        >>> separated(["a,b", "c"])
        ['a', 'b', 'c']
    """
    return [item.strip() for value in values or () for item in value.split(",") if item.strip()]
