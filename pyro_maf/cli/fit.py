"""`pyro-maf fit`: fit a density to a table, and write it to a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, cast, get_args

import typer

import pyro_maf
from pyro_maf._core.files import CHECKPOINT, RECORD, REPORT, held, recover, write_whole
from pyro_maf._core.messages import MOST_LISTED, listed
from pyro_maf.cli import INTERRUPTED
from pyro_maf.cli.errors import CommandError, command_line, input_errors, say, warnings_as_lines
from pyro_maf.cli.saved_model import Record
from pyro_maf.cli.shared_options import TableOptions, TrainingOptions, flag, option, separated, source_and_array

if TYPE_CHECKING:
    from pyro_maf.datasets import Table
    from pyro_maf.tables import Rows
    from pyro_maf.training import FitResult
    from pyro_maf.training.choice import DefaultFlow
    from pyro_maf.training.preparation import Model

__all__ = ["DEFAULT_LAYERS", "FIT_EXAMPLES", "LAYERED", "FitOptions", "FlowName", "fit"]

FIT_EXAMPLES = """**Examples**

```
pyro-maf fit wine.csv
pyro-maf fit wine.parquet --columns alcohol,flavanoids --context colour --flow realnvp --num-layers 10
pyro-maf fit rates.csv --support positive,share=unit_interval --folder rates --resume
```
"""
FlowName = Literal["maf", "nsf", "iaf", "realnvp", "made", "made-mog", "maf-mog", "gaussian"]
LAYERED = ("maf", "nsf", "iaf", "realnvp", "maf-mog")
DEFAULT_LAYERS = 5
Support: TypeAlias = str | list[str] | None


@dataclass(kw_only=True)
class FitOptions(TableOptions, TrainingOptions):
    """Options of `pyro-maf fit`."""

    flow: Annotated[
        FlowName | None,
        option(f"Model to fit, {', '.join(get_args(FlowName))}; by default chosen from the data.", "FLOW"),
    ] = None
    num_layers: Annotated[
        int | None,
        option("Number of layers; by default chosen from the data, 5 of maf, nsf, iaf, realnvp and maf-mog."),
    ] = None
    hidden_dims: Annotated[
        list[str] | None, option("Widths of the hidden layers, as 128,128; by default chosen from the data.", "WIDTHS")
    ] = None
    support: Annotated[
        list[str] | None,
        option(
            "Support of the data: positive, unit_interval, interval(A,B), greater_than(A), less_than(B), angle, "
            "angle(A,B), ordered or simplex; or COLUMN=positive; by default real.",
            "KINDS",
        ),
    ] = None
    weights: Annotated[
        str | None, option("Column of how often each row counts; neither data nor context.", "COLUMN")
    ] = None
    validation: Annotated[
        str, option("Validation rows: the fraction to hold out, between 0 and 1, or another table.", "PART")
    ] = "0.1"
    test: Annotated[
        float | None,
        option("Fraction to hold out for the test score; by default that of --validation, from 1,000 rows on.", "PART"),
    ] = None
    precision: Annotated[
        Literal["single", "double"], option("Precision of the model: single or double.", "PRECISION")
    ] = "single"
    devices: Annotated[int, option("Number of processes, each on a different GPU with --device cuda.")] = 1
    folder: Annotated[Path | None, option("Folder of the results; by default DATA-fit, or DATA and --flow.", "DIR")] = (
        None
    )
    resume: Annotated[bool, flag("resume", "Resume the fit in the folder, if any.")] = False
    overwrite: Annotated[bool, flag("overwrite", "Replace the fit in the folder, if any.")] = False

    @property
    def results(self) -> Path:
        """Folder of the results."""
        array = source_and_array(self.data)[1]
        return self.folder or Path("-".join(filter(None, (self.stem, array, self.flow or "fit"))))

    def check(self) -> None:
        """Raise for options without effect and for unavailable devices."""
        import torch

        if self.num_layers is not None and self.flow not in (None, *LAYERED):
            raise CommandError(
                f"fit got --num-layers for {self.flow}, which has no number of layers to choose: leave it out."
            )
        if self.hidden_dims and self.flow == "gaussian":
            raise CommandError("fit got --hidden-dims for gaussian, which has no hidden layers: leave it out.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("fit got --device cuda, but torch finds no CUDA device: leave it out.")
        if self.devices > 1 and (self.data == "-" or Path(self.data).is_fifo()):
            raise CommandError("fit expected a file for several --devices, as each process reads it, got a pipe.")

    def check_folder(self) -> None:
        """Check before the table is read that no fit would be overwritten by accident.

        Raises:
            CommandError: If the folder is a file, or as `check_unused`.
        """
        from pyro_maf.training.records import check_unused

        folder = self.results
        if self.resume and self.overwrite:
            raise CommandError("fit got both --resume and --overwrite: choose one.")
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"fit expected --folder to be a folder, got the file {folder}.")
        with input_errors():
            recover(folder)
            if not self.overwrite:
                check_unused(folder, resume=self.resume)

    def validation_rows(self, table: Table) -> float | Table:
        """Return the fraction of validation rows, or the table of them."""
        from pyro_maf.tables.columns import number_in

        fraction = number_in(self.validation)
        if not math.isnan(fraction):
            return fraction
        return self.read_from(
            self.validation,
            columns=table.layout,
            context=table.context_layout,
            dtype=table.data.dtype.name,
            weights=self.weights,
        )

    def support_of(self, names: Sequence[str]) -> Support:
        """Return the support for `pyro_maf.fit`: one for all columns, or one per column."""
        # Commas also separate the bounds of an interval.
        items = [item for value in self.support or () for item in re.split(r",\s*(?![^()]*\))", value) if item]
        plain = [item for item in items if "=" not in item]
        by_name = dict(item.split("=", 1) for item in items if "=" in item)
        if not by_name:
            return (plain[0] if len(plain) == 1 else plain) or None
        unknown = [name for name in by_name if name not in names]
        if unknown or len(plain) > 1:
            problem = f"no column {unknown[0]!r}" if unknown else f"{len(plain)} for all other columns"
            raise CommandError(
                f"fit got --support {','.join(items)}, with {problem}: the columns are {', '.join(names)}."
            )
        return [by_name.get(name, plain[0] if plain else "real") for name in names]

    def model(self, table: Table, support: Support) -> Model | DefaultFlow:
        """Build the model to train; without a model name, `fit` chooses it.

        Raises:
            CommandError: For invalid sizes.
        """
        import torch

        from pyro_maf.experiments import build
        from pyro_maf.training.choice import DefaultFlow

        hidden = separated(self.hidden_dims)
        if not all(width.isdecimal() for width in hidden):
            raise CommandError(f"fit expected --hidden-dims as widths such as 128,128, got {','.join(hidden)}.")
        hidden_dims = [int(width) for width in hidden] or None
        dtype = torch.float64 if self.precision == "double" else torch.float32
        sizes = [len(each) for each in table.categories if each is not None]
        if self.flow is None:
            return DefaultFlow(self.num_layers, hidden_dims, dtype, self.device)
        each = [support] if isinstance(support, str) else support or []
        angles = sum(name.startswith("angle") for name in each) * (len(table.names) if isinstance(support, str) else 1)
        with input_errors():
            return build(
                self.flow,
                # On a simplex the last column follows from the others. A flow takes categories one-hot, and angles as
                # cosine and sine.
                len(table.names) - len(sizes) - angles - (support == "simplex"),
                context_dim=len(table.context_names) + sum(sizes) + 2 * angles,
                hidden_dims=hidden_dims,
                seed=self.seed,
                num_layers=DEFAULT_LAYERS if self.num_layers is None else self.num_layers,
            ).to(device=self.device, dtype=dtype)


def fit(options: FitOptions, ctx: typer.Context) -> None:
    """Fit a density to a table by maximum likelihood.

    Writes a folder with the model, its columns, a log of its epochs, a checkpoint to resume from, and a report to open
    in a browser. Ctrl-C ends a fit early; --resume continues it.
    """
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        say("loading torch, some seconds.")  # before anything about the table can be printed
    from pyro_maf._core.processes import Processes

    # Processes started by the first one write no files or messages.
    is_first = Processes(options.devices).is_first
    if is_first:
        with input_errors():
            ctx.with_resource(held(options.results, make=False))
        options.check_folder()
    options.check()
    table = options.read("float64" if options.precision == "double" else None, options.weights)
    support = options.support_of(table.names)
    model = options.model(table, support)
    validation = options.validation_rows(table)
    if is_first:
        for each in (table, validation):
            if not isinstance(each, float) and each.missing is not None:
                say(f"left out of {each.label}: {each.missing}.")
        rows = len(table.data)
        say(f"{rows:,} row{'s' * (rows != 1)} of {_described(table)}, to {options.results}.")
    command = command_line(ctx)
    result = _train(options, model, table, support, validation, command)
    if is_first:
        _leave(options, result, table, _held_out(result, table, validation), command)
        if result.interrupted:
            raise _interrupted(command)


def _train(
    options: FitOptions,
    model: Model | DefaultFlow,
    table: Table,
    support: Support,
    validation: float | Table,
    command: str,
) -> FitResult:
    from pyro_maf import training

    folder = options.results
    with input_errors(), warnings_as_lines(), _resumable(folder, command, overwrite=options.overwrite):
        return training.fit(
            model,
            table,
            support=support,
            validation=validation,
            test=options.test,
            folder=folder,
            resume=options.resume,
            overwrite=options.overwrite,
            devices=options.devices,
            **options.fitting,
        )


@contextmanager
def _resumable(folder: Path, command: str, *, overwrite: bool) -> Iterator[None]:
    """Context manager in which an interruption without time to finish ends the command, with a hint how to resume."""
    old = _version(folder / CHECKPOINT) if overwrite else None
    try:
        yield
    except KeyboardInterrupt:
        if _version(folder / CHECKPOINT) in (None, old):
            raise
        raise _interrupted(command) from None


def _version(path: Path) -> tuple[int, int] | None:
    """Identity of a file, which differs from that of a file it replaced; None if there is no file."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _interrupted(command: str) -> typer.Exit:
    again = command.replace(" --overwrite", "").replace(" --resume", "") + " --resume"
    say(f"interrupted. To resume: {again}")
    return typer.Exit(INTERRUPTED)


