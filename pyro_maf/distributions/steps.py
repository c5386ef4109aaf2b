"""Probabilities of values on a grid, under a continuous density."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_maf.distributions.data_units import has_float64
from pyro_maf.distributions.density import Density
from pyro_maf.distributions.flow_prior import FlowPrior

__all__ = ["Steps", "dequantised"]

POINTS = 64
VALUES_AT_ONCE = 2**20
"""Number of points per step that the density is averaged over, and maximum number of values computed at a time."""


class Steps:
    r"""P(n) = \int p(n + h (v - 1/2)) dv prod_j h_j, over v in the unit cube of the columns with a spacing h_j > 0.

    For a single column it is exact, Phi(u(n + h / 2)) - Phi(u(n - h / 2)) with u the noise of the density. Otherwise
    the integral is a mean over 64 points of a scrambled Sobol sequence, the same at every call.

    Args:
        prior: The density p.
        spacing: The spacing of each column, 0 for a column that is not on a grid.

    Shapes:
        Values are (\*batch, columns), log-probabilities (\*batch,) in nats.

    Example:
        >>> from pyro_maf import NSF
        >>> steps = Steps(FlowPrior(NSF(1, hidden_dims=())), [2.0])
        >>> steps.log_prob(torch.zeros(1), None).exp()
        tensor(0.6827, grad_fn=<ExpBackward0>)
    """

    def __init__(self, prior: FlowPrior, spacing: Sequence[float]) -> None:
        self.prior = prior
        self.spacing = spacing

    @property
    def log_volume(self) -> float:
        """The sum of log h_j."""
        return sum(math.log(spacing) for spacing in self.spacing if spacing)

    @property
    def is_exact(self) -> bool:
        """True if no mean over points is needed."""
        has_noise = not isinstance(self.prior.model, Density) or type(self.prior.model).noise is not Density.noise
        return not any(self.spacing) or (len(self.spacing) == 1 and has_noise)

    def log_prob(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Log-probability of the steps; log-density for columns that are not on a grid."""
        if not any(self.spacing):
            return self.prior.log_density(value, context)
        if self.is_exact:
            return self._by_distribution_function(value, context)
        return self._log_densities(value, context).logsumexp(0) - math.log(POINTS) + self.log_volume

    def error(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Standard error of `log_prob` from the spread over points, as if they were independent; 0 if it is exact."""
        if self.is_exact:
            return value.new_zeros(value.shape[:-1])
        log_density = self._log_densities(value, context)
        share = (log_density - log_density.amax(0)).exp()
        return share.std(0) / share.mean(0) / math.sqrt(POINTS)

    def _log_densities(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Log-densities at the points, (points, batch)."""
        points = self._points(value)
        at_once = max(1, VALUES_AT_ONCE // max(1, value.numel()))
        shape = [1] * (value.dim() - 1)
        return torch.cat(
            [
                self.prior.log_density(value + some.reshape(-1, *shape, some.shape[-1]), context)
                for some in points.split(at_once)
            ]
        )

    def _points(self, like: Tensor) -> Tensor:
        """Points around 0, (POINTS, columns)."""
        spacing = torch.tensor(self.spacing, dtype=like.dtype)
        on_grid = spacing.nonzero()[:, 0]
        points = torch.zeros(POINTS, len(spacing), dtype=like.dtype)
        points[:, on_grid] = SobolEngine(len(on_grid), scramble=True, seed=0).draw(POINTS, dtype=like.dtype) - 0.5
        return (points * spacing).to(like.device)

    def _by_distribution_function(self, value: Tensor, context: Tensor | None) -> Tensor:
        half = self.spacing[0] / 2
        low, high = (self.prior.noise(value + side, context)[..., 0] for side in (-half, half))
        if has_float64(value.device):
            low, high = low.double(), high.double()
        # If both are above 0, use symmetry to evaluate Phi in the tail where it is small.
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        exact = (log_high + torch.log1p(-(log_low - log_high).clamp(max=-1e-12).exp())).to(value.dtype)
        if exact.isfinite().all():
            return exact
        # The noise of a mixture overflows some 40 standard deviations out; its density does not.
        return torch.where(exact.isfinite(), exact, self.prior.log_density(value, context) + self.log_volume)


def dequantised(value: Tensor, spacing: Sequence[float], generator: torch.Generator | None = None) -> Tensor:
    r"""Add uniform noise within their steps to values, (\*batch, columns), except where the spacing is 0.

    Args:
        value: The values.
        spacing: The spacing of each column.
        generator: Generator of the noise, on the CPU; by default torch's global one, on the device of the values.
    """
    if generator is None:
        noise = torch.rand_like(value)
    else:
        noise = torch.rand(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    return value + (noise - 0.5) * torch.tensor(spacing, dtype=value.dtype, device=value.device)
