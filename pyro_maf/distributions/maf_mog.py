"""A masked autoregressive flow on a base of mixtures of Gaussians."""

from __future__ import annotations

from typing import Unpack, cast, get_type_hints

from pyro_maf.distributions.density import ConditionalDensityForm
from pyro_maf.distributions.flow_on_base import FlowOnBase
from pyro_maf.distributions.made_mog import MADEMoG
from pyro_maf.flows import MAF, StackOptions
from pyro_maf.nn import MADEOptions, reseeded
from pyro_maf.transforms import MaskedAutoregressive

__all__ = ["ConditionalMAFMoG", "MAFMoG"]


class MAFMoG(FlowOnBase):
    r"""MAF on a MADE MoG base: log p(y) = log p_base(z) - log |det dy/dz|, z = flow.inv(y).

    The base's order is the reverse of that of the adjacent layer. Starts near the standard normal.

    Args:
        input_dim: D.
        num_components: K, the number of components of each conditional of the base.
        num_layers, hidden_dims, activation, order, batch_norm, linear, degrees, seed: As in `MAF`; the base's network
            has the same widths, activation and degrees.
        context_dim: Number of context features, 0 for none. With a context, use `ConditionalMAFMoG`.

    Attributes:
        flow: The `MAF`.
        base: The `MADEMoG`, with the same shapes and errors.

    Cost:
        `log_prob`: one dense pass per layer, and one for the base. `sample`: one sequential sweep for each of them,
        about half the multiplications of a dense pass. Sampling picks components, so there is no `rsample`.

    Example:
        >>> density = MAFMoG(3, num_layers=2, hidden_dims=[16])
        >>> y = density.sample([5])
        >>> y.shape, density.log_prob(y).shape
        (torch.Size([5, 3]), torch.Size([5]))

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.1.
    """

    flow_class = MAF

    def __init__(self, input_dim: int, *, num_components: int = 10, **flow: Unpack[StackOptions]) -> None:
        stack = MAF(input_dim, **flow)
        super().__init__(input_dim, stack.context_dim)
        self.flow = stack
        orders = [layer.order for layer in stack if isinstance(layer, MaskedAutoregressive)]
        network = {name: value for name, value in flow.items() if name in get_type_hints(MADEOptions)}
        self.base = MADEMoG(
            input_dim,
            num_components=num_components,
            order=orders[0].flip(0),
            context_dim=stack.context_dim,
            **reseeded(cast(MADEOptions, network), flow.get("seed", 0) + len(orders)),
        )


class ConditionalMAFMoG(ConditionalDensityForm):
    """A `MAFMoG` whose networks, in flow and base, see a context, as in `ConditionalMADEMoG`.

    Args:
        input_dim, context_dim: As there.
        num_components, num_layers, hidden_dims, activation, order, batch_norm, linear, degrees, seed: As in `MAFMoG`.

    Example:
        >>> density = ConditionalMAFMoG(3, 2, num_layers=2, hidden_dims=[16])
        >>> density.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    density_class = MAFMoG