def _held_out(result: FitResult, table: Table, validation: float | Table) -> Table:
    """Return the fit's test rows, or validation rows if there are none, in the form of their table."""
    is_tested = result.test_rows is not None
    rows, places = (
        (result.test_rows, result.test_places) if is_tested else (result.validation_rows, result.validation_places)
    )
    source = table if is_tested or isinstance(validation, float) else validation
    data, context, weights = cast("Rows", rows)
    return dataclasses.replace(
        source,
        data=data.numpy(),
        context=None if context is None else context.numpy(),
        weights=None if weights is None else weights.numpy(),
        rows=source.rows if places is None else source.numbers(places.numpy()),
    )


def _leave(options: FitOptions, result: FitResult, table: Table, held_out: Table, command: str) -> None:
    """Write the record and the report of a fit to its folder."""
    from pyro_maf import report
    from pyro_maf._core.progress import will_show

    folder, test = options.results, result.test
    result.density.cpu()  # like the rows
    comparison = result.comparison
    record = Record(
        command=command,
        version=pyro_maf.__version__,
        data="standard input" if options.data == "-" else options.data,
        rows=len(table.data),
        validation_log_likelihood=result.validation_log_likelihood,
        best_epoch=result.best_epoch,
        epochs=result.epochs,
        seconds=result.seconds,
        stop_reason=result.stop_reason,
        warnings=[*result.warnings, *([] if comparison is None else comparison.warnings)],
        test_log_likelihood=None if test is None else test.mean,
        test_standard_error=None if test is None else test.standard_error,
    )
    text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False)
    write_whole(folder / RECORD, f"{text}\n".encode())
    report.write_report(folder / REPORT, result, held_out, command=command)
    if comparison is not None and (result.interrupted or not will_show(True)):  # else `fit` has shown them
        for line in (str(comparison), *comparison.warnings):
            say(line)
    say(
        f"{result.headline}; best epoch {result.best_epoch} of {result.epochs}, {result.seconds:.1f} s; "
        f"stopped: {result.stop_reason}. See {folder / REPORT}."
    )


def _described(table: Table) -> str:
    context = f" given {_listed(table.context_names)}" if table.context_names else ""
    counts = ("" if among is None else f" ({len(among)} categories)" for among in table.categories)
    return f"{_listed([name + count for name, count in zip(table.names, counts, strict=True)])}{context}"


def _listed(names: Sequence[str]) -> str:
    return listed(names) + f" ({len(names)} columns)" * (len(names) > MOST_LISTED)
