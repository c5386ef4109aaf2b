"""Neural posterior estimation by sbi, with the flows of this package and with sbi's own.

    python benchmarks/simulators.py [--simulations N] [--tasks NAME ...] [--out FOLDER]

All estimators learn from the same simulations, by sbi's `NPE.train` with its defaults. Measured: the mean of
log q(theta | x) over 1,000 held-out pairs, in nats, paired with that of sbi's `nsf`; where the posterior is known, the
accuracy of a classifier between its draws and the estimator's, over five observations (0.5 is perfect); CPU seconds of
training, and of 10,000 draws at one observation.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from parts.tasks import TASKS, Task
from rich.console import Console
from rich.table import Table
from sbi.inference import NPE
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import pyro_maf.sbi

ESTIMATORS: dict[str, Any] = {
    "pyro-maf nsf": lambda: pyro_maf.sbi.posterior_nn("nsf"),
    "pyro-maf maf": lambda: pyro_maf.sbi.posterior_nn("maf"),
    "sbi nsf": lambda: "nsf",
    "sbi maf": lambda: "maf",
    "sbi zuko_nsf": lambda: "zuko_nsf",
}
BASELINE = "sbi nsf"
HELD_OUT, OBSERVATIONS, DRAWS, COMPARED = 1_000, 5, 10_000, 2_000


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2**31 - 1, help="the maximum of each training")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS])
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out.absolute() / "simulators.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for task in TASKS:
        if task.name in options.tasks:
            results[task.name] = measured(task, options.estimators, options.simulations, options.epochs)
            show(task.name, results[task.name])
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1))


def measured(task: Task, names: list[str], simulations: int, epochs: int) -> dict[str, Any]:
    """Figures of every estimator on a task."""
    training, held_out = task.simulations(simulations, seed=0), task.simulations(HELD_OUT, seed=1)
    scores, figures = {}, {}
    for name in names:
        figures[name], scores[name] = _measured(task, ESTIMATORS[name](), training, held_out, epochs)
    for name, own in figures.items():
        gain = (scores[name] - scores.get(BASELINE, scores[name])).double()
        own["gain"], own["gain_se"] = gain.mean().item(), gain.std().item() / HELD_OUT**0.5
    return figures


def _measured(
    task: Task, estimator: Any, training: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], epochs: int
) -> tuple[dict[str, Any], Tensor]:
    torch.manual_seed(0)
    started = time.process_time()
    with warnings.catch_warnings(), TemporaryDirectory() as folder, chdir(folder):  # sbi writes a log
        warnings.simplefilter("ignore")
        inference = NPE(task.prior, density_estimator=estimator, show_progress_bars=False)
        density = inference.append_simulations(*training).train(max_num_epochs=epochs)
    trained = time.process_time() - started
    theta, x = held_out
    with torch.no_grad():
        score = density.log_prob(theta[None], x)[0]
    draw = _sampler(density)
    draw(x[:1], DRAWS)  # the first call may compile
    started = time.process_time()
    draw(x[:1], DRAWS)
    figures = {
        "log_prob": score.double().mean().item(),
        "training_seconds": trained,
        "epochs": inference.summary["epochs_trained"][-1],
        "sampling_seconds": time.process_time() - started,
    }
    if task.reference is not None:
        accuracies = [_c2st(task.reference(at, COMPARED), draw(at, COMPARED)) for at in x[:OBSERVATIONS].split(1)]
        figures["c2st"] = float(np.mean(accuracies))
    return figures, score


def _sampler(density: Any) -> Callable[[Tensor, int], Tensor]:
    def draw(x: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            return density.sample(torch.Size([number]), x).reshape(number, -1)

    return draw


def _c2st(reference: Tensor, draws: Tensor) -> float:
    """Cross-validated accuracy of a classifier between two sets of draws."""
    loc, scale = reference.mean(0), reference.std(0)
    rows = ((torch.cat([reference, draws]) - loc) / scale).clamp(-20, 20).numpy()
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * rows.shape[1]
    classifier = MLPClassifier((width, width), max_iter=200, early_stopping=True, random_state=0)
    return float(cross_val_score(classifier, rows, labels, cv=3, scoring="accuracy").mean())


def show(task: str, figures: dict[str, Any]) -> None:
    """Print a table of a task."""
    table = Table(title=task)
    for heading in ("estimator", "log q, nats", f"over {BASELINE}", "C2ST", "training, s", "epochs", "10,000 draws, s"):
        table.add_column(heading, justify="left" if heading == "estimator" else "right")
    for name, own in figures.items():
        table.add_row(
            name,
            f"{own['log_prob']:.3f}",
            f"{own['gain']:+.3f} +- {own['gain_se']:.3f}",
            f"{own['c2st']:.3f}" if "c2st" in own else "",
            f"{own['training_seconds']:.0f}",
            str(own["epochs"]),
            f"{own['sampling_seconds']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
