"""The sequential direction as one differentiable operation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_maf.nn import MADE
from pyro_maf.sweep import compiled
from pyro_maf.sweep.pack import pack
from pyro_maf.sweep.plan import Direction, Plan
from pyro_maf.sweep.reference import TorchSweep
from pyro_maf.sweep.scalar import ScalarMap
from pyro_maf.sweep.unrolled import unrolled

__all__ = ["solve"]


class Engine(Protocol):
    """What carries out a sweep and its adjoint."""

    def sweep(self, plan: Plan, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        """w, log-determinant and a tuple of tensors for the adjoint, for v (batch, D)."""
        ...

    def adjoint(
        self, plan: Plan, v: Tensor, w: Tensor, kept: Any, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Derivatives of <grad_w, w> + <grad_log_det, log_det> by v, the plan's weights and its biases."""
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
    if context is not None:
        batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
        v = v.expand(*batch, v.shape[-1])
        context = context if context.dim() == 1 else context.expand(*batch, -1).reshape(-1, context.shape[-1])
    w, log_det = _solve_rows(made, scalar, v.reshape(-1, made.input_dim), context, inverse)
    return w.reshape(v.shape), log_det.reshape(v.shape[:-1])


def _solve_rows(
    made: MADE, scalar: ScalarMap, v: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    direction = scalar.inverse if inverse else scalar.forward
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return unrolled(Plan.of(made, context), direction, v)
    by_kernel, sign = compiled.takes(scalar, v), -1 if inverse else 1
    if by_kernel and not _needs_gradient(made, v, context):
        return compiled.evaluate(made, v, context, sign)
    plan = Plan.of(made, context)
    engine: Engine = compiled.KernelSweep(pack(plan), sign) if by_kernel else TorchSweep(direction)
    return _Solve.apply(engine, plan, direction, v, *plan.weights, *plan.biases)


def _needs_gradient(made: MADE, v: Tensor, context: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (
        v.requires_grad
        or (context is not None and context.requires_grad)
        or any(parameter.requires_grad for parameter in made.parameters())
    )


class _Solve(torch.autograd.Function):
    """The sweep, with its adjoint as the backward."""

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, plan: Plan, direction: Direction, v: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        w, log_det, kept = engine.sweep(plan, v)
        ctx.engine, ctx.direction, ctx.kind_of_kept = engine, direction, type(kept)
        ctx.layout = plan._replace(weights=(), biases=())
        ctx.save_for_backward(v, w, *tensors, *kept)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, w, *saved = ctx.saved_tensors
        layers = len(ctx.layout.ready) + 1
        plan = ctx.layout._replace(weights=tuple(saved[:layers]), biases=tuple(saved[layers : 2 * layers]))
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(plan, ctx.direction, v, grad_w, grad_log_det)
        kept = ctx.kind_of_kept(*saved[2 * layers :])
        grad_v, grad_weights, grad_biases = ctx.engine.adjoint(plan, v, w, kept, grad_w, grad_log_det)
        return None, None, None, grad_v, *grad_weights, *grad_biases


def _differentiable(
    plan: Plan, direction: Direction, v: Tensor, grad_w: Tensor, grad_log_det: Tensor
) -> tuple[Tensor | None, ...]:
    """The same derivatives through D plain passes, so that they can be differentiated again."""
    inputs = (v, *plan.weights, *plan.biases)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    solved = unrolled(plan, direction, v)
    found = iter(torch.autograd.grad(solved, wanted, (grad_w, grad_log_det), create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
