"""Affine maps of a full-rank normal: location and Cholesky factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf.nn import MLP, default_hidden_dims
from pyro_maf.nn.layers import gain_of
from pyro_maf.nn.weights import current, is_hooked, outputs_of
from pyro_maf.sweep import Triangular
from pyro_maf.transforms.base import Flow
from pyro_maf.transforms.conditional import ConditionalForm

__all__ = ["ConditionalLowerTriangularAffine", "Head", "LowerTriangularAffine"]


class TriangularMap(Flow):
    r"""Base of the affine maps y = loc + L x, with L lower triangular with a positive diagonal.

    A subclass holds loc, log L_ii and the entries of L below the diagonal, row by row. With a context, a network's
    outputs are added to these; they start at 0. The entries below the diagonal are multiplied by a gain.
    """

    is_by_row = True
    gain: Tensor | None
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
        self.register_buffer("gain", None)
        if context_dim:
            hidden_dims = default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims
            self.network = MLP(context_dim, hidden_dims, sum(self._sizes()), activation=activation)
            self.network.zero_output()
        loc, scale_tril = _start(self.name, input_dim, loc, scale_tril)
        self._register(loc.detach(), scale_tril.detach())
        self._derive()

    def _register(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Register the parameters and buffers for an initial location and factor."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y = L x + loc and log |det L|."""
        loc, factor, log_det = self._factor(context)
        y = F.linear(x, factor, loc) if factor.dim() == 2 else loc + (factor @ x[..., None])[..., 0]
        return y, log_det.expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x = L^-1 (y - loc) and log |det L|."""
        loc, factor, log_det = self._factor(context)
        x = solve_lower(factor, y - loc)
        return x, log_det.expand(x.shape[:-1])

    def program_steps(self, inverse: bool) -> tuple[Triangular, ...] | None:
        """One map, or None with a context."""
        if self.context_dim or is_hooked(self):
            return None
        gain = 1.0 if self.gain is None else float(self.gain)
        return (Triangular(self._stored(), inverse, gain),)

    def _stored(self) -> tuple[Tensor, ...]:
        """loc, log L_ii and the entries below the diagonal: three tensors, or one that concatenates them."""
        raise NotImplementedError

    def _sizes(self) -> list[int]:
        """Numbers of entries in loc, on the diagonal of L and below it."""
        return [self.input_dim, self.input_dim, self.input_dim * (self.input_dim - 1) // 2]

    def _factor(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return loc, L and log |det L|."""
        stored = current(self)._stored()
        loc, log_diagonal, below = stored if len(stored) > 1 else stored[0].split(self._sizes())
        if context is not None:
            shifts = outputs_of(self.network, context, None).split(self._sizes(), -1)
            loc, log_diagonal, below = loc + shifts[0], log_diagonal + shifts[1], below + shifts[2]
        entries = [F.pad(log_diagonal.exp(), (1, 0)), below if self.gain is None else self.gain * below]
        factor = torch.cat(entries, -1).index_select(-1, self._places)
        return loc, factor.unflatten(-1, (self.input_dim, self.input_dim)), log_diagonal.sum(-1)

    def _derive(self) -> None:
        """Compute the index of each entry of L in the vector (0, diagonal, entries below the diagonal)."""
        size, device = self.input_dim, next(self.parameters()).device
        places = torch.zeros(size, size, dtype=torch.int64, device=device)
        diagonal, below = torch.arange(1, 1 + size * (size + 1) // 2, device=device).tensor_split([size])
        places.diagonal().copy_(diagonal)
        places[tuple(torch.tril_indices(size, size, -1, device=device))] = below
        self.register_buffer("_places", places.flatten(), persistent=False)


class LowerTriangularAffine(TriangularMap):
    r"""y = loc + L x, with L lower triangular with a positive diagonal: log |det dy/dx| = sum_i log L_ii.

    If x is standard normal, y is normal with covariance L L^T. Starts as the identity by default.

    Args:
        input_dim: D.
        loc: Initial location, (D,).
        scale_tril: Initial factor L, (D, D).
        context_dim: Number of context features, 0 for none. With a context, the outputs of a network are added to loc,
            to log L_ii and to L below the diagonal; all of them start at 0.
        hidden_dims: Widths of that network, by default two by `pyro_maf.nn.default_hidden_dims`.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: one triangular product from x to y, one triangular solve from y to x.

    Raises:
        ValueError: For loc or scale_tril of the wrong shape, a non-positive diagonal, or non-zero entries above it.

    Example:
        >>> layer = LowerTriangularAffine(2, scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> layer(torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    def _register(self, loc: Tensor, scale_tril: Tensor) -> None:
        size = self.input_dim
        self.loc = nn.Parameter(loc.clone())
        self.log_diagonal = nn.Parameter(scale_tril.diagonal().log())
        self.below = nn.Parameter(scale_tril[tuple(torch.tril_indices(size, size, -1))])

    def become(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set loc, (D,), and L, (D, D)."""
        below = scale_tril[tuple(torch.tril_indices(self.input_dim, self.input_dim, -1))]
        with torch.no_grad():
            for parameter, value in zip(
                (self.loc, self.log_diagonal, self.below), (loc, scale_tril.diagonal().log(), below), strict=True
            ):
                parameter.copy_(value)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.loc, self.log_diagonal, self.below


class Head(TriangularMap):
    r"""y = loc + L (b + A x), with fixed loc and L, and trained A and b: the affine head of a guide.

    L and A are lower triangular with positive diagonals. A and b start as the identity and 0, so that y starts as
    loc + L x. The parameters thus have units in which the posterior is about standard normal, and one learning rate
    suits every model. From 23 dimensions on, the entries of A below the diagonal are their parameters times a gain of
    about 16 / D, so that a step of Adam on all D (D - 1) / 2 of them moves y no further than in few dimensions.

    Args:
        input_dim: D.
        loc, scale_tril: The fixed location, (D,), and factor L, (D, D), by default 0 and the identity.
        context_dim, hidden_dims, activation: As in `LowerTriangularAffine`, for the network that adds to b and A.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: two products forward, two triangular solves in the inverse.
    """

    loc: Tensor
    scale_tril: Tensor

    def _register(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale_tril.clone(memory_format=torch.contiguous_format))
        # b, the logarithm of A's diagonal, and the entries below it in one tensor, since the optimizer takes time for
        # each.
        self.free = nn.Parameter(torch.zeros(sum(self._sizes())).to(loc))
        gain = gain_of(self.input_dim)
        self.gain = None if gain == 1.0 else torch.tensor(gain).to(loc)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log |det LA|."""
        z, log_det = super().forward_and_log_det(x, context)
        return F.linear(z, self.scale_tril, self.loc), log_det + self._fixed_log_det()

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log |det LA|."""
        x, log_det = super().inverse_and_log_det(solve_lower(self.scale_tril, y - self.loc), context)
        return x, log_det + self._fixed_log_det()

    def program_steps(self, inverse: bool) -> tuple[Triangular, ...] | None:
        """Two maps, A x + b and the fixed one; None with a context."""
        trained, fixed = super().program_steps(inverse), self.scale_tril
        if trained is None or fixed.requires_grad:
            return None
        # Outside inference mode, whose tensors no later graph could save.
        with torch.inference_mode(False), torch.no_grad():
            start = Triangular((self.loc, fixed.diagonal().log(), fixed), inverse)
        return (start, *trained) if inverse else (*trained, start)

    def _stored(self) -> tuple[Tensor]:
        return (self.free,)

    def _fixed_log_det(self) -> Tensor:
        return self.scale_tril.diagonal().log().sum()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        with torch.inference_mode(False):  # no later graph could save an inference tensor
            # The gain belongs to the stored entries: a head stored without one has none.
            self.gain = torch.ones_like(self.free[0].detach()) if prefix + "gain" in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _start(who: str, input_dim: int, loc: Tensor | None, scale_tril: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a checked initial location and factor; by default 0 and the identity."""
    dtype = next((start.dtype for start in (loc, scale_tril) if start is not None), None)
    loc = torch.zeros(input_dim, dtype=dtype) if loc is None else loc
    scale_tril = torch.eye(input_dim, dtype=dtype) if scale_tril is None else scale_tril
    for name, value, shape in (("loc", loc, (input_dim,)), ("scale_tril", scale_tril, (input_dim, input_dim))):
        if value.shape != shape:
            raise ValueError(f"{who} expected {name} of shape {shape}, got {tuple(value.shape)}.")
    diagonal = scale_tril.diagonal()
    if not bool((diagonal > 0).all()):
        raise ValueError(f"{who} expected a positive diagonal of scale_tril, got {diagonal.tolist()}.")
    if bool((scale_tril.triu(1) != 0).any()):
        raise ValueError(f"{who} expected scale_tril to be lower triangular, got numbers above its diagonal.")
    return loc, scale_tril


def solve_lower(factor: Tensor, y: Tensor) -> Tensor:
    r"""Solve y = L x for x, with a lower triangular L, (D, D) or with the batch shape of y, (\*batch, D)."""
    if factor.dim() > 2:
        return torch.linalg.solve_triangular(factor, y[..., None], upper=False)[..., 0]
    columns = y.reshape(-1, y.shape[-1]).T
    return torch.linalg.solve_triangular(factor, columns, upper=False).T.reshape(y.shape)


class ConditionalLowerTriangularAffine(ConditionalForm):
    """A `LowerTriangularAffine` whose loc and L depend on a context; shapes as in `ConditionalMaskedAutoregressive`.

    Args:
        input_dim, context_dim: As there.
        loc, scale_tril, hidden_dims, activation: As in `LowerTriangularAffine`.

    Cost: one pass of the network, and a triangular product or solve per row, D^2 multiplications.

    Example:
        >>> layer = ConditionalLowerTriangularAffine(3, 2)
        >>> layer.condition(torch.zeros(5, 2))(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    flow_class = LowerTriangularAffine
