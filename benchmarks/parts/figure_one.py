"""The paper's Figure 1: MADE and a MAF of five layers on a density whose conditional of x2 given x1 is not Gaussian.

MADE, and the layer of the MAF next to the data, have the order (x1, x2); the orders of the MAF's layers alternate. A
MAF with one order throughout is fitted too: all its layers are affine in x2 given x1, hence so is the stack, and it is
no better than a MADE.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pyro_maf
from pyro_maf import MAF, plotting
from pyro_maf.datasets import FigureOne
from pyro_maf.experiments import estimate
from pyro_maf.training.scores import log_prob_of

WIDTHS = [64, 64]
WINDOW = ((-3.5, 8.0), (-6.0, 6.0))
NATURAL = [0, 1]
MODELS = {
    "MADE": lambda: MAF(2, num_layers=1, hidden_dims=WIDTHS),
    "MAF (5), one order": lambda: MAF(2, num_layers=5, hidden_dims=WIDTHS, order=NATURAL),
    "MAF (5)": lambda: MAF(2, num_layers=5, hidden_dims=WIDTHS),
}

DRAWN = ("MADE", "MAF (5)")
"""Models in the paper's figure."""


def run(folder: Path, epochs: int, rows: int) -> dict[str, Any]:
    """Fit the models, plot their densities and the noise that they map the data to, and return their scores."""
    toy = FigureOne()
    data = toy.dataset(train=rows, validation=rows // 4, test=rows // 2)
    exact = toy.log_prob(data.test.double())
    densities, figures = {}, {"exact": asdict(estimate(exact)), "entropy": toy.entropy}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        result = pyro_maf.fit(
            make(), data.train, validation=data.validation, batch_size=500, max_epochs=epochs, learning_rate=5e-3
        )
        densities[name] = result.density
        log_prob = torch.cat([*log_prob_of(result.density, data.test)]).double()
        figures[name] = asdict(estimate(log_prob)) | {"short_of_exact": asdict(estimate(exact - log_prob))}
    drawn = {name: densities[name] for name in DRAWN}
    shown = plotting.contours({"True density": toy, **drawn}, WINDOW, title="Figure 1: the density and the models")
    shown.savefig(folder / "paper-figure1-density.png", bbox_inches="tight")
    noise = plotting.noise(drawn, data.test[:5000], title="Figure 1: the noise that each model maps the data to")
    noise.savefig(folder / "paper-figure1-noise.png", bbox_inches="tight")
    return figures
