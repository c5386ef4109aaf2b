"""Univariate maps, whose parameters are a network's outputs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Affine", "UnivariateMap"]


class UnivariateMap(Protocol):
    """An increasing elementwise map of the real line: the interface that a layer needs.

    Attributes:
        num_parameters: P, the number of network outputs for each dimension. With all of them 0 the map is the
            identity.
    """

    num_parameters: int

    def forward(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, for phi with one more dimension than x, of P."""
        ...

    def inverse(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx."""
        ...


class Affine:
    r"""y = x exp(alpha) + mu, with log dy/dx = alpha.

    The network outputs (s, a): alpha = b tanh(a / b) with b = `BOUND`, the same in both directions, so the inverse is
    exact; and mu = s exp(alpha / 2). If mu were itself the output, a small scale would lose x to the rounding of a
    large mu, and the inverse likewise with a large scale; applying exp(alpha / 2) on either side of the shift is best
    for both.

    Example:
        >>> y, log_derivative = Affine().forward(torch.tensor(1.0), torch.tensor([0.5, 0.0]))
        >>> y.item(), log_derivative.item()
        (1.5, 0.0)
    """

    BOUND = 3.0
    num_parameters = 2

    def forward(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx = alpha."""
        shift, a = phi.unbind(-1)
        alpha = self._alpha(a)
        half = torch.exp(0.5 * alpha)
        return torch.addcmul(shift, x, half) * half, alpha

    def inverse(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx = alpha."""
        shift, a = phi.unbind(-1)
        alpha = self._alpha(a)
        half = torch.exp(-0.5 * alpha)
        return (y * half - shift) * half, alpha

    def _alpha(self, a: Tensor) -> Tensor:
        return self.BOUND * torch.tanh(a / self.BOUND)
