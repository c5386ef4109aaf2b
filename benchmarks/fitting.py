"""Test log-likelihood of `fit(data)` on small tables, against simple densities and zuko's NSF for the same time.

    python benchmarks/fitting.py                                      # everything: ten minutes on one core
    python benchmarks/fitting.py --tables wine --splits 1 --out FOLDER

The tables are scikit-learn's, dequantised by uniform noise so that densities are finite, and toys of
`pyro_maf.datasets`. A fifth of the rows is held out for testing; all models have the same training and validation rows.
`fit(data)` is compared with a Gaussian, a mixture of Gaussians chosen by BIC and a kernel density, those of
`FitResult.comparison`; with a MAF trained by `fit`; and with zuko's NSF of three layers, trained for as many CPU
seconds as `fit(data)`, at least ten, by a loop as its users write it: Adam, batches of 64 standardised rows, clipped
gradients, the weights with the best validation loss. Figures are nats per test row by which `fit(data)` is ahead, with
the standard error over splits.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zuko
from directions import RESULTS, about, write
from parts.report import about_line, table
from sklearn import datasets
from torch import Tensor

import pyro_maf
from pyro_maf.datasets import Moons, Pinwheel
from pyro_maf.training import FitResult

SPLITS, TEST, LEAST_SECONDS, BATCH = 3, 0.2, 10.0, 64
Figures = dict[str, float]


def loaded(name: str) -> Tensor:
    """A table of scikit-learn, dequantised by uniform noise as wide as the smallest gap between values of a column."""
    options = {"scaled": False} if name == "diabetes" else {}
    rows = getattr(datasets, f"load_{name}")(**options).data
    steps = np.array([np.diff(np.unique(column.round(6))).min() for column in rows.T])
    return torch.from_numpy(rows + steps * np.random.default_rng(0).uniform(-0.5, 0.5, rows.shape))


def normal() -> Tensor:
    """Correlated normal rows, too few for a flow to be worthwhile."""
    torch.manual_seed(0)
    return torch.randn(30, 3) @ torch.tensor([[1.0, 0.5, 0.2], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])


TABLES: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "iris": lambda: loaded("iris"),
    "wine": lambda: loaded("wine"),
    "diabetes": lambda: loaded("diabetes"),
    "breast cancer": lambda: loaded("breast_cancer"),
    "moons": lambda: Moons().sample(1000),
    "pinwheel": lambda: Pinwheel().sample(1000),
}


def measured(rows: Tensor, seed: int, least_seconds: float) -> Figures:
    """Nats per test row by which `fit(data)` is ahead of each model, its log-likelihood, and its CPU seconds."""
    torch.manual_seed(seed)
    started = time.process_time()
    ours = pyro_maf.fit(rows, test=TEST, seed=seed, progress=False)
    seconds = time.process_time() - started
    torch.manual_seed(seed)
    maf = pyro_maf.fit(pyro_maf.MAF(rows.shape[1]), rows, test=TEST, seed=seed, progress=False)
    mean = ours.comparison.mean
    figures = {each.name: each.gain for each in ours.comparison.baselines}
    figures |= {"MAF": mean - maf.comparison.mean, "zuko": mean - peer(rows, ours, max(seconds, least_seconds))}
    return figures | {"nats": mean, "seconds": seconds}


def peer(rows: Tensor, fitted: FitResult, seconds: float) -> float:
    """Mean test log-likelihood of zuko's NSF after `seconds` CPU seconds of training, in the units of the data."""
    held_out, test = fitted.validation_places, fitted.test_places
    training = torch.ones(len(rows), dtype=torch.bool)
    training[torch.cat([held_out, test])] = False
    loc, scale = rows[training].mean(0), rows[training].std(0)
    standard = ((rows - loc) / scale).float()
    train, validation = standard[training], standard[held_out]
    flow = zuko.flows.NSF(rows.shape[1], transforms=3, hidden_features=(128, 128))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    best, weights = float("inf"), copy.deepcopy(flow.state_dict())
    started = time.process_time()
    while time.process_time() - started < seconds:
        for index in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            (-flow().log_prob(train[index]).mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad():
            loss = -flow().log_prob(validation).mean().item()
        if loss < best:
            best, weights = loss, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(weights)
    with torch.no_grad():
        return (flow().log_prob(standard[test]).mean() - scale.log().sum()).item()


def line(name: str, cell: dict[str, list[float]], shape: tuple[int, int]) -> list[str]:
    """A row of the table in Markdown."""

    def of(key: str) -> str:
        values = np.array(cell.get(key, []))
        error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
        return f"{values.mean():+.2f}{error}" if len(values) else ""

    others = [of(each) for each in ("Gaussian", "mixture of Gaussians", "KDE", "MAF", "zuko")]
    return [f"{name}, {shape[0]:,} x {shape[1]}", *others, f"{np.mean(cell['seconds']):.1f}"]


def main(arguments: list[str] | None = None) -> None:
    """Fit every model to every table, store the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--least-seconds", type=float, default=LEAST_SECONDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pyro_maf.fit(torch.randn(60, 2), max_epochs=1, progress=False)  # the first call may compile
    results, lines = {"about": about(), "cells": {}}, []
    for name in options.tables:
        rows = TABLES[name]()
        runs = [measured(rows, seed, options.least_seconds) for seed in range(options.splits)]
        results["cells"][name] = cell = {key: [run[key] for run in runs if key in run] for key in runs[0]}
        lines.append(line(name, cell, (rows.shape[0], rows.shape[1])))
        print(lines[-1], flush=True)
    heading = ["", "Gaussian", "mixture", "kernel density", "MAF", "zuko's NSF", "CPU s"]
    write(options.out / "fitting.json", json.dumps(results, indent=1))
    write(options.out / "fitting.md", about_line(results) + "\n\n" + table(heading, lines) + "\n")


if __name__ == "__main__":
    main()
