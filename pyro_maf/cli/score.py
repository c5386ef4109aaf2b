"""`pyro-maf score`: log-densities of rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from pyro_maf.cli.errors import say
from pyro_maf.cli.options import Decimal, Encoding, Model, Out, Source
from pyro_maf.cli.writers import STANDARD_OUTPUT, writing_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pyro_maf.datasets import Table

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """**Examples**

```
pyro-maf score wine-maf new.csv --out scores.csv
pyro-maf score wine-maf new.parquet | sort -g | head
xz -dc new.csv.xz | pyro-maf score wine-maf -
```
"""


def run(
    model: Model,
    data: Source,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Score rows with missing values as nan, instead of an error.")
    ] = False,
    decimal: Decimal = ".",
    encoding: Encoding = "utf-8",
    out: Out = STANDARD_OUTPUT,
) -> None:
    """Compute the log-density of every row, in nats.

    One column, log_density, with a row for each of DATA, in its order. The columns of DATA are matched by name; others
    are ignored.
    """
    import torch

    from pyro_maf.cli.model import read_fitted
    from pyro_maf.training.result import log_prob_of

    fitted = read_fitted(model)
    table = fitted.read(data, drop_missing=drop_missing, decimal=decimal, encoding=encoding)
    total = squares = 0.0
    count = rows = 0
    first = None
    with writing_rows(out, ["log_density"], fitted.dtype) as write, torch.no_grad():
        for scores in _with_gaps(log_prob_of(fitted.density, table.data, table.context), table):
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


def _with_gaps(scores: Iterator[Tensor], table: Table) -> Iterator[Tensor]:
    """Iterate over log-densities of all rows of the file, NaN for those left out of the table."""
    import numpy as np
    import torch

    if table.missing is None:
        yield from scores
        return
    place = written = 0
    for some in scores:
        numbers = table.numbers(np.arange(place, place + len(some)))
        place += len(some)
        rows = torch.full((int(numbers[-1]) - written,), torch.nan, dtype=some.dtype)
        rows[torch.from_numpy(numbers - written - 1)] = some
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
    return f"{rows}, mean log-density {mean:.3f} nats, standard error {error:.3f}."
