"""Fits in one process or several: `python several_fits.py FOLDER DEVICES`, also by torchrun.

Each process prints a line for each fit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pyro_maf
from pyro_maf import MAF, ConditionalMAF, MAFMoG, RealNVP, fit
from pyro_maf.transforms import normalization

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_dims": [16]}
OPTIONS: dict[str, Any] = {"batch_size": 33, "max_epochs": 3, "learning_rate": 1e-2, "progress": False}
ROWS = torch.randn(301, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(1)
WEIGHTS = torch.arange(301) % 4
MODELS: dict[str, Callable[[], Any]] = {
    "maf": lambda: MAF(3, **SHAPE),
    "batch norm": lambda: MAF(3, batch_norm=True, **SHAPE),
    "maf-mog": lambda: MAFMoG(3, **SHAPE),
    "realnvp": lambda: RealNVP(3, **SHAPE),
    "weighted": lambda: MAF(3, **SHAPE),
    "conditional": lambda: ConditionalMAF(2, 1, **SHAPE),
}


class Idle(MAF):
    """A flow with an unused parameter."""

    def __init__(self) -> None:
        super().__init__(3, **SHAPE)
        self.idle = nn.Parameter(torch.zeros(1))


def say(what: object) -> None:
    """Print a line with the rank of this process."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    # A single write, since processes print concurrently.
    sys.stdout.write(f"rank {rank} {what}\n")
    sys.stdout.flush()


def fit_all(folder: str, kinds: list[str], devices: int) -> None:
    """Fit models of the named kinds, each in its own folder."""
    torch.manual_seed(0)
    for kind in kinds:
        context, data = (ROWS[:, :1], ROWS[:, 1:]) if kind == "conditional" else (None, ROWS)
        where: dict[str, Any] = {"context": context, "folder": f"{folder}/{kind}", "resume": True, "devices": devices}
        where["weights"] = WEIGHTS if kind == "weighted" else None
        result = fit(MODELS[kind]().double(), data, **where, **OPTIONS)
        # Every process can read the model as soon as `fit` returns.
        pyro_maf.load(f"{folder}/{kind}/model.safetensors")
        say(f"{kind}: {result.validation_loss} {normalization._over_processes}")


def try_unsupported_fits(folder: str) -> None:
    """Try fits that several processes do not support, and print their errors."""
    other_folder = f"{folder}/{'maf' if os.environ['RANK'] == '0' else 'elsewhere'}"
    cases: list[tuple[Any, dict[str, Any]]] = [
        (MODELS["maf"]().double(), {"folder": other_folder, "resume": True, "max_epochs": 4}),
        (MODELS["maf"]().double(), {"batch_size": 1}),
        (Idle().double(), {}),
    ]
    for model, options in cases:
        try:
            fit(model, ROWS, **{**OPTIONS, **options})
        except ValueError as error:
            say(f"refused: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_all(sys.argv[1], list(MODELS) if sys.argv[2] == "1" else ["maf"], int(sys.argv[2]))
    if "RANK" in os.environ:
        try_unsupported_fits(sys.argv[1])
