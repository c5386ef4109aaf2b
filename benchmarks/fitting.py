"""Test log-likelihood of `fit` with its defaults against zuko's MAF, with the same widths and in the same time.

    python benchmarks/fitting.py [FOLDER]

FOLDER holds .npz files with arrays train, val and test, (rows, D), already standardised; without one, the toys of
`pyro_maf.datasets` are fitted. Both fit a MAF of five layers
with the widths that this package chooses. zuko's is trained for as many seconds as ours took, by a loop its users would
write: Adam, batches of 256 rows, clipped gradients, the learning rate halved when the validation loss stalls, the
weights that validate best kept.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zuko
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_maf
from pyro_maf.datasets import TOYS
from pyro_maf.nn import default_hidden_dims

LAYERS = 5
BATCH = 256
LEARNING_RATES = (1e-3, 2e-3)


def ours(train: Tensor, validation: Tensor, test: Tensor) -> tuple[float, float]:
    """Mean test log-likelihood, in nats, and the seconds that the fit took."""
    torch.manual_seed(0)
    result = pyro_maf.fit(pyro_maf.MAF(train.shape[1], num_layers=LAYERS), train, validation=validation)
    with torch.no_grad():
        return result.density.log_prob(test).mean().item(), result.seconds


def peer(train: Tensor, validation: Tensor, test: Tensor, seconds: float, learning_rate: float) -> float:
    """Mean test log-likelihood, in nats, of zuko's MAF after `seconds`."""
    torch.manual_seed(0)
    dim = train.shape[1]
    flow = zuko.flows.MAF(dim, transforms=LAYERS, hidden_features=default_hidden_dims(dim))
    optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=7)
    best, kept = float("inf"), copy.deepcopy(flow.state_dict())
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        for index in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            loss = -flow().log_prob(train[index]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
            if time.monotonic() - started >= seconds:
                break
        with torch.no_grad():
            held_out = -flow().log_prob(validation).mean().item()
        schedule.step(held_out)
        if held_out < best:
            best, kept = held_out, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(kept)
    with torch.no_grad():
        return flow().log_prob(test).mean().item()


def toys() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name and parts of each toy."""
    for toy in TOYS:
        data = toy.dataset()
        yield data.name, (data.train, data.validation, data.test)


def stored(folder: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name and parts of each file in the folder that has them."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            if {"train", "val", "test"} <= set(arrays):
                train, validation, test = (torch.from_numpy(arrays[name]).float() for name in ("train", "val", "test"))
                yield path.stem, (train, validation, test)


def main() -> None:
    """Fit both to every set in the folder; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    table = Table(title=f"Mean test log-likelihood in nats, MAF ({LAYERS}), {torch.get_num_threads()} threads")
    for column in ("", "rows", "D", "seconds", "pyro-maf", *(f"zuko, rate {rate:g}" for rate in LEARNING_RATES)):
        table.add_column(column, justify="right" if column else "left")
    for name, parts in toys() if folder is None else stored(folder):
        score, seconds = ours(*parts)
        others = [peer(*parts, seconds, rate) for rate in LEARNING_RATES]
        sizes = [f"{len(parts[0]):,}", str(parts[0].shape[1]), f"{seconds:.0f}"]
        table.add_row(name, *sizes, f"{score:.3f}", *(f"{other:.3f}" for other in others))
    Console().print(table)


if __name__ == "__main__":
    main()
