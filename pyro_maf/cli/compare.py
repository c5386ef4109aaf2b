"""`pyro-maf compare`: the paper's models on a table of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_maf.cli.errors import INTERRUPTED, say
from pyro_maf.cli.folder import COLUMNS, write_json
from pyro_maf.cli.naming import named
from pyro_maf.cli.options import (
    BatchSize,
    Categories,
    Columns,
    Context,
    Decimal,
    Device,
    DropMissing,
    Encoding,
    Epochs,
    Models,
    Patience,
    Rate,
    Source,
    option,
    read,
    separated,
    source_and_array,
)

if TYPE_CHECKING:
    from pyro_maf.experiments import Candidate, Comparison, Score

__all__ = ["EXAMPLES", "finish", "run", "tell"]

EXAMPLES = """**Examples**

```
pyro-maf compare wine.csv
pyro-maf compare wine.csv --models "Gaussian,MADE,MAF (5)" --hidden-dims 64 --hidden-dims 64,64
pyro-maf compare wine.parquet --context colour --max-epochs 100 --folder wine-given-colour
```
"""


def run(
    data: Source,
    models: Models = None,
    hidden_dims: Annotated[
        list[str] | None,
        option("Widths of the hidden layers, as 128,128; repeat to select the best of several.", "WIDTHS"),
    ] = None,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm", help="Put batch norm after every layer of the flows.")
    ] = False,
    columns: Columns = None,
    context: Context = None,
    categories: Categories = None,
    drop_missing: DropMissing = False,
    decimal: Decimal = ".",
    encoding: Encoding = "utf-8",
    test: Annotated[float, option("Fraction of the rows for testing.", "PART")] = 0.1,
    validation: Annotated[float, option("Fraction of the other rows for validation.", "PART")] = 0.1,
    max_epochs: Epochs = 1000,
    batch_size: BatchSize = 256,
    learning_rate: Rate = 2e-3,
    patience: Patience = 30,
    seed: Annotated[int, option("Seed of the split, of the weights and of the order of batches.")] = 0,
    device: Device = "cpu",
    folder: Annotated[Path | None, option("Folder of the results; by default named after DATA.", "DIR")] = None,
) -> None:
    """Fit the paper's models to a table, and compare their test log-likelihoods.

    Writes a folder for each model, which score and sample take, and the table as comparison.md, .csv and .json. Models
    in the folder are not fitted again: after Ctrl-C the same command resumes.
    """
    from pyro_maf.experiments import compare, divide

    asked = _candidates(models, hidden_dims, batch_norm)
    text: dict[str, Any] = {"drop_missing": drop_missing, "decimal": decimal, "encoding": encoding}
    table = read(data, separated(columns), separated(context), separated(categories), **text)
    if table.missing is not None:
        say(f"left out of {table.label}: {table.missing}.")
    name = "table" if data == "-" else Path(source_and_array(data)[0].removesuffix(".gz")).stem
    folder = folder or Path(f"{name}-comparison")
    parts = divide(name, table.data, table.context, test=test, validation=validation, seed=seed)
    with named(table):
        found = compare(
            parts,
            asked,
            folder=folder,
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            tell=tell,
        )
    for score in found.tried:
        write_json(folder / score.candidate.slug / COLUMNS, table.columns)
    finish(found, folder, "comparison")


def tell(score: Score) -> None:
    """Print the score of a model."""
    name = " ".join(filter(None, (score.candidate.name, score.candidate.widths)))
    say(f"{name}: {score.test} nats, {score.seconds:.1f} s; {score.stop_reason}.")


def finish(found: Comparison, folder: Path, name: str, published: Mapping[str, float] | None = None) -> None:
    """Print the table, and write it to a folder as name.md, .csv and .json.

    Raises:
        typer.Exit: If the comparison was interrupted.
    """
    from rich.console import Console

    from pyro_maf.experiments import results
    from pyro_maf.saving import write_whole

    Console().print(results.as_table(found, published))
    forms = {"md": results.as_markdown, "csv": results.as_csv, "json": results.as_json}
    for ending, form in forms.items():
        write_whole(folder / f"{name}.{ending}", form(found, published).encode())
    for model, reason in found.failed.items():
        say(f"{model} is left out: {reason}")
    if found.missing:
        say(f"interrupted before {', '.join(found.missing)}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED)


def _candidates(models: list[str] | None, hidden: list[str] | None, batch_norm: bool) -> tuple[Candidate, ...]:
    """Return the requested candidates.

    Raises:
        ValueError: For unknown names, or widths that are not numbers.
    """
    from pyro_maf.experiments import ROWS, candidates

    try:
        widths = [[int(width) for width in each.split(",")] for each in hidden or ()]
    except ValueError:
        given = " ".join(hidden or ())
        raise ValueError(f"compare expected --hidden-dims as numbers such as 128,128, got {given}.") from None
    return candidates(separated(models) or tuple(ROWS), hidden_dims=widths, batch_norm=batch_norm)
