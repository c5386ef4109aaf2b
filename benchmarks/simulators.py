"""Neural posterior estimation by sbi with this package's flows, against sbi's own flows.

    python benchmarks/simulators.py                                    # everything: half an hour on one core
    python benchmarks/simulators.py --tasks SLCP --simulations 1000 --seeds 0 1 --out FOLDER

For each task, number of simulations and seed, all estimators learn from the same simulations, by sbi's `NPE.train` with
its defaults; one of them is told the support of the prior. Measured are the mean of log q(theta | x) over 1,000
held-out pairs, in nats, and its paired difference from sbi's `nsf`; C2ST, the accuracy of a classifier between draws of
`posterior.sample` and of the exact posterior, averaged over five observations (0.5 is perfect); CPU seconds of
training, and of 10,000 draws at one observation. Results are merged into those of --out, so an interrupted run can be
resumed.
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
import sbi
import torch
from directions import RESULTS, about, write
from parts import standings_of_simulators
from parts.tasks import TASKS, Task
from sbi.inference import NPE
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.distributions import Distribution

import pyro_maf.sbi

ESTIMATORS: dict[str, Callable[[Distribution], Any]] = {
    "pyro-maf nsf": lambda prior: pyro_maf.sbi.posterior_nn("nsf"),
    "pyro-maf nsf, support": lambda prior: pyro_maf.sbi.posterior_nn("nsf", support=prior.support),
    "pyro-maf maf": lambda prior: pyro_maf.sbi.posterior_nn("maf"),
    "sbi nsf": lambda prior: "nsf",
    "sbi maf": lambda prior: "maf",
    "sbi zuko_nsf": lambda prior: "zuko_nsf",
}
HELD_OUT, OBSERVATIONS, DRAWS, COMPARED, REPETITIONS = 1_000, 5, 10_000, 2_000, 3


def main(arguments: list[str] | None = None) -> None:
    """Measure the cells that have no results yet, store them, print the table and draw the plot."""
    options = parse(arguments)
    torch.set_num_threads(1)
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "simulators.json"
    results: dict[str, Any] = {"cells": []} if not path.exists() else json.loads(path.read_text(encoding="utf-8"))
    results["about"] = about()
    results["about"]["versions"]["sbi"] = sbi.__version__
    for task in (task for task in TASKS if task.name in options.tasks):
        for simulations in options.simulations:
            for seed in options.seeds:
                where = {"task": task.name, "dimensions": task.prior.event_shape[0]}
                where |= {"simulations": simulations, "seed": seed}
                others = [cell for cell in results["cells"] if not where.items() <= cell.items()]
                if len(others) < len(results["cells"]) and not options.again:
                    continue
                figures = measured(task, options.estimators, simulations, seed, options.epochs)
                results["cells"] = [*others, where | {"estimators": figures}]
                write(path, json.dumps(results, indent=1))
    text = standings_of_simulators.table(results)
    write(options.out / "simulators.md", text)
    standings_of_simulators.draw(results["cells"], options.out / "simulators.png")
    print(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=[task.name for task in TASKS])
    parser.add_argument("--simulations", type=int, nargs="+", default=[1_000, 10_000], metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=2**31 - 1, help="maximum epochs of each training")
    parser.add_argument("--again", action="store_true", help="repeat cells that have results")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=RESULTS, help="where results are merged")
    return parser.parse_args(arguments)


def measured(task: Task, names: list[str], simulations: int, seed: int, epochs: int) -> dict[str, Any]:
    """Figures of every estimator for one task, number of simulations and seed."""
    training, held_out = task.simulations(simulations, seed=2 * seed), task.simulations(HELD_OUT, seed=2 * seed + 1)
    torch.manual_seed(seed)
    references = [task.reference(x, COMPARED) for x in held_out[1][:OBSERVATIONS].split(1)]
    fits = {name: _measured(task, name, training, held_out, references, seed, epochs) for name in names}
    baseline = fits.get(standings_of_simulators.BASELINE)
    for figures, scores in fits.values():
        gain = scores - (scores if baseline is None else baseline[1])
        figures |= {"gain": gain.mean().item(), "gain_se": gain.std().item() / HELD_OUT**0.5}
    return {name: figures for name, (figures, _) in fits.items()}


def _measured(
    task: Task,
    name: str,
    training: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    references: list[Tensor],
    seed: int,
    epochs: int,
) -> tuple[dict[str, Any], Tensor]:
    """Figures of an estimator, and its log-density at each held-out pair."""
    _trained(task, name, training, seed, epochs=1)  # the first call may compile
    started = time.process_time()
    inference = _trained(task, name, training, seed, epochs)
    seconds = time.process_time() - started
    theta, x = held_out
    posterior = inference.build_posterior()
    with torch.no_grad():
        scores = posterior.posterior_estimator.log_prob(theta[None], x)[0].double()

    def draw(number: int, at: Tensor) -> Tensor:
        return posterior.sample((number,), x=at, show_progress_bars=False)

    accuracies = [c2st(theta, draw(COMPARED, at)) for theta, at in zip(references, x.split(1), strict=False)]
    figures = {
        "log_prob": scores.mean().item(),
        "c2st": accuracies,
        "training_seconds": seconds,
        "epochs": inference.summary["epochs_trained"][-1],
        "sampling_seconds": min(_seconds(draw, DRAWS, x[:1]) for _ in range(REPETITIONS)),
    }
    print(f"{task.name}, {len(training[0]):,} simulations, seed {seed}, {name}: {figures}", flush=True)
    return figures, scores


def _trained(task: Task, name: str, training: tuple[Tensor, Tensor], seed: int, epochs: int) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings(), TemporaryDirectory() as folder, chdir(folder):  # sbi logs to the working directory
        warnings.simplefilter("ignore")
        inference = NPE(task.prior, density_estimator=ESTIMATORS[name](task.prior), show_progress_bars=False)
        inference.append_simulations(*training).train(max_num_epochs=epochs)
    return inference


def _seconds(call: Any, *arguments: Any) -> float:
    started = time.process_time()
    call(*arguments)
    return time.process_time() - started


def c2st(reference: Tensor, draws: Tensor) -> float:
    """Cross-validated accuracy of a classifier between two sets of draws."""
    loc, scale = reference.mean(0), reference.std(0)
    rows = ((torch.cat([reference, draws]) - loc) / scale).clamp(-20, 20).numpy()
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * rows.shape[1]
    classifier = MLPClassifier((width, width), max_iter=200, early_stopping=True, random_state=0)
    return float(cross_val_score(classifier, rows, labels, cv=3, scoring="accuracy").mean())


if __name__ == "__main__":
    main()
