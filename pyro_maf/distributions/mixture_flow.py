"""A spline flow whose base is a mixture of Gaussians with full covariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.distributions.density import ConditionalDensityForm
from pyro_maf.distributions.flow_on_base import FlowOnBase
from pyro_maf.distributions.gaussian_mixture import GaussianMixture
from pyro_maf.flows import NSF, StackOptions
from pyro_maf.tables.mixture import Mixture
from pyro_maf.univariate import UnivariateMap

__all__ = ["ConditionalMixtureFlow", "MixtureFlow"]

MOST_VALUES = 2**22
"""Maximum product of rows, components and dimensions that the side mixture processes at a time."""


class MixtureFlow(FlowOnBase):
    r"""NSF on a mixture of Gaussians: log p(y) = log sum_k s_k N(z; m_k, L_k L_k^T) - log |det dy/dz|, z = flow.inv(y).

    The flow starts as the identity, so the density starts as the mixture, which `base.start_at` fits to rows; with few
    rows, that is most of what can be learnt. The mixture is not trained with the flow. At initialisation it is standard
    normal.

    A second mixture q may stand beside the flow: the density is then (1 - w) p(y) + w q(y). With a component at each
    row of a table, q is a kernel density, which suits tables of near copies.

    Args:
        input_dim: D.
        num_components: K, the number of components of the base; `base.start_at` changes it.
        num_beside: Number of components of the mixture beside the flow, 0 for none; set by `put_beside`.
        num_layers, order, batch_norm, linear, univariate, hidden_dims, activation, degrees, seed: As in `NSF`.
        context_dim: Number of context features, 0 for none. Given a context, the base is a mixture of linear
            regressions.

    Attributes:
        flow: The `NSF`.
        base: The `GaussianMixture`, with weights s, means m and Cholesky factors L of the components.
        beside, share: The mixture q and its weight w, initially 0; if there is none, `beside` is None and there is no
            `share`.

    Shapes:
        Values are (\*batch, D), log-densities (\*batch,) in nats.

    Cost:
        `log_prob`: one dense pass per layer, and O(K D^2) for the base. `sample`: one sweep per layer. Sampling picks a
        component, so there is no `rsample`.

    Raises:
        ValueError: As in `NSF`, for fewer than one component, or for a mixture beside a flow with a context.
        TypeError: As in `NSF`.

    Example:
        >>> density = MixtureFlow(2, num_layers=1)
        >>> round(density.log_prob(torch.zeros(2)).item(), 4)
        -1.8379
        >>> noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> density.base.start_at(noise / 5 + torch.tensor([[-1.0], [0.0], [1.0]]).repeat(100, 1))
        >>> density.base.shares.shape, density.sample([5]).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    flow_class = NSF
    base: GaussianMixture
    beside: GaussianMixture | None
    share: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        num_components: int = 1,
        num_beside: int = 0,
        univariate: str | UnivariateMap = "spline",
        **flow: Unpack[StackOptions],
    ) -> None:
        stack = NSF(input_dim, univariate=univariate, **flow)
        super().__init__(input_dim, stack.context_dim)
        self.flow = stack
        self.base = GaussianMixture(input_dim, num_components=num_components, context_dim=stack.context_dim)
        self.beside = None
        if check_positive(self.name, "num_beside", num_beside, least=0):
            if stack.context_dim:
                raise ValueError(f"{self.name} expected no context for a mixture beside the flow, got {num_beside=}.")
            self.beside = GaussianMixture(input_dim, num_components=num_beside)
            self.register_buffer("share", torch.zeros(()))

    def put_beside(self, mixture: Mixture, share: float) -> MixtureFlow:
        """A density with this flow and base, and a mixture beside them with a weight `share` between 0 and 1."""
        arguments = {**self.architecture, "num_beside": len(mixture.shares)}
        whole = MixtureFlow(**arguments)  # type: ignore[arg-type]
        whole.flow, whole.base = self.flow, self.base
        whole.beside = GaussianMixture(self.input_dim, num_components=len(mixture.shares))
        whole.beside.become(mixture)
        whole.share.fill_(share)
        return whole.to(self.base.shares)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; one dense pass per layer, and the mixtures'."""
        inside = super().log_density(value, context)
        if self.beside is None:
            return inside
        return torch.logaddexp((-self.share).log1p() + inside, self.share.log() + self._log_prob_beside(value))

    @torch.no_grad()
    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient; one sweep per layer, after the base's draws."""
        drawn = super().draw(shape, context)
        if self.beside is None:
            return drawn
        is_beside = torch.rand(shape, dtype=drawn.dtype, device=drawn.device) < self.share
        return torch.where(is_beside[..., None], self.beside.draw(shape), drawn)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise of the base, (rows, D), or of the mixture beside it for rows randomly assigned to that mixture."""
        noise = super().noise(y, context)
        if self.beside is None:
            return noise
        odds = self.share.logit() + self._log_prob_beside(y) - super().log_density(y, context)
        chance = torch.rand(len(y), generator=torch.Generator().manual_seed(0)).to(odds)
        return torch.where((chance < odds.sigmoid())[:, None], self._in_parts(self.beside.noise, y), noise)

    def _log_prob_beside(self, value: Tensor) -> Tensor:
        rows = value.reshape(-1, self.input_dim)
        return self._in_parts(cast(GaussianMixture, self.beside).log_density, rows).reshape(value.shape[:-1])

    def _in_parts(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Apply a function to a few rows at a time."""
        components = cast(GaussianMixture, self.beside).means
        return torch.cat([function(part) for part in rows.split(max(1, MOST_VALUES // components.numel()))])

    @property
    def architecture(self) -> dict[str, object]:
        """Constructor arguments, with the current number of components."""
        return {**self._arguments, "num_components": len(self.base.shares)}


class ConditionalMixtureFlow(ConditionalDensityForm):
    """A `MixtureFlow` whose flow and base see a context, as in `ConditionalMADEMoG`.

    Args:
        input_dim, context_dim: As there.
        num_components, num_layers, hidden_dims, activation, order, batch_norm, linear, degrees, univariate, seed: As in
            `MixtureFlow`.
        num_beside: 0, since there is no mixture beside a flow with a context.

    Example:
        >>> density = ConditionalMixtureFlow(3, 2, num_layers=2, hidden_dims=[16])
        >>> density.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    density_class = MixtureFlow
