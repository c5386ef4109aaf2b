"""`pyro-maf score` and `pyro-maf sample`: log-densities of rows, and new rows, streamed to csv or parquet."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeAlias

import numpy as np
import typer

from pyro_maf._core.files import writing_whole
from pyro_maf._core.messages import require
from pyro_maf.cli.errors import CommandError, input_errors, say
from pyro_maf.cli.saved_model import SavedModel, read_model
from pyro_maf.cli.shared_options import Decimal, Encoding, ModelPath, Out, Source, TextOptions, flag, source_and_array

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray
    from torch import Tensor

    from pyro_maf.datasets import Table
    from pyro_maf.tables.categories import Categories, Label
    from pyro_maf.tables.layout import Layout

    Write: TypeAlias = Callable[[NDArray[np.floating]], None]

__all__ = ["SAMPLE_EXAMPLES", "SCORE_EXAMPLES", "sample", "score", "writing_rows"]

SCORE_EXAMPLES = """**Examples**

```
pyro-maf score wine-maf new.csv --out scores.csv
pyro-maf score wine-maf new.parquet | sort -g | head
xz -dc new.csv.xz | pyro-maf score wine-maf -
```
"""
SAMPLE_EXAMPLES = """**Examples**

```
pyro-maf sample wine-maf -n 1000 --out more.parquet
pyro-maf sample wine-maf -n 5 --context colour=red --context age=3
```
"""
STANDARD_OUTPUT = Path("-")
VALUES_AT_ONCE = 2**18


def score(
    model: ModelPath,
    data: Source,
    drop_missing: Annotated[
        bool, flag("drop-missing", "Score rows with missing values as nan, instead of an error.")
    ] = False,
    decimal: Decimal = ".",
    encoding: Encoding = "utf-8",
    out: Out = STANDARD_OUTPUT,
) -> None:
    """Compute the log-density of every row, in nats.

    The output has one column, log_density, and one row for each row of DATA, in order. The columns of DATA are matched
    by name; others are ignored.
    """
    import torch

    source = Path(source_and_array(data)[0])
    if out.exists() and source.exists() and out.samefile(source):
        raise CommandError(f"score expected --out to be another file than the data, got {out} for both.")
    saved = read_model(model)
    table = saved.read(data, TextOptions(drop_missing=drop_missing, decimal=decimal, encoding=encoding))
    total = squares = 0.0
    count = rows = 0
    first = None
    with writing_rows(out, ["log_density"], saved.dtype) as write:
        for scores in _with_gaps(_log_probs(saved, table), table):
            write(scores[:, None].numpy())
            outside = (scores == -torch.inf).nonzero()[:1, 0].tolist()
            first = first or (rows + outside[0] + 1 if outside else None)
            rows += len(scores)
            inside = scores[scores > -torch.inf].double()
            count += len(inside)
            total, squares = total + inside.sum().item(), squares + inside.square().sum().item()
    if table.missing is not None:
        say(f"nan for some rows: {table.missing}.")
    where = "" if first is None else f" (data row {first}, counted from 1, is the first)"
    say(_summary(len(table.data), len(table.data) - count, where, total, squares))


def _log_probs(model: SavedModel, table: Table) -> Iterator[Tensor]:
    from pyro_maf.training.scores import log_prob_of

    with input_errors():
        yield from log_prob_of(model.density, table.data, table.context)


def _with_gaps(scores: Iterator[Tensor], table: Table) -> Iterator[Tensor]:
    """Iterate over log-densities of all rows of the file, with NaN for rows that the table leaves out."""
    import torch

    if table.missing is None:
        yield from scores
        return
    place = written = 0
    for block in scores:
        numbers = table.numbers(np.arange(place, place + len(block)))
        place += len(block)
        rows = torch.full((int(numbers[-1]) - written,), torch.nan, dtype=block.dtype)
        rows[torch.from_numpy(numbers - written - 1)] = block
        written = int(numbers[-1])
        yield rows
    if table.missing.length > written:
        yield torch.full((table.missing.length - written,), torch.nan)


def _summary(count: int, outside: int, where: str, total: float, squares: float) -> str:
    rows = f"{count:,} row" + "s" * (count != 1)
    if outside:
        return f"{rows}, of which {outside:,} {'has' if outside == 1 else 'have'} density 0{where}."
    mean = total / count
    error = math.sqrt(max(0.0, squares / count - mean**2) / count)
    return f"{rows}, mean log-density {mean:.3f} nats" + f", standard error {error:.3f}" * (count > 1) + "."


def sample(
    model: ModelPath,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", help="Number of rows.")] = 1000,
    out: Out = STANDARD_OUTPUT,
    context: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Context of the rows: one value for each column of context.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same rows.")] = 0,
) -> None:
    """Draw rows from a model, with the columns that it was fitted to."""
    import torch

    from pyro_maf._core.checks import check_positive, check_seed

    with input_errors():
        check_positive("sample", "--number", number)
        check_seed("sample", seed, "--seed")
    saved = read_model(model)
    density = saved.at(_context(saved, context or []))
    layout = saved.layout
    rows = max(1, VALUES_AT_ONCE // len(layout.labels))
    torch.manual_seed(seed)
    with writing_rows(out, layout.labels, saved.dtype, layout) as write:
        for start in range(0, number, rows):
            write(density.sample((min(rows, number - start),)).numpy())


def _context(model: SavedModel, texts: Sequence[str]) -> Tensor | None:
    """Context, (C,), from NAME=VALUE pairs, several of which may be in one text; None for a model without context."""
    import torch

    columns = dict(model.context_layout.columns)
    expected = f"the model's context is {', '.join(columns)}" if columns else "the model takes no context"
    # A name may hold "=", and a value commas.
    known = "|".join(map(re.escape, sorted(columns, key=len, reverse=True))) or "(?!)"
    values: dict[str, str] = {}
    for pair in (pair for text in texts for pair in re.split(rf",\s*(?=(?:{known})=)", text.strip())):
        match = re.match(rf"({known})(=)(.*)", pair, re.DOTALL)
        name, equals, value = match.groups() if match else pair.partition("=")
        if not equals or name in values or name not in columns:
            problem = (
                "twice" if name in values else "which is not a column of the context" if equals else "without a value"
            )
            raise CommandError(f"sample got --context {pair}, {problem}: {expected}.")
        values[name] = value
    missing = [name for name in columns if name not in values]
    if missing:
        raise CommandError(f"sample expected --context {missing[0]}=VALUE: {expected}.")
    numbers = [number for name, categories in columns.items() for number in _encoded(name, values[name], categories)]
    return torch.tensor(numbers, dtype=model.density.context_dtype) if columns else None


def _encoded(name: str, value: str, categories: Sequence[Label] | None) -> list[float]:
    from pyro_maf.tables.columns import codes_of, number_in

    if categories is not None:
        code = codes_of(categories).get(value)
        if code is None:
            among = ", ".join(map(str, categories))
            raise CommandError(f"sample expected --context {name} to be one of {among}, got {value!r}.")
        return [float(code == number) for number in range(len(categories))]
    number = number_in(value)
    if not math.isfinite(number):
        raise CommandError(f"sample expected --context {name} to be a finite number, got {value!r}.")
    return [number]


@contextmanager
def writing_rows(
    path: Path, names: Sequence[str], dtype: str = "float32", layout: Layout | None = None
) -> Iterator[Write]:
    r"""Context manager that yields a function to write rows, (n, columns), under the column names `names`.

    A file is replaced atomically once everything is written.

    Args:
        path: "-" for standard output, as csv, or a file that ends in .csv or .parquet.
        names: Names of the columns.
        dtype: "float32" or "float64", the dtype of the output, which determines its number of digits.
        layout: Categories and dtypes of the columns, if they are not all of this dtype.

    Raises:
        CommandError: For another file ending.
        FileNotFoundError: If its folder does not exist.
        ModuleNotFoundError: Without pyarrow.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing_rows(Path(folder, "rows.csv"), ["a", "b"]) as write:
        ...         write(np.array([[1, 2.5]]))
        ...     Path(folder, "rows.csv").read_text()
        'a,b\n1,2.5\n'
    """
    require("pyro-maf", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    number = pyarrow.float64() if dtype == "float64" else pyarrow.float32()
    among = (layout.categories if layout else ()) or (None,) * len(names)
    dtypes = (layout.dtypes if layout else ()) or (dtype,) * len(names)
    kinds = [_arrow_type(*each, number) for each in zip(among, dtypes, strict=True)]
    schema = pyarrow.schema(list(zip(names, kinds, strict=True)))

    def batch(rows: NDArray[np.floating]) -> pyarrow.RecordBatch:
        columns = [_arrow_column(*each) for each in zip(rows.T, among, kinds, strict=True)]
        return pyarrow.record_batch(columns, schema=schema)

    is_standard = path == STANDARD_OUTPUT
    if not is_standard and path.suffix not in (".csv", ".parquet"):
        raise CommandError(f'expected --out to end in .csv or .parquet, or to be "-", got {path}.')
    writer_of = ParquetWriter if path.suffix == ".parquet" else _csv_writer
    with (
        nullcontext(sys.stdout.buffer) if is_standard else writing_whole(path) as file,
        writer_of(file, schema) as writer,
    ):
        yield lambda rows: writer.write(batch(rows))
    if is_standard:
        sys.stdout.flush()


def _csv_writer(file: BinaryIO, schema: pyarrow.Schema) -> pyarrow.csv.CSVWriter:
    """Write a header, without the quotes that pyarrow would put around each name, and return the writer."""
    from pyarrow.csv import CSVWriter, WriteOptions

    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(schema.names)
    file.write(header.getvalue().encode())
    return CSVWriter(file, schema, write_options=WriteOptions(include_header=False))


def _arrow_type(categories: Categories, dtype: str, number: pyarrow.DataType) -> pyarrow.DataType:
    """Type of a column in files: that of its categories, whole numbers for integer dtypes, otherwise `number`."""
    import pyarrow

    if categories is None:
        return pyarrow.int64() if dtype.lower().startswith(("int", "uint")) else number
    types = {type(each) for each in categories}
    return pyarrow.array(categories).type if types in ({bool}, {int}, {float}) else pyarrow.string()


def _arrow_column(column: NDArray[np.floating], categories: Categories, kind: pyarrow.DataType) -> pyarrow.Array:
    """A column of numbers, (rows,), as written to files."""
    import pyarrow

    from pyro_maf.tables.categories import decoded

    if categories is None:
        return pyarrow.array(column.round().astype(np.int64) if kind == pyarrow.int64() else column, kind)
    values = decoded(column, categories)
    return pyarrow.array(list(map(str, values)) if kind == pyarrow.string() else values, kind)
