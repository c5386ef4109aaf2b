"""`pyro-maf sample`: new rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pyro_maf.cli.options import Model, Out, separated
from pyro_maf.cli.writers import STANDARD_OUTPUT, writing_rows

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_maf.cli.model import Fitted

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """**Examples**

```
pyro-maf sample wine-maf -n 1000 --out more.parquet
pyro-maf sample wine-maf -n 5 --context colour=red --context age=3
```
"""
NUMBERS_IN_A_BATCH = 2**18


def run(
    model: Model,
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

    from pyro_maf._core.checks import check_positive
    from pyro_maf.cli.model import read_fitted

    check_positive("sample", "--number", number)
    check_positive("sample", "--seed", seed, least=0)
    fitted = read_fitted(model)
    given = _given(fitted, separated(context))
    density = fitted.density if given is None else fitted.density.condition(given)
    names = fitted.names
    rows = max(1, NUMBERS_IN_A_BATCH // len(names))
    torch.manual_seed(seed)
    with writing_rows(out, names, fitted.dtype) as write:
        for start in range(0, number, rows):
            write(density.sample((min(rows, number - start),)).numpy())


def _given(fitted: Fitted, pairs: list[str]) -> Tensor | None:
    """Parse NAME=VALUE pairs to the context, (C,), or None for a model without one.

    Raises:
        ValueError: For a column that is missing, unknown or repeated, or a value that is invalid for it.
    """
    import torch

    columns = dict(fitted.context)
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in given or name not in columns:
            problem = "twice" if name in given else "which is no column of context" if equals else "without a value"
            raise ValueError(f"sample got --context {pair}, {problem}: {_wanted(columns)}.")
        given[name] = value
    missing = [name for name in columns if name not in given]
    if missing:
        raise ValueError(f"sample expected --context {missing[0]}=VALUE: {_wanted(columns)}.")
    numbers = [number for name, kinds in columns.items() for number in _encoded(name, given[name], kinds)]
    return torch.tensor(numbers, dtype=fitted.density.context_dtype) if columns else None


def _encoded(name: str, value: str, categories: list[str] | None) -> list[float]:
    """Encode a value of context."""
    if categories is not None:
        if value not in categories:
            raise ValueError(f"sample expected --context {name} to be one of {', '.join(categories)}, got {value!r}.")
        return [float(value == category) for category in categories]
    from pyro_maf.tables.cells import number_in

    number = number_in(value)
    if not abs(number) < float("inf"):
        raise ValueError(f"sample expected --context {name} to be a finite number, got {value!r}.")
    return [number]


def _wanted(columns: dict[str, list[str] | None]) -> str:
    return f"the model is given {', '.join(columns)}" if columns else "the model takes no context"
