"""The full-rank affine map at the end of a guide's flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf.flows import IAF, MAF, RealNVP
from pyro_maf.infer.initialization import Normal
from pyro_maf.nn import MLP
from pyro_maf.nn.tempering import Tempered, gain_of
from pyro_maf.nn.weights import current, outputs_of
from pyro_maf.transforms import Flow, Stack
from pyro_maf.transforms.triangular import solve_lower

__all__ = ["Head", "with_head"]


def with_head(
    flow_class: type[MAF] | type[IAF] | type[RealNVP],
    start: Normal,
    num_layers: int,
    hidden_dims: Sequence[int] | None,
    context_dim: int,
) -> Stack:
    """Compose a flow with a head: one map that starts as a normal and can be trained at a guide's learning rate.

    `hidden_dims` of None means two layers of 64 to 512 units, depending on the number of dimensions.
    """
    size = len(start.loc)
    if hidden_dims is None:
        hidden_dims = 2 * (min(512, max(64, 4 * size)),)
    shared: dict[str, Any] = {"hidden_dims": hidden_dims, "activation": "elu", "context_dim": context_dim}
    flow = flow_class(size, num_layers=num_layers, **shared)
    head = Head(size, loc=start.loc, scale_tril=start.scale_tril, **shared)
    stack = Stack([*flow, head]).to(start.loc)
    for module in stack.modules():
        if isinstance(module, Tempered):
            module.temper()
    return stack


class Head(Flow):
    r"""y = loc + L (b + A x), with a fixed location and a fixed factor L, and A and b trained.

    L and A are lower triangular with positive diagonals. A and b start as the identity and 0, so that y starts as
    loc + L x: the trained parameters live in units in which the posterior is about standard normal, and one learning
    rate suits every model. From 23 dimensions on, the entries below the diagonal of A are their parameters times a gain
    of about 16 / D, so that a step of Adam on all D (D - 1) / 2 of them moves y no further than in few dimensions.

    Args:
        input_dim: D.
        loc: (D,).
        scale_tril: L, (D, D).
        context_dim: Number of context features, 0 for none. With a context, a network adds to A and b; its outputs
            start at 0.
        hidden_dims: Widths of that network.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: two products forward, two triangular solves inverse.
    """

    is_by_row = True
    loc: Tensor
    scale_tril: Tensor
    gain: Tensor | None
    _places: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        loc: Tensor,
        scale_tril: Tensor,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__(input_dim, context_dim)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().clone(memory_format=torch.contiguous_format))
        # b, the logarithm of A's diagonal, and the entries below it, as one tensor: each costs an optimizer time.
        self.free = nn.Parameter(torch.zeros(2 * input_dim + input_dim * (input_dim - 1) // 2).to(loc))
        gain = gain_of(input_dim)
        self.register_buffer("gain", None if gain == 1.0 else torch.tensor(gain).to(loc))
        self._derive()
        if context_dim:
            self.network = MLP(context_dim, hidden_dims, len(self.free), activation=activation)
            self.network.zero_output()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y from the base's x, and log |det dy/dx|."""
        shift, factor, log_det = self._parts(context)
        z = F.linear(x, factor, shift) if factor.dim() == 2 else shift + (factor @ x[..., None])[..., 0]
        y = F.linear(z, self.scale_tril, self.loc)
        return y, log_det.expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x from y, and log |det dy/dx|."""
        shift, factor, log_det = self._parts(context)
        x = solve_lower(factor, solve_lower(self.scale_tril, y - self.loc) - shift)
        return x, log_det.expand(x.shape[:-1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The gain belongs to the stored entries: none if the stored head has none.
        self.gain = torch.ones_like(self.free[0].detach()) if prefix + "gain" in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()

    def _derive(self) -> None:
        """Recompute the source index of each entry of A."""
        self.register_buffer("_places", _places(self.input_dim).to(self.free.device), persistent=False)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return b, A and log |det LA|."""
        free: Tensor = current(self).free
        free = free if context is None else free + outputs_of(self.network, context, None)
        size = self.input_dim
        shift, log_diagonal, below = free.split([size, size, free.shape[-1] - 2 * size], -1)
        entries = torch.cat([F.pad(log_diagonal.exp(), (1, 0)), below if self.gain is None else self.gain * below], -1)
        factor = entries.index_select(-1, self._places).unflatten(-1, (size, size))
        return shift, factor, log_diagonal.sum(-1) + self.scale_tril.diagonal().log().sum()


def _places(size: int) -> Tensor:
    """Index of each entry of a lower triangular matrix in the vector (0, diagonal, entries below it)."""
    places = torch.zeros(size, size, dtype=torch.int64)
    places.diagonal().copy_(torch.arange(1, size + 1))
    rows, columns = torch.tril_indices(size, size, -1)
    places[rows, columns] = torch.arange(size + 1, size + 1 + len(rows))
    return places.flatten()
