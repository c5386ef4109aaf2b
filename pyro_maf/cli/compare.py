"""`pyro-maf compare` and `pyro-maf paper`: the paper's models on the user's table, or on the paper's data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from pyro_maf._core.files import write_whole
from pyro_maf.cli import BAD_INPUT, INTERRUPTED
from pyro_maf.cli.errors import CommandError, input_errors, say, warnings_as_lines
from pyro_maf.cli.shared_options import Device, Epochs, Models, TableOptions, TrainingOptions, flag, option, separated

if TYPE_CHECKING:
    from pyro_maf.datasets import Dataset
    from pyro_maf.experiments import Candidate, Comparison, Score

__all__ = ["COMPARE_EXAMPLES", "PAPER_EXAMPLES", "CompareOptions", "DataSet", "compare", "paper"]

COMPARE_EXAMPLES = """**Examples**

```
pyro-maf compare wine.csv
pyro-maf compare wine.csv --models "Gaussian,MADE,MAF (5)" --hidden-dims 64 --hidden-dims 64,64
pyro-maf compare wine.parquet --context colour --max-epochs 100 --folder wine-given-colour
```
"""
PAPER_EXAMPLES = """**Examples**

```
pyro-maf paper POWER --root data --device cuda
pyro-maf paper MINIBOONE --root data --models "Gaussian,MAF (5)" --learning-rate 1e-3 --max-epochs 50
```
"""
DataSet = Literal["POWER", "GAS", "HEPMASS", "MINIBOONE", "BSDS300", "MNIST", "CIFAR-10"]
UNCONDITIONAL, CONDITIONAL = "unconditional", "conditional"


@dataclass(kw_only=True)
class CompareOptions(TableOptions, TrainingOptions):
    """Options of `pyro-maf compare`."""

    models: Models = None
    hidden_dims: Annotated[
        list[str] | None,
        option("Widths of the hidden layers, as 128,128; repeat to select the best of several.", "WIDTHS"),
    ] = None
    batch_norm: Annotated[bool, flag("batch-norm", "Put batch norm after every layer of the flows.")] = False
    test: Annotated[float, option("Fraction of the rows for testing.", "PART")] = 0.1
    validation: Annotated[float, option("Fraction of the other rows for validation.", "PART")] = 0.1
    folder: Annotated[Path | None, option("Folder of the results; by default named after DATA.", "DIR")] = None

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the requested candidates.

        Raises:
            CommandError: For unknown names, or widths that are not numbers.
        """
        from pyro_maf.experiments import ROWS, candidates

        try:
            widths = [[int(width) for width in each.split(",")] for each in self.hidden_dims or ()]
        except ValueError:
            texts = " ".join(self.hidden_dims or ())
            raise CommandError(f"compare expected --hidden-dims as numbers such as 128,128, got {texts}.") from None
        with input_errors():
            return candidates(separated(self.models) or tuple(ROWS), hidden_dims=widths, batch_norm=self.batch_norm)


def compare(options: CompareOptions) -> None:
    """Fit the paper's models to a table, and compare their test log-likelihoods.

    Writes a folder for each model, for use with score and sample, and the table as comparison.md and .json. Models
    already in the folder are not fitted again: after Ctrl-C, the same command resumes.
    """
    from pyro_maf import experiments

    candidates = options.candidates()
    table = options.read()
    if table.missing is not None:
        say(f"left out of {table.label}: {table.missing}.")
    folder = options.folder or Path(f"{options.stem}-comparison")
    with input_errors(), warnings_as_lines():
        parts = experiments.divide(
            options.stem, table, test=options.test, validation=options.validation, seed=options.seed
        )
        comparison = experiments.compare(
            parts, candidates, folder=folder, device=options.device, tell=_report, **options.fitting
        )
    _finish(comparison, folder, "comparison")


@dataclass(kw_only=True)
class PaperOptions:
    """Options of `pyro-maf paper`."""

    name: Annotated[
        DataSet,
        typer.Argument(metavar="NAME", help=f"Data set: {', '.join(get_args(DataSet))}.", case_sensitive=False),
    ]
    root: Annotated[Path, option("Folder of the published archive, with a folder for each set.", "DIR")]
    models: Models = None
    max_epochs: Epochs = 1000
    learning_rate: Annotated[
        float | None, option("By default the paper's: 1e-3 for MADE and MADE MoG, 1e-4 for the flows.", "RATE")
    ] = None
    seed: Annotated[int, option("Seed of the weights and of the order of batches.")] = 0
    device: Device = "cpu"
    folder: Annotated[Path | None, option("Folder of the results; by default named after the set.", "DIR")] = None

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the requested candidates, with the paper's settings.

        Raises:
            CommandError: For unknown names.
        """
        from pyro_maf.experiments import ROWS, SETTINGS

        with input_errors():
            candidates = SETTINGS[self.name].candidates(separated(self.models) or tuple(ROWS))
        if self.learning_rate is None:
            return candidates
        return tuple(dataclasses.replace(one, learning_rate=self.learning_rate) for one in candidates)


def paper(options: PaperOptions) -> None:
    """Repeat the paper's experiment on one of its data sets, and compare with the published figures.

    Every width that the paper tried is fitted, with its settings; the best on the validation rows counts. Images are
    fitted first without, then with their class as context. Models already in the folder are not fitted again: after
    Ctrl-C, the same command resumes.
    """
    from pyro_maf import experiments
    from pyro_maf.datasets import ARCHIVE
    from pyro_maf.experiments.models import BATCH_SIZE, PATIENCE

    settings = experiments.SETTINGS[options.name]
    candidates = options.candidates()
    with input_errors():
        dataset = ARCHIVE[settings.loader](options.root)
    folder = options.folder or Path(f"{options.name.lower()}-paper")
    for part, data in _parts(dataset):
        with input_errors():
            comparison = experiments.compare(
                data,
                candidates,
                folder=folder / part,
                batch_size=BATCH_SIZE,
                max_epochs=options.max_epochs,
                patience=PATIENCE,
                seed=options.seed,
                device=options.device,
                tell=_report,
            )
        _finish(comparison, folder, part, (settings.published or None) if part == UNCONDITIONAL else None)


def _parts(data: Dataset) -> Iterator[tuple[str, Dataset]]:
    """Iterate over the data without context and, if there is one, with it."""
    yield UNCONDITIONAL, dataclasses.replace(data, train_context=None, validation_context=None, test_context=None)
    if data.context_dim:
        yield CONDITIONAL, data


def _report(score: Score) -> None:
    name = " ".join(filter(None, (score.candidate.name, score.candidate.widths)))
    say(f"{name}: {score.test} nats, {score.seconds:.1f} s; {score.stop_reason}.")


def _finish(comparison: Comparison, folder: Path, name: str, published: Mapping[str, float] | None = None) -> None:
    """Print the table and write it to a folder as name.md and .json; end the command if it was interrupted."""
    from rich.console import Console

    from pyro_maf.experiments import results

    Console().print(results.as_table(comparison, published))
    for ending, form in (("md", results.as_markdown), ("json", results.as_json)):
        write_whole(folder / f"{name}.{ending}", form(comparison, published).encode())
    for model, reason in comparison.failed.items():
        say(f"{model} is left out: {reason}")
    if comparison.failed and not comparison.scores:
        raise typer.Exit(BAD_INPUT)
    if comparison.missing:
        say(f"interrupted before {', '.join(comparison.missing)}. The same command resumes from there.")
        raise typer.Exit(INTERRUPTED)
