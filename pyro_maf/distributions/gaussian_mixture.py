"""Mixtures of Gaussians with full covariances, optionally given a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.distributions.density import Density, drawn_index
from pyro_maf.tables.mixture import Mixture, fit_mixture

__all__ = ["GaussianMixture"]

ROWS_A_COLUMN = 2
"""Minimum number of rows per column of context and value for modelling the two jointly."""


class GaussianMixture(Density):
    r"""Mixture of K Gaussians, p(y) = sum_k s_k N(y; m_k, L_k L_k^T), or p(c, y) / p(c) given a context c.

    Given a context it is a mixture of linear regressions: weights s_k N(c; k), means linear in c, and covariances that
    do not depend on c. At initialisation it is standard normal for any context; it is not trained.

    Args:
        input_dim: D.
        num_components: K.
        context_dim: C, the number of context features, 0 for none.

    Attributes:
        shares, means, factors: Weights s, means m and Cholesky factors L of the components, of c and y jointly, (K,),
            (K, C + D), (K, C + D, C + D).
    """

    shares: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, input_dim: int, *, num_components: int = 1, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        check_positive(self.name, "num_components", num_components)
        size = context_dim + input_dim
        self._set(
            torch.full((num_components,), 1 / num_components),
            torch.zeros(num_components, size),
            torch.eye(size).repeat(num_components, 1, 1),
        )

    def _set(self, shares: Tensor, means: Tensor, factors: Tensor) -> None:
        self.register_buffer("shares", shares)
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)

    @torch.no_grad()
    def start_at(self, rows: Tensor, weights: Tensor | None = None, context: Tensor | None = None) -> None:
        """Fit the mixture to rows, (rows, D), with weights (rows,); BIC chooses the number of components.

        Args:
            rows, weights: The rows and their weights.
            context: Context of the rows, (rows, C). Without one, or with fewer than 2 (C + D) rows, the mixture is the
                same for any context.
        """
        joined = rows if context is None else torch.cat([context, rows], 1)
        if len(rows) < ROWS_A_COLUMN * joined.shape[1]:
            joined = rows
        shares, means, factors = fit_mixture(joined.cpu(), None if weights is None else weights.cpu())
        spare = self.context_dim + self.input_dim - joined.shape[1]
        whole = torch.eye(spare + joined.shape[1], dtype=factors.dtype).repeat(len(shares), 1, 1)
        whole[:, spare:, spare:] = factors
        self.become(Mixture(shares, torch.nn.functional.pad(means, (spare, 0)), whole))

    def become(self, mixture: Mixture) -> None:
        """Set the components, of context and value jointly."""
        self._set(*(each.to(self.shares) for each in mixture))

    @property
    def mixture(self) -> Mixture:
        """The components, of context and value jointly."""
        return Mixture(self.shares, self.means, self.factors)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; O(K (C + D)^2)."""
        each = self._log_factors(value, context)
        # Factor by factor: a difference of log-densities would be inexact for a context far out.
        log_share = (self.shares.log() + each[..., : self.context_dim].sum(-1)).log_softmax(-1)
        return (log_share + each[..., self.context_dim :].sum(-1)).logsumexp(-1)

    @torch.no_grad()
    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient."""
        count, seen = shape.numel(), self.context_dim
        means, factors = self.means[:, seen:], self.factors[:, seen:, seen:]
        if context is None:
            component = torch.multinomial(self.shares, max(1, count), replacement=True)[:count]
            mean = means[component]
        else:
            rows = context.expand(*shape, seen).reshape(count, seen)
            of_context = Mixture(self.shares, self.means[:, :seen], self.factors[:, :seen, :seen])
            component = drawn_index(of_context.log_joint(rows))
            standard = of_context.standardised(rows)[torch.arange(count), component]
            mean = means[component] + (self.factors[component, seen:, :seen] @ standard[..., None])[..., 0]
        normal = torch.randn(count, self.input_dim, 1, dtype=means.dtype, device=means.device)
        return (mean + (factors[component] @ normal)[..., 0]).reshape(*shape, self.input_dim)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u_i = Phi^-1(F_i(y_i | y_<i)), (rows, D)."""
        standard = self.mixture.standardised(self._joined(y, context)).double()
        each = self._log_factors(y, context).double()
        # Weight of each component at dimension i, after the preceding ones: N(y_<i; k) is a product of normals.
        before = self.shares.double().log()[:, None] + each.cumsum(-1) - each
        log_share = before.log_softmax(-2)
        # erfc keeps its relative precision in the tail.
        below = (log_share.exp() * torch.erfc(-standard / math.sqrt(2))).sum(-2) / 2
        above = (log_share.exp() * torch.erfc(standard / math.sqrt(2))).sum(-2) / 2
        noise = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
        return noise[..., self.context_dim :].to(y.dtype)

    def _joined(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Concatenate context and value."""
        if context is None:
            return value
        shape = torch.broadcast_shapes(context.shape[:-1], value.shape[:-1])
        return torch.cat([context.expand(*shape, -1), value.expand(*shape, -1)], -1)

    def _log_factors(self, value: Tensor, context: Tensor | None) -> Tensor:
        r"""Log-densities of each entry of context and value given the preceding ones, (\*batch, K, C + D)."""
        standard = self.mixture.standardised(self._joined(value, context))
        log_scale = self.factors.diagonal(dim1=1, dim2=2).log()
        return -0.5 * standard.square() - log_scale - 0.5 * math.log(2 * math.pi)
