"""The paper's training settings and published figures.

Reference:
    Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4, table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_maf.experiments.candidates import ROWS, Candidate, candidates
from pyro_maf.experiments.models import STACKS

__all__ = ["BATCH_SIZE", "PATIENCE", "PUBLISHED", "SETTINGS", "Settings"]

BATCH_SIZE = 100
PATIENCE = 30
ONE_NETWORK_RATE, FLOW_RATE = 1e-3, 1e-4
"""The paper's learning rates: for MADE and MADE MoG, and for the flows."""

PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(ROWS, column, strict=True))
    for name, column in {
        "POWER": (-7.74, -3.08, 0.40, -0.02, 0.17, 0.14, 0.24, 0.30),
        "GAS": (-3.58, 3.56, 8.47, 4.78, 8.33, 9.07, 10.08, 9.59),
        "HEPMASS": (-27.93, -20.98, -15.15, -19.62, -18.71, -17.70, -17.73, -17.39),
        "MINIBOONE": (-37.24, -15.59, -12.27, -13.55, -13.84, -11.75, -12.24, -11.68),
        "BSDS300": (96.67, 148.85, 153.71, 152.97, 153.28, 155.69, 154.93, 156.36),
    }.items()
}
"""Test log-likelihood in nats by set and model: the paper's table 1."""


@dataclass(frozen=True)
class Settings:
    """The paper's settings for one data set.

    Its weight decay, 1e-6, is the default of `fit`.

    Attributes:
        name: Name in the paper.
        loader: The function of `pyro_maf.datasets` that reads it.
        units: Numbers of units of a hidden layer that were tried, each in one layer and in two.
        activation: Activation of the masked networks; those of couplings are tanh for the scale and ReLU for the shift.
        degrees: Degrees of the masked networks' hidden units.

    Example:
        >>> [one.slug for one in SETTINGS["GAS"].candidates(["Gaussian", "MAF (5)"])]
        ['gaussian', 'maf-5-100', 'maf-5-100x100']
    """

    name: str
    loader: str
    units: tuple[int, ...]
    activation: str = "relu"
    degrees: str = "sequential"

    @property
    def published(self) -> dict[str, float]:
        """The paper's figures by model; empty if its table 1 has none."""
        return PUBLISHED.get(self.name, {})

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """The widths of hidden layers that were tried."""
        return tuple((units,) * layers for units in self.units for layers in (1, 2))

    def candidates(self, names: Sequence[str] = tuple(ROWS)) -> tuple[Candidate, ...]:
        """Return rows of the table with every width that was tried, at the paper's learning rates."""
        return tuple(
            Candidate(
                one.name,
                one.flow,
                one.num_layers,
                one.hidden_dims,
                activation="relu" if one.flow == "realnvp" else self.activation,
                batch_norm=one.flow in STACKS,
                degrees=self.degrees,
                networks="separate" if one.flow == "realnvp" else "joint",
                learning_rate=FLOW_RATE if one.flow in STACKS else ONE_NETWORK_RATE,
            )
            for one in candidates(names, hidden_dims=self.widths)
        )


SETTINGS = {
    each.name: each
    for each in (
        Settings("POWER", "power", (100,)),
        Settings("GAS", "gas", (100,), activation="tanh"),
        Settings("HEPMASS", "hepmass", (512,)),
        Settings("MINIBOONE", "miniboone", (512,)),
        Settings("BSDS300", "bsds300", (512, 1024)),
        Settings("MNIST", "mnist", (1024,)),
        Settings("CIFAR-10", "cifar10", (1024, 2048), degrees="random"),
    )
}
"""Settings by the paper's name of each set."""
