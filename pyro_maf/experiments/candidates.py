"""The candidates of a comparison: models by name, and their options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyro_maf.distributions import ConditionalDensity, Density
from pyro_maf.experiments.models import STACKS, build
from pyro_maf.transforms import ConditionalFlow, Flow

__all__ = ["ROWS", "Candidate", "candidates"]

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

    def build(
        self, input_dim: int, context_dim: int, seed: int
    ) -> Flow | ConditionalFlow | Density | ConditionalDensity:
        """Build the untrained model."""
        return build(
            self.flow,
            input_dim,
            context_dim=context_dim,
            num_layers=self.num_layers,
            hidden_dims=self.hidden_dims,
            activation=self.activation,
            batch_norm=self.batch_norm,
            degrees=self.degrees,
            networks=self.networks,
            seed=seed,
        )


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
