"""Activation normalization: a learned scale and location, set from the first batch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pyro_maf.nn.weights import current
from pyro_maf.transforms.base import Flow

__all__ = ["ActNorm"]


class ActNorm(Flow):
    r"""y = x exp(log_scale) + loc, with log |det dy/dx| = sum_i log_scale_i.

    The first batch in the data-to-noise direction in training mode sets loc and log_scale to its mean and log standard
    deviation; from then on they are ordinary parameters. Starts as the identity.

    Args:
        input_dim: D.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: elementwise in either direction.

    Example:
        >>> layer = ActNorm(2)
        >>> x = layer.inv(10 + 5 * torch.randn(1000, 2))
        >>> round(x.std().item(), 2)
        1.0

    Reference:
        Kingma & Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018.
    """

    is_by_row = True
    SMALLEST_SCALE = 1e-6
    initialized: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.register_buffer("initialized", torch.tensor(False))
        # A copy of the buffer, since reading that at every call would synchronise with the device; in an object, which
        # flows with and without a cache share.
        self._host = SimpleNamespace(initialized=False)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = x exp(log_scale) + loc, and log |det dy/dx|."""
        layer = current(self)
        return x * layer.log_scale.exp() + layer.loc, layer.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = (y - loc) exp(-log_scale), and log |det dy/dx|; sets both from the first batch in training."""
        if self.training and not self._host.initialized and y.numel() > self.input_dim:
            self._fit_statistics(y)
        layer = current(self)
        return (y - layer.loc) * (-layer.log_scale).exp(), layer.log_scale.sum().expand(y.shape[:-1])

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        if self._host.initialized:
            return
        with torch.no_grad():
            deviation, mean = torch.std_mean(y.reshape(-1, self.input_dim), 0)
            self.loc.copy_(mean)
            self.log_scale.copy_(deviation.clamp(min=self.SMALLEST_SCALE).log())
            self.initialized.fill_(True)
        self._derive()

    def _derive(self) -> None:
        self._host.initialized = bool(self.initialized)
