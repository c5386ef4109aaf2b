"""`pyro-maf fit`: a density of a table, in a folder."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

import pyro_maf
from pyro_maf._core.files import held
from pyro_maf._core.text import MOST_LISTED, listed
from pyro_maf.cli.errors import INTERRUPTED, command_line, say
from pyro_maf.cli.folder import CHECKPOINT, COLUMNS, RECORD, REPORT, Record, check_folder, write_json
from pyro_maf.cli.naming import named, with_names
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
    Patience,
    Rate,
    Source,
    option,
    read,
    separated,
    source_and_array,
)
from pyro_maf.cli.request import check_asked, model_of, support_of, validation_of

if TYPE_CHECKING:
    from pyro_maf.datasets import Table
    from pyro_maf.training import FitResult

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """**Examples**

```
pyro-maf fit wine.csv
pyro-maf fit wine.parquet --columns alcohol,flavanoids --context colour --flow realnvp --num-layers 10
pyro-maf fit rates.csv --support positive,share=unit_interval --folder rates --resume
```
"""
Flow = Literal["maf", "iaf", "realnvp", "made", "made-mog", "maf-mog", "gaussian"]


def run(
    ctx: typer.Context,
    data: Source,
    flow: Annotated[Flow, option(f"Model to fit: {', '.join(get_args(Flow))}.", "FLOW")] = "maf",
    num_layers: Annotated[
        int | None, option("Number of layers of maf, iaf, realnvp and maf-mog; by default 5.")
    ] = None,
    hidden_dims: Annotated[
        list[str] | None, option("Widths of the hidden layers, as 128,128; by default chosen from the data.", "WIDTHS")
    ] = None,
    columns: Columns = None,
    context: Context = None,
    categories: Categories = None,
    drop_missing: DropMissing = False,
    decimal: Decimal = ".",
    encoding: Encoding = "utf-8",
    support: Annotated[
        list[str] | None,
        option(
            "Support of the data: positive, unit_interval or simplex; or COLUMN=positive; by default real.", "KINDS"
        ),
    ] = None,
    validation: Annotated[
        str, option("Validation rows: the fraction to hold out, between 0 and 1, or another table.", "PART")
    ] = "0.1",
    max_epochs: Epochs = 1000,
    batch_size: BatchSize = 256,
    learning_rate: Rate = 2e-3,
    patience: Patience = 30,
    seed: Annotated[int, option("Seed of the weights, of the held-out rows and of the order of batches.")] = 0,
    device: Device = "cpu",
    precision: Annotated[
        Literal["single", "double"], option("Precision of the model: single or double.", "PRECISION")
    ] = "single",
    devices: Annotated[int, option("Number of processes, each on a different GPU with --device cuda.")] = 1,
    folder: Annotated[
        Path | None, option("Folder of the results; by default named after DATA and --flow.", "DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the fit in the folder, if any.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the fit in the folder, if any.")] = False,
) -> None:
    """Fit a density to a table by maximum likelihood.

    Writes a folder with the model, its columns, a log of its epochs, a checkpoint to resume from, and a report for a
    browser. Ctrl-C ends a fit early; --resume resumes it from there.
    """
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        say("loading torch, some seconds.")  # before anything about the table can be printed
    from pyro_maf.training import fit
    from pyro_maf.training.processes import Processes

    folder = folder or Path(f"{_stem(data)}-{flow}")
    # Processes that the first one starts write no files or messages.
    is_first = Processes(devices).is_first
    command = command_line(ctx)
    if is_first:
        ctx.with_resource(held(folder, make=False))
        check_folder(folder, resume=resume, overwrite=overwrite)
    check_asked(flow, num_layers, hidden_dims, device, devices, data)
    dtype = "float64" if precision == "double" else None
    text: dict[str, Any] = {"drop_missing": drop_missing, "decimal": decimal, "encoding": encoding}
    table = read(data, separated(columns), separated(context), separated(categories), dtype, **text)
    kinds = support_of(separated(support), table.names)
    model = model_of(flow, table, kinds, num_layers, separated(hidden_dims), seed).to(device)
    model = model.double() if precision == "double" else model
    held_out = validation_of(validation, table, **text)
    if is_first:
        for each in (table, *([] if isinstance(held_out, float) else [held_out])):
            if each.missing is not None:
                say(f"left out of {each.label}: {each.missing}.")
        say(f"{len(table.data):,} rows of {_described(table)}, to {folder}.")
    with named(table), _resumable(folder, command, overwrite=overwrite):
        result = fit(
            model,
            table.data,
            context=table.context,
            support=kinds,
            validation=held_out if isinstance(held_out, float) else (held_out.data, held_out.context),
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            learning_rate=learning_rate,
            seed=seed,
            folder=folder,
            resume=resume,
            overwrite=overwrite,
            devices=devices,
        )
    result = dataclasses.replace(result, warnings=tuple(with_names(line, table) for line in result.warnings))
    if is_first:
        _leave(folder, result, table, _held_out(result, table, held_out), command, data)
        if result.stop_reason == "interrupted":
            raise _interrupted(command)


def _stem(data: str) -> str:
    """Name of a fit to `data`: the name of its file without the endings."""
    if data == "-":
        return "table"
    path, array = source_and_array(data)
    return "-".join(filter(None, (Path(path.removesuffix(".gz")).stem, array)))


@contextmanager
def _resumable(folder: Path, command: str, *, overwrite: bool) -> Iterator[None]:
    """Context in which an interruption without time to finish ends the command, with a hint how to resume."""
    old = _version(folder / CHECKPOINT) if overwrite else None
    try:
        yield
    except KeyboardInterrupt:
        if _version(folder / CHECKPOINT) in (None, old):
            raise
        raise _interrupted(command) from None


def _version(path: Path) -> tuple[int, int] | None:
    """Identity of a file, other than that of files it replaced; None without one."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _interrupted(command: str) -> typer.Exit:
    again = command.replace(" --overwrite", "").replace(" --resume", "") + " --resume"
    say(f"interrupted. To go on: {again}")
    return typer.Exit(INTERRUPTED)


