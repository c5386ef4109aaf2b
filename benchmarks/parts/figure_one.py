"""The paper's Figure 1: MADE and a MAF of five layers, all in the order (x1, x2), on a density with two modes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pyro_maf
from pyro_maf import MAF, plotting
from pyro_maf.datasets import FigureOne
from pyro_maf.experiments.scores import estimate, log_prob_of

WIDTHS = [64, 64]
WINDOW = ((-3.5, 8.0), (-6.0, 6.0))
LAYERS = {"MADE": 1, "MAF (5)": 5}


def run(folder: Path, epochs: int, rows: int) -> dict[str, Any]:
    """Fit both, draw what they make of the plane and what noise they map the data to, and say how far off they are."""
    toy = FigureOne()
    data = toy.dataset(train=rows, validation=rows // 4, test=rows // 2)
    exact = toy.log_prob(data.test.double())
    densities, figures = {}, {"exact": asdict(estimate(exact)), "entropy": toy.entropy}
    for name, layers in LAYERS.items():
        torch.manual_seed(0)
        flow = MAF(2, num_layers=layers, hidden_dims=WIDTHS, order=[0, 1])
        result = pyro_maf.fit(
            flow, data.train, validation=data.validation, batch_size=500, max_epochs=epochs, learning_rate=5e-3
        )
        densities[name] = result.density
        log_prob = log_prob_of(result.density, data.test, None)
        figures[name] = asdict(estimate(log_prob)) | {"short_of_exact": asdict(estimate(exact - log_prob))}
    shown = plotting.contours({"True density": toy, **densities}, WINDOW, title="Figure 1: the density and the models")
    shown.savefig(folder / "paper-figure1-density.png")
    noise = plotting.noise(densities, data.test[:5000], title="Figure 1: the noise that each model maps the data to")
    noise.savefig(folder / "paper-figure1-noise.png")
    return figures
