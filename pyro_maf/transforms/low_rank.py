"""Affine head of a guide with many dimensions: a diagonal, a few directions and a chain instead of a full matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf.nn.layers import gain_of
from pyro_maf.nn.weights import current
from pyro_maf.transforms.base import Flow
from pyro_maf.transforms.triangular import solve_lower

__all__ = ["LowRankHead", "along_chain"]

FEW = 4
"""Square root of the number of dimensions up to which the trained parameters have a gain of 1."""


class LowRankHead(Flow):
    r"""y = loc + scale * C^-1 R (b + e^d * A x): the head of a guide with many dimensions, without a D x D matrix.

    With fixed orthonormal directions Q, (D, k), and fixed stretches r, R = I + Q (diag(r) - I) Q^T. The parameters are
    b, d, the lower triangular T of A = I + Q (T - I) Q^T, and the chain C, with 1 on the diagonal and -tanh(a_i) below
    it. The inverse of C is a cumulative sum along the vector: a dependence between neighbours, such as the steps of a
    time series. b and A start as 0 and the identity.

    Args:
        input_dim: D.
        rank: k, at most D.
        loc, scale: The fixed location and scales, (D,), by default 0 and 1.
        directions: Q, (D, k), with orthonormal columns, by default the first axes.
        stretches: r, (k,), positive, by default 1.
        log_diagonal, chain: The initial d, (D,), and tanh(a), (D - 1,), by default 0.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: O(D k) multiplications in either direction, and log2(D) vector sums in the forward direction; memory O(D k).

    Raises:
        ValueError: For tensors of the wrong shape, or scales or stretches that are not positive.

    Example:
        >>> head = LowRankHead(3, scale=torch.tensor([1.0, 2.0, 3.0]))
        >>> head(torch.ones(3)).tolist()
        [1.0, 2.0, 3.0]
    """

    is_by_row = True
    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretches: Tensor
    first: Tensor

    def __init__(
        self,
        input_dim: int,
        rank: int = 0,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        directions: Tensor | None = None,
        stretches: Tensor | None = None,
        log_diagonal: Tensor | None = None,
        chain: Tensor | None = None,
    ) -> None:
        super().__init__(input_dim)
        loc = torch.zeros(input_dim) if loc is None else loc
        scale = torch.ones(input_dim).to(loc) if scale is None else scale
        directions = torch.eye(input_dim).to(loc)[:, :rank] if directions is None else directions
        stretches = loc.new_ones(rank) if stretches is None else stretches
        expected = {"loc": (input_dim,), "scale": (input_dim,), "directions": (input_dim, rank), "stretches": (rank,)}
        for name, tensor in {"loc": loc, "scale": scale, "directions": directions, "stretches": stretches}.items():
            if tensor.shape != expected[name]:
                raise ValueError(f"{self.name} expected {name} of shape {expected[name]}, got {tuple(tensor.shape)}.")
            if name in ("scale", "stretches") and not bool((tensor > 0).all()):
                raise ValueError(f"{self.name} expected positive {name}, got a minimum of {float(tensor.min()):g}.")
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
        self._sizes = [input_dim, input_dim, input_dim - 1, rank, rank * (rank - 1) // 2]
        # One tensor for all, since the optimizer takes time for each.
        self.free = nn.Parameter(torch.zeros(sum(self._sizes)).to(loc))
        first = torch.zeros_like(self.free.detach())
        if log_diagonal is not None:
            first[input_dim : 2 * input_dim] = log_diagonal
        if chain is not None:
            first[2 * input_dim : 3 * input_dim - 1] = chain.atanh()
        self.register_buffer("first", first)
        # Errors of D shifts and D scales add up; the gain makes a step of Adam move the normal as far as in few
        # dimensions.
        self._gain = gain_of(math.isqrt(input_dim), FEW)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert parameters and buffers; in a wider dtype, make the directions orthonormal to its precision."""
        before = self.directions.dtype
        super()._apply(fn, recurse)
        if torch.finfo(self.directions.dtype).eps < torch.finfo(before).eps and self.directions.numel():
            turned, signs = torch.linalg.qr(self.directions)
            self.directions = turned * signs.diagonal().sign()
        return self

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log |det dy/dx|."""
        shift, log_diagonal, chain, inner, log_det = self._parts()
        if len(inner):
            along = x @ self.directions
            x = x + (F.linear(along, inner) - along) @ self.directions.T
        z = shift + log_diagonal.exp() * x
        if len(inner):
            z = z + (z @ self.directions * (self.stretches - 1)) @ self.directions.T
        return self.loc + self.scale * along_chain(chain, z), log_det.expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log |det dy/dx|."""
        shift, log_diagonal, chain, inner, log_det = self._parts()
        z = (y - self.loc) / self.scale
        z = z - F.pad(chain * z[..., :-1], (1, 0))
        if len(inner):
            z = z + (z @ self.directions * (1 / self.stretches - 1)) @ self.directions.T
        x = (z - shift) * (-log_diagonal).exp()
        if len(inner):
            along = x @ self.directions
            x = x + (solve_lower(inner, along) - along) @ self.directions.T
        return x, log_det.expand(y.shape[:-1])

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return b, d, the chain's entries, T and the log-determinant."""
        shift, log_diagonal, chain, log_inner, below = (self._gain * current(self).free + self.first).split(self._sizes)
        rank = len(log_inner)
        inner = log_inner.exp().diag()
        if rank > 1:
            rows, columns = torch.tril_indices(rank, rank, -1, device=below.device)
            inner = inner.index_put((rows, columns), gain_of(rank) * below)
        log_det = log_diagonal.sum() + log_inner.sum() + self.scale.log().sum() + self.stretches.log().sum()
        return shift, log_diagonal, chain.tanh(), inner, log_det


def along_chain(chain: Tensor, x: Tensor) -> Tensor:
    r"""Solve z_i = chain_(i-1) z_(i-1) + x_i for z, with chain (D - 1,) and x (\*batch, D), in log2(D) sums."""
    size, step = x.shape[-1], 1
    factor = F.pad(chain, (1, 0))
    while step < size:
        x = x + factor * F.pad(x, (step, 0))[..., :size]
        factor = factor * F.pad(factor, (step, 0))[..., :size]
        step *= 2
    return x
