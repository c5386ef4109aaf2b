"""A spline flow on a base that is a mixture of Gaussians with full covariances."""

from __future__ import annotations

from typing import Unpack

from pyro_maf.distributions.density import ConditionalDensityForm
from pyro_maf.distributions.flow_on_base import FlowOnBase
from pyro_maf.distributions.gaussian_mixture import GaussianMixture
from pyro_maf.flows import NSF, StackOptions
from pyro_maf.univariate import UnivariateMap

__all__ = ["ConditionalMixtureFlow", "MixtureFlow"]


class MixtureFlow(FlowOnBase):
    r"""NSF on a mixture of Gaussians: log p(y) = log sum_k s_k N(z; m_k, L_k L_k^T) - log |det dy/dz|, z = flow.inv(y).

    The flow starts as the identity, so that the density starts as the mixture, which `base.start_at` fits to rows: with
    few of them, that is most of what can be learnt. The mixture is not trained with the flow; a new one is standard
    normal.

    Args:
        input_dim: D.
        num_components: K, the number of components of the base; `base.start_at` chooses another.
        num_layers, order, batch_norm, univariate, hidden_dims, activation, degrees, seed: As in `NSF`.
        context_dim: Number of context features, 0 for none. Given them the base is a mixture of linear regressions.

    Attributes:
        flow: The `NSF`.
        base: The `GaussianMixture`, with shares s, means m and Cholesky factors L of the components.

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
        >>> density.base.start_at(noise / 5 + torch.tensor([[-1.0], [0.0], [1.0]]).repeat(100, 1))
        >>> density.base.shares.shape, density.sample([5]).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    flow_class = NSF
    base: GaussianMixture

    def __init__(
        self,
        input_dim: int,
        *,
        num_components: int = 1,
        univariate: str | UnivariateMap = "spline",
        **flow: Unpack[StackOptions],
    ) -> None:
        stack = NSF(input_dim, univariate=univariate, **flow)
        super().__init__(input_dim, stack.context_dim)
        self.flow = stack
        self.base = GaussianMixture(input_dim, num_components=num_components, context_dim=stack.context_dim)

    @property
    def architecture(self) -> dict[str, object]:
        """Arguments of the constructor, with the present number of components."""
        return {**self._arguments, "num_components": len(self.base.shares)}


class ConditionalMixtureFlow(ConditionalDensityForm):
    r"""A `MixtureFlow` whose flow and base see a context: `condition(context)` is a density.

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
