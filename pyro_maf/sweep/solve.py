"""The sequential direction as one differentiable operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_maf.nn import MADE
from pyro_maf.sweep.plan import Plan, ScalarMap
from pyro_maf.sweep.reference import Activations, adjoint, sweep
from pyro_maf.sweep.unrolled import unrolled

__all__ = ["solve"]


def solve(made: MADE, scalar_map: ScalarMap, v: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Solve w_i = f(v_i; phi_i(w_<i)), with phi_i the outputs of `made` for variable i.

    Args:
        made: The network, with as many outputs per input as f has parameters.
        scalar_map: f: (v_i, \*phi_i) to (w_i, log dw_i/dv_i or its negative), elementwise.
        v: What is given, (\*batch, D).
        context: (\*batch or (), context_dim), or None.

    Returns:
        w, (\*batch, D), and the sum over i of the map's logs, (\*batch,).

    Cost: one pass through the non-zero half of the network's weights, and as much again for the gradient, whatever D.
    """
    if context is not None:
        batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
        v = v.expand(*batch, v.shape[-1])
        context = context if context.dim() == 1 else context.expand(*batch, -1).reshape(-1, context.shape[-1])
    plan = Plan.of(made, context)
    columns = v.reshape(-1, made.input_dim)[:, made.order].T.contiguous()
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        w, logs = unrolled(plan, scalar_map, columns)
        log_det = logs.sum(0)
    else:
        w, log_det = _Solve.apply(plan, scalar_map, columns, *plan.weights, *plan.biases)
    w = w.T[:, made.order.argsort()]
    return w.reshape(v.shape), log_det.reshape(v.shape[:-1])


class _Solve(torch.autograd.Function):
    """The sweep, with its adjoint as the backward."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, scalar_map: ScalarMap, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        solved = sweep(plan, lambda i, parameters: scalar_map(v[i], *parameters)[0], v.shape[1])
        log_det = scalar_map(v, *solved.parameters.unbind(1))[1].sum(0)
        ctx.ready, ctx.activation, ctx.scalar_map = plan.ready, plan.activation, scalar_map
        ctx.save_for_backward(v, *tensors, solved.w, solved.parameters, *solved.before)
        return solved.w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, *saved = ctx.saved_tensors
        layers = len(ctx.ready) + 1
        plan = Plan(tuple(saved[:layers]), tuple(saved[layers : 2 * layers]), ctx.ready, ctx.activation)
        if torch.is_grad_enabled():
            return None, None, *_differentiable(plan, ctx.scalar_map, v, grad_w, grad_log_det)
        w, parameters, *before = saved[2 * layers :]
        solved = Activations(w, parameters, before)
        grad_v, grad_weights, grad_biases = adjoint(plan, ctx.scalar_map, v, solved, grad_w, grad_log_det)
        return None, None, grad_v, *grad_weights, *grad_biases


def _differentiable(
    plan: Plan, scalar_map: ScalarMap, v: Tensor, grad_w: Tensor, grad_log_det: Tensor
) -> tuple[Tensor | None, ...]:
    """The same derivatives through D plain passes, so that they can be differentiated again."""
    inputs = (v, *plan.weights, *plan.biases)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    w, logs = unrolled(plan, scalar_map, v)
    found = iter(
        torch.autograd.grad((w, logs.sum(0)), wanted, (grad_w, grad_log_det), create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