def _held_out(result: FitResult, table: Table, validation: float | Table) -> Table:
    """Return the fit's validation rows, in the form of their table."""
    rows: Any = result.held_out
    source = table if isinstance(validation, float) else validation
    places = result.held_out_places
    return dataclasses.replace(
        source,
        data=rows.data.numpy(),
        context=None if rows.context is None else rows.context.numpy(),
        rows=source.rows if places is None else source.numbers(places.numpy()),
    )


def _leave(folder: Path, result: FitResult, table: Table, held_out: Table, command: str, data: str) -> None:
    """Write columns, record and report of a fit to its folder."""
    from pyro_maf.report import write_report

    write_json(folder / COLUMNS, table.columns)
    write_json(folder / RECORD, dataclasses.asdict(_record(result, table, command, data)))
    result.density.cpu()  # where the rows are
    write_report(folder / REPORT, result, held_out, command=command)
    say(
        f"validation log-likelihood {result.validation_log_likelihood:.3f} nats after epoch {result.best_epoch} of "
        f"{result.epochs}, {result.seconds:.1f} s; stopped: {result.stop_reason}. See {folder / REPORT}."
    )


def _described(table: Table) -> str:
    """Describe the columns that were read."""
    given = f" given {_listed(table.context_names)}" if table.context_names else ""
    return f"{_listed(table.names)}{given}"


def _listed(names: Sequence[str]) -> str:
    return listed(names) + f" ({len(names)} columns)" * (len(names) > MOST_LISTED)


def _record(result: FitResult, table: Table, command: str, data: str) -> Record:
    return Record(
        command=command,
        version=pyro_maf.__version__,
        data="standard input" if data == "-" else data,
        rows=len(table.data),
        validation_log_likelihood=result.validation_log_likelihood,
        best_epoch=result.best_epoch,
        epochs=result.epochs,
        seconds=result.seconds,
        stop_reason=result.stop_reason,
        warnings=list(result.warnings),
    )
