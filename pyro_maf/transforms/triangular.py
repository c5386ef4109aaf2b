"""Transform of a full-rank normal: location and Cholesky factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_maf.nn import MLP, default_hidden_dims
from pyro_maf.nn.weights import current, outputs_of
from pyro_maf.transforms.base import ConditionalFlow, Flow

__all__ = ["ConditionalLowerTriangularAffine", "LowerTriangularAffine", "solve_lower"]


class LowerTriangularAffine(Flow):
    r"""y = loc + L x, with L lower triangular with a positive diagonal: log |det dy/dx| = sum_i log L_ii.

    With a standard normal x, y is normal with covariance L L^T. Starts as the identity by default.

    Args:
        input_dim: D.
        loc: Initial location, (D,).
        scale_tril: Initial factor L, (D, D).
        context_dim: Number of context features, 0 for none. With a context, a network of it adds to loc, to log L_ii
            and to L below the diagonal; each of its outputs starts at 0.
        hidden_dims: Widths of that network, by default two by `pyro_maf.nn.default_hidden_dims`.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: one triangular product from x to y, one triangular solve from y to x.

    Raises:
        ValueError: For a loc or scale_tril of the wrong shape, a non-positive diagonal, or non-zero entries above it.

    Example:
        >>> layer = LowerTriangularAffine(2, scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> layer(torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    is_by_row = True
    _places: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        loc: Tensor | None = None,
        scale_tril: Tensor | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__(input_dim, context_dim)
        dtype = next((given.dtype for given in (loc, scale_tril) if given is not None), None)
        loc = torch.zeros(input_dim, dtype=dtype) if loc is None else loc
        scale_tril = torch.eye(input_dim, dtype=dtype) if scale_tril is None else scale_tril
        for name, value, shape in (("loc", loc, (input_dim,)), ("scale_tril", scale_tril, (input_dim, input_dim))):
            if value.shape != shape:
                raise ValueError(f"{self.name} expected {name} of shape {shape}, got {tuple(value.shape)}.")
        diagonal = scale_tril.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError(f"{self.name} expected a positive diagonal of scale_tril, got {diagonal.tolist()}.")
        if bool((scale_tril.triu(1) != 0).any()):
            raise ValueError(f"{self.name} expected scale_tril to be lower triangular, got numbers above its diagonal.")
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_diagonal = nn.Parameter(diagonal.detach().log())
        self.below = nn.Parameter(scale_tril.detach()[tuple(torch.tril_indices(input_dim, input_dim, -1))])
        self._derive()
        if context_dim:
            hidden_dims = default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims
            width = 2 * input_dim + len(self.below)
            self.network = MLP(context_dim, hidden_dims, width, activation=activation)
            self.network.zero_output()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = L x + loc, and log |det L|."""
        loc, log_diagonal, factor = self._factor(context)
        y = loc + (factor @ x[..., None])[..., 0]
        return y, log_diagonal.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = L^-1 (y - loc), and log |det L|."""
        loc, log_diagonal, factor = self._factor(context)
        x = solve_lower(factor, y - loc)
        return x, log_diagonal.sum(-1).expand(x.shape[:-1])

    def _factor(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        own = current(self)
        loc, log_diagonal, below = own.loc, own.log_diagonal, own.below
        if context is not None:
            made = outputs_of(self.network, context, None).split([self.input_dim, self.input_dim, len(below)], -1)
            loc, log_diagonal, below = loc + made[0], log_diagonal + made[1], below + made[2]
        size = self.input_dim
        flat = below.new_zeros(*below.shape[:-1], size * size).index_copy(-1, self._places, below)
        return loc, log_diagonal, torch.diag_embed(log_diagonal.exp()) + flat.unflatten(-1, (size, size))

    def _derive(self) -> None:
        """Recompute the flat indices of the entries below the diagonal."""
        rows, columns = torch.tril_indices(self.input_dim, self.input_dim, -1, device=self.below.device)
        self.register_buffer("_places", rows * self.input_dim + columns, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()


def solve_lower(factor: Tensor, y: Tensor) -> Tensor:
    r"""The x of y = L x, for a lower triangular L, (D, D) or with the batch shape of y, (\*batch, D)."""
    if factor.dim() > 2:
        return torch.linalg.solve_triangular(factor, y[..., None], upper=False)[..., 0]
    columns = y.reshape(-1, y.shape[-1]).T
    return torch.linalg.solve_triangular(factor, columns, upper=False).T.reshape(y.shape)


class ConditionalLowerTriangularAffine(ConditionalFlow):
    r"""A `LowerTriangularAffine` whose loc and L depend on a context.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1.
        loc, scale_tril, hidden_dims, activation: As in `LowerTriangularAffine`.

    Shapes:
        context is (\*batch or (), context_dim) and broadcasts with x and y, (\*batch, D).

    Cost: a pass of the network, and for each row a triangular product or solve: D^2 multiplications.

    Raises:
        ValueError: As in `LowerTriangularAffine`, and for a context of the wrong width.
        TypeError: As in `LowerTriangularAffine`.

    Example:
        >>> layer = ConditionalLowerTriangularAffine(3, 2)
        >>> layer.condition(torch.zeros(5, 2))(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        *,
        loc: Tensor | None = None,
        scale_tril: Tensor | None = None,
        hidden_dims: Sequence[int] | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__(
            LowerTriangularAffine(
                input_dim,
                loc=loc,
                scale_tril=scale_tril,
                context_dim=context_dim,
                hidden_dims=hidden_dims,
                activation=activation,
            )
        )
