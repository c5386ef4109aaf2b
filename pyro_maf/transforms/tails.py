"""Elementwise transform with learned tail weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core.torch_state import gradients, is_intercepted
from pyro_maf.nn.weights import current
from pyro_maf.sweep.kernels import kernels, loaded
from pyro_maf.transforms.base import Flow

__all__ = ["Tails", "with_tails"]

BOUND = 2.0
"""Bound of the weights; a Cauchy distribution has weight 1."""
LARGEST = 64.0
"""Exponent beyond which the map is linear; single precision represents values far beyond it."""
SMALL = 0.25
"""Exponent below which functions are computed by their series, exact to rounding, since they are quotients of small
numbers."""
DTYPES = (torch.float32, torch.float64)


class Tails(Flow):
    r"""Learned tail weights, for each dimension and side: a normal variable becomes Student's t.

    In units of loc and scale, and with w > 0 the weight of the side on which x lies,

    y = x sqrt((exp(w x^2) - 1) / (w x^2)), so that x = y sqrt(log(1 + w y^2) / (w y^2)).

    To third order y is x + w x^3 / 4, so the bulk hardly moves. For a normal x, the tails of y are those of Student's t
    with 1 / w degrees of freedom, and the whole distribution is close to it: within 1e-5 nats for 3 degrees of freedom.
    A negative weight swaps the two directions, for tails lighter than normal. The weight is w = 2 tanh(theta / 2),
    where the parameter theta starts at 0, so that y = x. Beyond |w| x^2 = 64, or log(1 + |w| x^2) = 64, the map
    continues as its tangent.

    With u = w x^2 and m = log((exp(u) - 1) / u), y = x exp(m / 2) and log |det dy/dx| = sum_i u_i - m_i / 2.

    Args:
        input_dim: D.
        loc: Fixed location of the bulk, (D,), by default 0.
        scale: Fixed scale of the bulk, (D,), by default 1.
        lighter: Whether tails may become lighter than normal. If not, a negative theta gives weight 0 but the gradient
            of theta = 0, so that it can recover.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: elementwise in either direction.

    Raises:
        ValueError: For a loc or scale of the wrong shape, or a scale that is not positive.

    Example:
        >>> layer = Tails(1)
        >>> _ = torch.nn.init.constant_(layer.free, 0.34)  # about 3 degrees of freedom
        >>> [round(value, 1) for value in layer(torch.tensor([[0.5], [1.0], [4.0]])).flatten().tolist()]
        [0.5, 1.1, 25.4]

    Reference:
        Wallace, *Bounds on normal approximations to Student's and the chi-square distributions*, 1959, for the map;
        Laszkiewicz, Lederer & Fischer, *Marginal Tail-Adaptive Normalizing Flows*, 2022, and Hickling & Prangle,
        *Flexible Tails for Normalizing Flows*, 2025, for tails of flows.
    """

    is_by_row = True
    loc: Tensor
    scale: Tensor

    def __init__(
        self, input_dim: int, *, loc: Tensor | None = None, scale: Tensor | None = None, lighter: bool = True
    ) -> None:
        super().__init__(input_dim)
        self.lighter = lighter
        loc = torch.zeros(input_dim).to(torch.zeros(()) if scale is None else scale) if loc is None else loc
        scale = torch.ones(input_dim).to(loc) if scale is None else scale
        for name, tensor in {"loc": loc, "scale": scale}.items():
            if tensor.shape != (input_dim,):
                raise ValueError(f"{self.name} expected {name} of shape ({input_dim},), got {tuple(tensor.shape)}.")
            self.register_buffer(name, tensor.detach().clone())
        if not bool((scale > 0).all()):
            raise ValueError(f"{self.name} expected a positive scale, got a minimum of {float(scale.min()):g}.")
        # Theta of the right and left tails in one tensor, since the optimizer takes time for each.
        self.free = nn.Parameter(torch.zeros(2, input_dim).to(loc))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log |det dy/dx|."""
        return self._mapped(x, 1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log |det dy/dx|: the inverse is the map with the opposite weights."""
        x, log_det = self._mapped(y, -1)
        return x, -log_det

    def _mapped(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        free: Tensor = current(self).free
        if not self.lighter:
            free = free + (free.clamp(min=0) - free).detach()
        return with_tails(x, BOUND * torch.tanh(free / BOUND), self.loc, self.scale, sign)


def with_tails(x: Tensor, weights: Tensor, loc: Tensor, scale: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    r"""Map x like `Tails`, with these weights of the right and left tails, (2, D); inversely if sign is -1.

    Returns:
        y (\*batch, D) and log |det dy/dx|, (\*batch,).
    """
    if is_intercepted() or loc.requires_grad or scale.requires_grad or not _is_compiled(x, weights, loc, scale):
        return _plain(x, weights, loc, scale, sign)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, log_det = _Compiled.apply(rows, weights, loc, scale, sign)
    return (y, log_det) if rows is x else (y.view(x.shape), log_det.view(x.shape[:-1]))


def _plain(x: Tensor, weights: Tensor, loc: Tensor, scale: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """The map, or its inverse for sign -1, by operations that can be differentiated any number of times."""
    z = (x - loc) / scale
    weight = sign * torch.where(z > 0, weights[0], weights[1])
    is_heavy = weight >= 0
    # Not `abs`, whose gradient at 0 is 0.
    size = torch.where(is_heavy, weight, -weight)
    limit = torch.full_like(z, math.expm1(LARGEST)).masked_fill(is_heavy, LARGEST)
    is_inside = ~(size.detach() * z.detach().square() > limit)  # true for NaN, which passes through
    edge = torch.copysign((limit / torch.where(is_inside, 1.0, size)).sqrt(), z)
    inner = torch.where(is_inside, z, edge)
    # Squares only the values inside: for others, which may overflow, the gradient would be 0 times infinity.
    raw = torch.where(is_inside, size * torch.where(is_inside, z, 0.0).square(), limit)
    exponent = torch.where(is_heavy, raw, torch.log1p(torch.where(is_heavy, 0.0, raw)))
    half = 0.5 * _log_ratio(exponent)
    log_derivative = torch.where(is_heavy, exponent - half, half - exponent)
    y = inner * torch.where(is_heavy, half, -half).exp() + (z - inner) * log_derivative.exp()
    return loc + scale * y, log_derivative.sum(-1)


def _log_ratio(u: Tensor) -> Tensor:
    """log((exp(u) - 1) / u) for u >= 0."""
    is_small = u < SMALL
    small, other = torch.where(is_small, u, 0.0), torch.where(is_small, 1.0, u)
    square = small.square()
    series = 1 / 24 - square * (1 / 2880 - square * (1 / 181440 - square * (1 / 9676800 - square / 479001600)))
    return torch.where(is_small, small / 2 + square * series, (torch.expm1(other) / other).log())


def _is_compiled(*tensors: Tensor) -> bool:
    """Return whether the compiled map supports these tensors."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(each.is_cpu and each.dtype is dtype for each in tensors) and kernels() is not None


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


class _Compiled(torch.autograd.Function):
    """Compiled form of `_plain`, for rows, (rows, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, loc: Tensor, scale: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        rows = _array(x)
        y, log_det = np.empty_like(rows), np.empty(len(rows), rows.dtype)
        partials = np.empty((4, len(rows) if any(ctx.needs_input_grad) else 0, rows.shape[1]), rows.dtype)
        arguments = _array(weights), _array(loc), _array(scale), sign, LARGEST
        loaded().tails(rows, *arguments, y, log_det, partials)
        ctx.sign, ctx.arrays = sign, (rows, arguments[1], partials)
        ctx.save_for_backward(x, weights, loc, scale)
        return torch.from_numpy(y), torch.from_numpy(log_det)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        needed, inputs = ctx.needs_input_grad[:2], ctx.saved_tensors  # raises if the graph was freed
        if torch.is_grad_enabled() or is_intercepted():
            # By operations that can be differentiated again.
            plain = partial(_plain, sign=ctx.sign)
            return *gradients(plain, inputs, (*needed, False, False), (grad_y, grad_log_det)), None
        rows = ctx.arrays[0]
        grad_x, by_weights = np.empty_like(rows), np.zeros((2, rows.shape[1]), rows.dtype)
        loaded().tails_back(*ctx.arrays, *map(_array, (grad_y, grad_log_det)), ctx.sign, grad_x, by_weights)
        grads = (
            torch.from_numpy(grad) if need else None for grad, need in zip((grad_x, by_weights), needed, strict=True)
        )
        return *grads, None, None, None
