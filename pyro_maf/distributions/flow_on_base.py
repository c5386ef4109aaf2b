"""Base class of flows on a base density that is not normal."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_maf.distributions.density import Density
from pyro_maf.flows import MAF

__all__ = ["FlowOnBase"]


class FlowOnBase(Density):
    r"""A flow on a base density: log p(y) = log p_base(z) - log |det dy/dz|, z = flow.inv(y).

    Attributes:
        flow: The flow, from the base's values to the density's.
        base: The base density.
    """

    flow: MAF
    base: Density

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set the statistics of the flow's batch norms from data `y`, (rows, D)."""
        self.flow.fit_statistics(y, context)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; one dense pass per layer, plus the base's."""
        z, log_det = self.flow.inverse_and_log_det(value, context)
        return self.base.log_density(z, context) - log_det

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient; one sweep per layer, after the base's draws."""
        with torch.no_grad():
            return self.flow.forward_and_log_det(self.base.draw(shape, context), context)[0]

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise of the base, (rows, D), at z = flow.inv(y)."""
        return self.base.noise(self.flow.inverse_and_log_det(y, context)[0], context)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n  base: {self.base!r}\n  flow: " + repr(self.flow).replace("\n", "\n  ")
