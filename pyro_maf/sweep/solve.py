"""Either direction of an autoregressive layer as one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_maf._core.torch_state import is_exported, is_traced
from pyro_maf.nn import MADE
from pyro_maf.nn.weights import is_called, own_tensors, walk_by_calls
from pyro_maf.sweep import triton_sweep
from pyro_maf.sweep.plan import Direction, Plan, biases_of, lay_back, plan_of, together, weights_of
from pyro_maf.sweep.reference import TorchSweep, solve_by_passes
from pyro_maf.sweep.triton_sweep import TritonSweep
from pyro_maf.univariate import UnivariateMap

__all__ = ["parallel", "solve"]


class Engine(Protocol):
    """Implementation of the sweep of one network, and of its adjoint."""

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        """w, log-determinant and a tuple of tensors for the adjoint, for v (batch, D)."""
        ...

    def adjoint(
        self, v: Tensor, w: Tensor, kept: Any, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of <grad_w, w> + <grad_log_det, log_det> w.r.t. v, the weights and the pre-activations.

        The last are (units, batch) for each layer above the inputs.
        """
        ...


def solve(
    made: MADE, univariate: UnivariateMap, v: Tensor, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Solve w_i = f(v_i; phi_i(w_<i)), with phi_i the outputs of `made` for variable i.

    Args:
        made: The network, with as many outputs per input as f has parameters.
        univariate: The univariate map: f is its `forward`, or its `inverse` if `inverse` is true.
        v: The input, (\*batch, D).
        context: (\*batch or (), context_dim), or None.
        inverse: Whether v is y and w is x, rather than the reverse.

    Returns:
        w, (\*batch, D), and the sum over i of log dy_i/dx_i, (\*batch,).

    Cost: one pass through the non-zero half of the network's weights, and as much again for the gradient, whatever D.
    """
    own = own_tensors(made)
    if own is None and is_called(made):
        return _by_calls(made, univariate, v, context, inverse)
    if context is not None:
        v, context = together(v, context)
    rows = v if v.dim() == 2 else v.reshape(-1, made.input_dim)
    if is_traced() or (
        torch.is_grad_enabled() and is_exported()
    ):  # an exported program cannot hold the sweep's adjoint
        w, log_det = solve_by_passes(plan_of(made, context), _direction(univariate, inverse), rows)
    else:
        w, log_det = _Sweep.apply(made, univariate, inverse, rows, *weights_of(made), *biases_of(made, context))
    return (w, log_det) if rows is v else (w.reshape(v.shape), log_det.reshape(v.shape[:-1]))


def parallel(
    made: MADE, univariate: UnivariateMap, v: Tensor, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""w_i = f(v_i; phi_i(v_<i)), for all i at once, in torch. Arguments and results are those of `solve`."""
    is_plain = own_tensors(made) is not None or not is_called(made)
    phi = made.parameters_of(v, context) if is_plain else made(v, context)
    w, log_derivative = _direction(univariate, inverse)(v, phi)
    return w, log_derivative.sum(-1)


def _direction(univariate: UnivariateMap, inverse: bool) -> Direction:
    return univariate.inverse if inverse else univariate.forward


def _by_calls(
    made: MADE, univariate: UnivariateMap, v: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Solve by calls of the network, which run hooks and user-defined modules. Cost: D calls."""
    direction = _direction(univariate, inverse)
    if context is not None:
        v, context = together(v, context)
    rows = v.reshape(-1, made.input_dim)
    given = rows[:, made.order].T
    log_derivatives: list[Tensor] = []

    def step(i: int, parameters: Tensor) -> Tensor:
        value, log_derivative = direction(given[i], parameters.T)
        log_derivatives.append(log_derivative)
        return value

    w = walk_by_calls(made, step, context, rows, len(rows))
    return w.reshape(v.shape), torch.stack(log_derivatives).sum(0).reshape(v.shape[:-1])


class _Sweep(torch.autograd.Function):
    """The sequential direction, with its adjoint as the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        made: MADE,
        univariate: UnivariateMap,
        inverse: bool,
        v: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = len(tensors) // 2
        network = made, tensors[:layers], tensors[layers:]
        engine = _engine(network, univariate, inverse, v)
        w, log_det, kept = engine.forward(v)
        ctx.made, ctx.direction, ctx.engine = made, _direction(univariate, inverse), engine
        ctx.layers, ctx.kind_of_kept = layers, type(kept)
        ctx.save_for_backward(v, w, *tensors, *kept)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, w, *saved = ctx.saved_tensors
        tensors, kept = saved[: 2 * ctx.layers], ctx.kind_of_kept(*saved[2 * ctx.layers :])
        nothing = (None,) * 3
        if torch.is_grad_enabled():
            return *nothing, *_differentiable(ctx, v, tensors, grad_w, grad_log_det)
        grad_v, by_weights, by_units = ctx.engine.adjoint(v, w, kept, grad_w, grad_log_det)
        grad_weights, grad_biases = lay_back(ctx.made, by_weights, by_units, tensors[ctx.layers :])
        return *nothing, grad_v, *grad_weights, *grad_biases


def _engine(
    network: tuple[MADE, Sequence[Tensor], Sequence[Tensor]], univariate: UnivariateMap, inverse: bool, v: Tensor
) -> Engine:
    """The fastest engine for a network with its weights and biases."""
    plan, direction = Plan.of(*network), _direction(univariate, inverse)
    if triton_sweep.takes(univariate, v):
        return TritonSweep(plan, direction, network[0], inverse)
    return TorchSweep(plan, direction)


def _differentiable(
    ctx: Any, v: Tensor, tensors: list[Tensor], grad_w: Tensor, grad_log_det: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients through D plain passes, so that they can be differentiated again."""
    inputs = (v, *tensors)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    plan = Plan.of(ctx.made, tensors[: ctx.layers], tensors[ctx.layers :])
    results = solve_by_passes(plan, ctx.direction, v)
    # Of one variable, the log-determinant may depend on nothing that is wanted.
    pairs = [pair for pair in zip(results, (grad_w, grad_log_det), strict=True) if pair[0].requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
