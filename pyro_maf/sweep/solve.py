"""Either direction of an autoregressive layer as one differentiable operation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_maf.nn import MADE
from pyro_maf.sweep import compiled, unrolled
from pyro_maf.sweep.pack import pack
from pyro_maf.sweep.plan import Direction, Plan, biases_of, lay_back, plan_of, weights_of
from pyro_maf.sweep.reference import TorchSweep
from pyro_maf.sweep.scalar import ScalarMap

__all__ = ["parallel", "solve"]


class Engine(Protocol):
    """What carries out the sweep of one network, and its adjoint."""

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        """w, log-determinant and a tuple of tensors for the adjoint, for v (batch, D)."""
        ...

    def adjoint(
        self, v: Tensor, w: Tensor, kept: Any, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Derivatives of <grad_w, w> + <grad_log_det, log_det> by v, the weights, and what is put into each unit.

        The last are (units, batch) for each layer above the inputs.
        """
        ...


def solve(
    made: MADE, scalar: ScalarMap, v: Tensor, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Solve w_i = f(v_i; phi_i(w_<i)), with phi_i the outputs of `made` for variable i.

    Args:
        made: The network, with as many outputs per input as f has parameters.
        scalar: The map of one dimension: f is its `forward`, or its `inverse` if that is asked for.
        v: What is given, (\*batch, D).
        context: (\*batch or (), context_dim), or None.
        inverse: Whether w are the x of given y.

    Returns:
        w, (\*batch, D), and the sum over i of log dy_i/dx_i, (\*batch,).

    Cost: one pass through the non-zero half of the network's weights, and as much again for the gradient, whatever D.
    """
    return _in_rows(made, scalar, v, context, inverse, True)


def parallel(
    made: MADE, scalar: ScalarMap, v: Tensor, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""w_i = f(v_i; phi_i(v_<i)), all at once. Arguments and results are those of `solve`."""
    return _in_rows(made, scalar, v, context, inverse, False)


def _in_rows(
    made: MADE, scalar: ScalarMap, v: Tensor, context: Tensor | None, inverse: bool, sequential: bool
) -> tuple[Tensor, Tensor]:
    needs_gradient = _needs_gradient(made, v, context)
    # With a gradient the parallel direction is dense products for the most part, at which torch is best. The kernels
    # are asked about last, since that loads them.
    if _is_traced() or (needs_gradient and not sequential):
        return _plain(made, scalar, v, context, inverse, sequential)
    by_kernel = compiled.takes(scalar, v)
    if not (by_kernel or sequential):
        return _plain(made, scalar, v, context, inverse, sequential)
    if context is not None:
        v, context = _together(v, context)
    rows = v if v.dim() == 2 else v.reshape(-1, made.input_dim)
    if by_kernel and not needs_gradient:
        w, log_det = compiled.evaluate(made, rows, context, inverse=inverse, sequential=sequential)
    else:
        direction = scalar.inverse if inverse else scalar.forward
        tensors = (*weights_of(made), *biases_of(made, context))
        w, log_det = _Sweep.apply(made, direction, by_kernel, inverse, rows, *tensors)
    return (w, log_det) if rows is v else (w.reshape(v.shape), log_det.reshape(v.shape[:-1]))


def _plain(
    made: MADE, scalar: ScalarMap, v: Tensor, context: Tensor | None, inverse: bool, sequential: bool
) -> tuple[Tensor, Tensor]:
    """By ordinary operations of torch, for what looks inside: `torch.func`, compilation and tracing."""
    direction = scalar.inverse if inverse else scalar.forward
    if not sequential:
        w, log_derivative = direction(v, *made.parameters_of(v, context).unbind(-1))
        return w, log_derivative.sum(-1)
    if context is not None:
        v, context = _together(v, context)
    w, log_det = unrolled.solve(plan_of(made, context), direction, v.reshape(-1, made.input_dim))
    return w.reshape(v.shape), log_det.reshape(v.shape[:-1])


def _is_traced() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """v with the batch shape of both, and the context with a row for each of its rows, unless it is one for all."""
    batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
    if context.dim() > 1:
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    return v.expand(*batch, v.shape[-1]), context


def _needs_gradient(made: MADE, v: Tensor, context: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (
        v.requires_grad
        or (context is not None and context.requires_grad)
        or any(parameter.requires_grad for parameter in made.parameters())
    )


class _Sweep(torch.autograd.Function):
    """The sequential direction, with its adjoint as the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        made: MADE,
        direction: Direction,
        by_kernel: bool,
        inverse: bool,
        v: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = len(tensors) // 2
        plan = Plan.of(made, tensors[:layers], tensors[layers:])
        engine: Engine = TorchSweep(plan, direction)
        if by_kernel:
            engine = compiled.KernelSweep(pack(made, plan), inverse)
        w, log_det, kept = engine.forward(v)
        ctx.made, ctx.direction, ctx.engine = made, direction, engine
        ctx.layers, ctx.kind_of_kept = layers, type(kept)
        ctx.save_for_backward(v, w, *tensors, *kept)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, w, *saved = ctx.saved_tensors
        tensors, kept = saved[: 2 * ctx.layers], ctx.kind_of_kept(*saved[2 * ctx.layers :])
        nothing = (None,) * 4
        if torch.is_grad_enabled():
            return *nothing, *_differentiable(ctx, v, tensors, grad_w, grad_log_det)
        grad_v, by_weights, by_units = ctx.engine.adjoint(v, w, kept, grad_w, grad_log_det)
        grad_weights, grad_biases = lay_back(ctx.made, by_weights, by_units, tensors[ctx.layers :])
        return *nothing, grad_v, *grad_weights, *grad_biases


def _differentiable(
    ctx: Any, v: Tensor, tensors: list[Tensor], grad_w: Tensor, grad_log_det: Tensor
) -> tuple[Tensor | None, ...]:
    """The same derivatives through D plain passes, so that they can be differentiated again."""
    inputs = (v, *tensors)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    plan = Plan.of(ctx.made, tensors[: ctx.layers], tensors[ctx.layers :])
    results = unrolled.solve(plan, ctx.direction, v)
    found = iter(torch.autograd.grad(results, wanted, (grad_w, grad_log_det), create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
