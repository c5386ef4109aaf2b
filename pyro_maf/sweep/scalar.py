"""The map of one dimension, whose parameters a network provides."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Affine", "ScalarMap"]


class ScalarMap(Protocol):
    """An increasing map of the line, elementwise: all that a layer asks of it.

    Attributes:
        num_parameters: P, how many numbers a network gives for each dimension. With all of them 0 the map is the
            identity.
    """

    num_parameters: int

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx."""
        ...

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx."""
        ...


class Affine:
    r"""y = x exp(alpha) + mu, with log dy/dx = alpha.

    A network gives (s, a): alpha = b tanh(a / b) with b = `BOUND`, the same in both directions, so the inverse is
    exact; and mu = s exp(alpha / 2). Were mu the network's own output, a small scale would lose x among the rounding of
    a large mu, and its inverse likewise with a large scale; halving the scale around the shift is the best for both.

    Example:
        >>> y, log_derivative = Affine().forward(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.0))
        >>> y.item(), log_derivative.item()
        (1.5, 0.0)
    """

    BOUND = 3.0
    num_parameters = 2

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx = alpha."""
        shift, a = parameters
        alpha = self._alpha(a)
        half = torch.exp(0.5 * alpha)
        return torch.addcmul(shift, x, half) * half, alpha

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx = alpha."""
        shift, a = parameters
        alpha = self._alpha(a)
        half = torch.exp(-0.5 * alpha)
        return (y * half - shift) * half, alpha

    def _alpha(self, a: Tensor) -> Tensor:
        return self.BOUND * torch.tanh(a / self.BOUND)
