"""A spline flow on a base that is a mixture of Gaussians with full covariances."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.distributions.density import ConditionalDensityForm, Density
from pyro_maf.distributions.gaussian_mixture import fit_mixture
from pyro_maf.flows import NSF, Orders
from pyro_maf.nn import MADEOptions
from pyro_maf.univariate import UnivariateMap

__all__ = ["ConditionalMixtureFlow", "MixtureFlow"]


class MixtureFlow(Density):
    r"""NSF on a mixture of Gaussians: log p(y) = log sum_k s_k N(z; m_k, L_k L_k^T) - log |det dy/dz|, z = flow.inv(y).

    The flow starts as the identity, so that the density starts as the mixture, which `start_at` fits to rows: with few
    of them, that is most of what can be learnt. The mixture is not trained with the flow. Until `start_at` it is
    standard normal.

    Args:
        input_dim: D.
        num_components: K, the number of components of the base; `start_at` chooses another.
        num_layers, order, batch_norm, univariate, hidden_dims, activation, degrees, seed: As in `NSF`.
        context_dim: Number of context features that the flow, not the base, depends on; 0 for none.

    Attributes:
        flow: The `NSF`.
        shares, means, factors: Shares s, means m and Cholesky factors L of the components, (K,), (K, D), (K, D, D).

    Shapes:
        Values are (\*batch, D), log-densities (\*batch,) in nats.

    Cost:
        `log_prob`: one dense pass a layer, and O(K D^2) for the base. `sample`: one sweep a layer. A draw picks a
        component, so there is no `rsample`.

    Raises:
        ValueError: As in `NSF`, and for a number of components below 1.
        TypeError: As in `NSF`.

    Example:
        >>> density = MixtureFlow(2, num_layers=1)
        >>> round(density.log_prob(torch.zeros(2)).item(), 4)
        -1.8379
        >>> noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> density.start_at(noise / 5 + torch.tensor([[-1.0], [0.0], [1.0]]).repeat(100, 1))
        >>> density.shares.shape, density.sample([5]).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    flow_class = NSF
    shares: Tensor
    means: Tensor
    factors: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        num_components: int = 1,
        num_layers: int = 5,
        order: Orders = "reverse",
        batch_norm: bool = False,
        context_dim: int = 0,
        univariate: str | UnivariateMap = "spline",
        **flow: Unpack[MADEOptions],
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_positive(self.name, "num_components", num_components)
        self.flow = NSF(
            input_dim,
            num_layers=num_layers,
            order=order,
            batch_norm=batch_norm,
            context_dim=context_dim,
            univariate=univariate,
            **flow,
        )
        self._set(
            torch.full((num_components,), 1 / num_components),
            torch.zeros(num_components, input_dim),
            torch.eye(input_dim).repeat(num_components, 1, 1),
        )

    @property
    def architecture(self) -> dict[str, object]:
        """Arguments of the constructor, with the present number of components."""
        return {**self._arguments, "num_components": len(self.shares)}

    @torch.no_grad()
    def start_at(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Set the base to a mixture of rows, (rows, D), with weights (rows,): as many components as BIC says."""
        mixture = fit_mixture(rows.cpu(), None if weights is None else weights.cpu())
        like = self.shares
        self._set(*(each.to(like) for each in mixture))

    def _set(self, shares: Tensor, means: Tensor, factors: Tensor) -> None:
        self.register_buffer("shares", shares)
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set the statistics of the flow's batch norms from data `y`, (rows, D)."""
        self.flow.fit_statistics(y, context)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; one dense pass a layer."""
        z, log_det = self.flow.inverse_and_log_det(value, context)
        standard = self._standard(z)
        log_volume = self.factors.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * self.input_dim * math.log(2 * math.pi)
        return (self.shares.log() - log_volume - 0.5 * standard.square().sum(-1)).logsumexp(-1) - log_det

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient; one sweep a layer."""
        with torch.no_grad():
            component = torch.multinomial(self.shares, max(1, shape.numel()), replacement=True)[: shape.numel()]
            normal = torch.randn(len(component), self.input_dim, dtype=self.means.dtype, device=self.means.device)
            z = self.means[component] + (self.factors[component] @ normal[..., None])[..., 0]
            return self.flow.forward_and_log_det(z.reshape(*shape, self.input_dim), context)[0]

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u_i = Phi^-1(F_i(z_i | z_<i)), (rows, D), of the base at z = flow.inv(y)."""
        standard = self._standard(self.flow.inverse_and_log_det(y, context)[0]).double()
        diagonal = self.factors.diagonal(dim1=1, dim2=2).double()
        # Share of each component at dimension i, after those before it: N(z_<i; k) is a product of normals.
        each = -0.5 * standard.square() - diagonal.log()
        before = self.shares.double().log()[:, None] + each.cumsum(-1) - each
        log_share = before.log_softmax(-2)
        # erfc keeps its relative precision in the tail.
        below = (log_share.exp() * torch.erfc(-standard / math.sqrt(2))).sum(-2) / 2
        above = (log_share.exp() * torch.erfc(standard / math.sqrt(2))).sum(-2) / 2
        return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).to(y.dtype)

    def _standard(self, z: Tensor) -> Tensor:
        r"""L_k^-1 (z - m_k), (\*batch, K, D)."""
        components, dim = self.means.shape
        identity = torch.eye(dim, dtype=z.dtype, device=z.device)
        whitening = torch.linalg.solve_triangular(self.factors, identity, upper=False)
        shift = (whitening @ self.means[..., None]).reshape(-1)
        return (z @ whitening.reshape(components * dim, dim).T - shift).unflatten(-1, (components, dim))

    def __repr__(self) -> str:
        head = f"{super().__repr__()[:-1]}; {len(self.shares)} components)"
        return f"{head}\n  flow: " + repr(self.flow).replace("\n", "\n  ")


class ConditionalMixtureFlow(ConditionalDensityForm):
    r"""A `MixtureFlow` whose flow sees a context: `condition(context)` is a density.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1.
        num_components, num_layers, hidden_dims, activation, order, batch_norm, degrees, univariate, seed: As in
            `MixtureFlow`.

    Shapes:
        context is (\*batch or (), context_dim) and broadcasts with values, (\*batch, D).

    Cost: as `MixtureFlow`.

    Raises:
        ValueError: As in `MixtureFlow`, and for a context of the wrong width.

    Example:
        >>> density = ConditionalMixtureFlow(3, 2, num_layers=2, hidden_dims=[16])
        >>> density.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    density_class = MixtureFlow
