"""The candidates of a comparison: models by name with their options, and the paper's settings for its data sets.

Reference:
    Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4, table 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pyro_maf.experiments.models import STACKS, build
from pyro_maf.training.preparation import Model

__all__ = ["BATCH_SIZE", "PATIENCE", "PUBLISHED", "ROWS", "SETTINGS", "Candidate", "Settings", "candidates"]

ROWS: dict[str, tuple[str, int]] = {
    "Gaussian": ("gaussian", 1),
    "MADE": ("made", 1),
    "MADE MoG": ("made-mog", 1),
    "RealNVP (5)": ("realnvp", 5),
    "RealNVP (10)": ("realnvp", 10),
    "MAF (5)": ("maf", 5),
    "MAF (10)": ("maf", 10),
    "MAF MoG (5)": ("maf-mog", 5),
}
"""The rows of the paper's table: the flow of each, and its number of layers."""

SPELLINGS = {
    re.sub(r"[^a-z0-9]", "", spelling.casefold()): row
    for row, (flow, layers) in ROWS.items()
    for spelling in (row, *([] if layers == 10 else [flow]))
}
"""Each row by its letters and digits: maf-mog is MAF MoG (5), as for `build`, and realnvp-10 RealNVP (10)."""

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
class Candidate:
    """A model to fit. Candidates of one name differ in their widths; the one with the best validation score counts.

    Attributes:
        name: Its name in the table.
        flow, num_layers, hidden_dims, activation, batch_norm, degrees, networks: As in `build`.
        learning_rate: Initial learning rate of Adam, or None for that of the comparison.

    Example:
        >>> Candidate("MAF (5)", "maf", hidden_dims=(100, 100)).slug
        'maf-5-100x100'
    """

    name: str
    flow: str
    num_layers: int = 5
    hidden_dims: tuple[int, ...] | None = None
    activation: str = "relu"
    batch_norm: bool = False
    degrees: str = "sequential"
    networks: str = "joint"
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """Name of its folder."""
        layers = f"-{self.num_layers}" if self.flow in STACKS else ""
        return f"{self.flow}{layers}" + (f"-{self.widths}" if self.widths else "")

    @property
    def widths(self) -> str:
        """Widths of the hidden layers; "" for the default or for no hidden layers."""
        return "x".join(map(str, self.hidden_dims or ())) if self.flow != "gaussian" else ""

    def build(self, input_dim: int, context_dim: int, seed: int) -> Model:
        """Build the untrained model."""
        options = asdict(self)
        del options["name"], options["learning_rate"]
        return build(input_dim=input_dim, context_dim=context_dim, seed=seed, **options)


def candidates(
    names: Sequence[str] = tuple(ROWS), *, hidden_dims: Sequence[Sequence[int]] = (), batch_norm: bool = False
) -> tuple[Candidate, ...]:
    """Return the paper's models for any data.

    Args:
        names: Rows of the paper's table, all of them by default, as there or as in `build`: "MADE MoG" or "made-mog",
            "MAF (5)", "maf-5" or "maf".
        hidden_dims: Widths to try, each of the hidden layers of one network; by default the choice of `build`.
        batch_norm: Put a `BatchNorm` after every layer of the flows.

    Raises:
        ValueError: For a name that is not in the table, or no names.

    Example:
        >>> [one.slug for one in candidates(["Gaussian", "MADE"], hidden_dims=[[32], [32, 32]])]
        ['gaussian', 'made-32', 'made-32x32']
    """
    spelt = [re.sub(r"[^a-z0-9]", "", name.casefold()) for name in names]
    unknown = [name for name, spelling in zip(names, spelt, strict=True) if spelling not in SPELLINGS]
    if unknown or not names:
        raise ValueError(f"candidates expected names among {', '.join(ROWS)}, got {', '.join(unknown) or 'none'}.")
    widths: list[tuple[int, ...] | None] = [tuple(each) for each in hidden_dims]
    return tuple(
        Candidate(name, flow, num_layers, each, batch_norm=batch_norm)
        for name in dict.fromkeys(SPELLINGS[spelling] for spelling in spelt)
        for flow, num_layers in [ROWS[name]]
        for each in (widths if widths and flow != "gaussian" else [None])
    )


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
            replace(
                one,
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
