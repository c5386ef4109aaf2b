"""`pyro-maf paper`: the paper's experiments on its data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from pyro_maf.cli.compare import finish, tell
from pyro_maf.cli.options import Device, Epochs, Models, option, separated

if TYPE_CHECKING:
    from pyro_maf.datasets import Dataset

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """**Examples**

```
pyro-maf paper POWER --root data --device cuda
pyro-maf paper MINIBOONE --root data --models "Gaussian,MAF (5)" --learning-rate 1e-3 --max-epochs 50
```
"""
Name = Literal["POWER", "GAS", "HEPMASS", "MINIBOONE", "BSDS300", "MNIST", "CIFAR-10"]


def run(
    name: Annotated[
        Name,
        typer.Argument(metavar="NAME", help=f"Data set: {', '.join(get_args(Name))}.", case_sensitive=False),
    ],
    root: Annotated[Path, option("Folder of the published archive, with a folder for each set.", "DIR")],
    models: Models = None,
    max_epochs: Epochs = 1000,
    learning_rate: Annotated[
        float | None, option("By default the paper's: 1e-3 for MADE and MADE MoG, 1e-4 for the flows.", "RATE")
    ] = None,
    seed: Annotated[int, option("Seed of the weights and of the order of batches.")] = 0,
    device: Device = "cpu",
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Load a pickle if there is no other file: it can run any code."),
    ] = False,
    folder: Annotated[Path | None, option("Folder of the results; by default named after the set.", "DIR")] = None,
) -> None:
    """Repeat the paper's experiment on one of its data sets, and compare with the published figures.

    Every width that the paper tried is fitted, with its settings, and the best on the validation rows counts. Images
    are fitted without and then with their class as context. Models in the folder are not fitted again: after Ctrl-C the
    same command resumes.
    """
    from pyro_maf.datasets import load_dataset
    from pyro_maf.experiments import ROWS, SETTINGS, compare
    from pyro_maf.experiments.candidates import BATCH_SIZE, PATIENCE

    settings = SETTINGS[name]
    models_asked = settings.candidates(separated(models) or tuple(ROWS))
    if learning_rate is not None:
        models_asked = tuple(dataclasses.replace(one, learning_rate=learning_rate) for one in models_asked)
    folder = folder or Path(f"{name.lower()}-paper")
    for part, data in _parts(load_dataset(settings.loader, root, allow_pickle=allow_pickle)):
        found = compare(
            data,
            models_asked,
            folder=folder / part,
            batch_size=BATCH_SIZE,
            max_epochs=max_epochs,
            patience=PATIENCE,
            seed=seed,
            device=device,
            tell=tell,
        )
        finish(found, folder, part, settings.published if settings.published and part == BLIND else None)


BLIND, GIVEN = "unconditional", "conditional"


def _parts(data: Dataset) -> Iterator[tuple[str, Dataset]]:
    """Iterate over the data without context and, if there is one, with it."""
    yield BLIND, dataclasses.replace(data, train_context=None, validation_context=None, test_context=None)
    if data.context_dim:
        yield GIVEN, data
