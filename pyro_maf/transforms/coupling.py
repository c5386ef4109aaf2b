r"""Coupling: some dimensions pass through and condition the univariate maps of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_maf._core.checks import check_choice
from pyro_maf.nn import MLP, NetworkOptions, default_hidden_dims
from pyro_maf.nn.weights import outputs_of
from pyro_maf.sweep import Step, run
from pyro_maf.transforms.base import LayerOptions, UnivariateFlow
from pyro_maf.transforms.conditional import ConditionalForm
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["ConditionalCoupling", "Coupling", "CouplingOptions"]


class CouplingOptions(LayerOptions, NetworkOptions, total=False):
    """Options of a coupling, except for its mask.

    Attributes:
        univariate: The map of each dimension.
        networks: "joint" or "separate".
    """

    univariate: str | UnivariateMap
    networks: str


class Coupling(UnivariateFlow):
    r"""A RealNVP layer: dimensions where the mask m is true pass through and condition the maps of the others.

    y_i = x_i where m_i is true, otherwise y_i = f(x_i; phi_i(x_m)); log |det dy/dx| is the sum of log f'(x_i) over the
    latter. By default f is affine: y_i = x_i exp(alpha_i(x_m)) + mu_i(x_m). Starts as the identity.

    Args:
        input_dim: D.
        mask: m, D booleans, true where a dimension passes through; by default every other one, starting with the first.
            With D = 1 nothing passes through: the map depends only on the context, if there is one.
        hidden_dims, context_dim, activation, univariate: As in `MaskedAutoregressive`.
        networks: "joint", one network for all of phi; or "separate", as in the paper, for the affine map: a network
            with tanh units for alpha and one with `activation` units for mu.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: one dense pass in either direction.

    Raises:
        ValueError: For a mask of the wrong length or one that is true everywhere, for separate networks with a
            univariate map that is not affine, and as in `MLP`.

    Example:
        >>> layer = Coupling(3, mask=[True, False, False])
        >>> x = torch.randn(5, 3)
        >>> bool(torch.equal(layer(x)[:, 0], x[:, 0]))
        True

    Reference:
        Dinh, Sohl-Dickstein & Bengio, *Density Estimation Using Real NVP*, 2017.
    """

    is_by_row = True
    mask: Tensor
    _fixed: Tensor
    _moved: Tensor
    _place: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        mask: Sequence[bool] | Tensor | None = None,
        hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        activation: str = "relu",
        univariate: str | UnivariateMap = "affine",
        networks: str = "joint",
    ) -> None:
        super().__init__(input_dim, context_dim, univariate)
        mask = (torch.arange(input_dim) % 2 == 0) & (input_dim > 1) if mask is None else torch.as_tensor(mask)
        if mask.shape != (input_dim,):
            raise ValueError(f"{self.name} expected a mask of {input_dim} booleans, got shape {tuple(mask.shape)}.")
        if mask.is_floating_point():
            raise ValueError(f"{self.name} expected a mask of {input_dim} booleans, got {mask.tolist()}.")
        mask = mask.bool()
        if bool(mask.all()):
            raise ValueError(f"{self.name} expected a mask with at least one False: this one would move nothing.")
        self.register_buffer("mask", mask.clone())
        check_choice(self.name, "networks", networks, ("joint", "separate"))
        if networks == "separate" and not isinstance(self.univariate, Affine):
            raise ValueError(
                f'{self.name} expected networks="joint" for {self.univariate!r}: the others are for mu and alpha.'
            )
        hidden_dims = default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims
        fixed, moved = int(mask.sum()), int((~mask).sum())
        parameters = self.univariate.num_parameters
        widths = [parameters * moved] if networks == "joint" else [moved] * parameters
        activations = [activation] if networks == "joint" else [activation, "tanh"]
        self.networks = torch.nn.ModuleList()
        for width, name in zip(widths, activations, strict=True):
            network = MLP(fixed, hidden_dims, width, context_dim=context_dim, activation=name)
            network.zero_output()
            self.networks.append(network)
        self._derive()

    def program_steps(self, inverse: bool) -> tuple[Step]:
        """Either direction, as a step of a compiled program."""
        # The fastest access, on a path taken at every call.
        networks = tuple(self._modules["networks"]._modules.values())  # type: ignore[union-attr]
        seen, moved = self._buffers["_fixed"], self._buffers["_moved"]
        return (Step(networks, self.univariate, inverse, seen, moved),)  # type: ignore[arg-type]

    def _through_map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        compiled = run(self._programs, inverse, self.program_steps(inverse), self.input_dim, value, context)
        if compiled is not None:
            return compiled
        # index_select takes half the time of indexing with a tensor.
        fixed, moved = value.index_select(-1, self._fixed), value.index_select(-1, self._moved)
        outputs = [outputs_of(network, fixed, context) for network in self.networks]
        parameters = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        phi = parameters.unflatten(-1, (self.univariate.num_parameters, moved.shape[-1])).transpose(-1, -2)
        moved, log_derivative = (self.univariate.inverse if inverse else self.univariate.forward)(moved, phi)
        if moved.shape[:-1] != fixed.shape[:-1]:
            fixed = fixed.expand(*moved.shape[:-1], -1)
        return torch.cat([fixed, moved], -1).index_select(-1, self._place), log_derivative.sum(-1)

    def _derive(self) -> None:
        """Recompute the indices that follow from the mask."""
        fixed, moved = self.mask.nonzero()[:, 0], (~self.mask).nonzero()[:, 0]
        for name, index in (("_fixed", fixed), ("_moved", moved), ("_place", torch.cat([fixed, moved]).argsort())):
            self.register_buffer(name, index, persistent=False)


class ConditionalCoupling(ConditionalForm):
    """A `Coupling` whose networks see a context, with shapes as in `ConditionalMaskedAutoregressive`.

    Args:
        input_dim, context_dim: As there.
        mask, hidden_dims, activation, univariate, networks: As in `Coupling`.

    Example:
        >>> layer = ConditionalCoupling(3, 2)
        >>> layer.condition(torch.zeros(5, 2))(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    flow_class = Coupling
