"""Layers by torch operations, for any device, dtype and univariate map; they define correctness.

The parallel direction is a call of the network. The sequential direction is a sweep or, where that cannot be traced or
differentiated again, D calls.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from pyro_maf._core.torch_state import gradients, is_exported, is_traced
from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.nn.layers import block_linear
from pyro_maf.nn.weights import is_called, walk_by_calls
from pyro_maf.sweep.layout import Step, Triangular
from pyro_maf.sweep.torch_engine.sweep import Activations, Direction, Plan, TorchSweep, lay_back, tensors_of
from pyro_maf.univariate import Affine

__all__ = ["at_once", "one_by_one", "parallel", "solve", "together", "triangular"]


def solve(step: Step, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""The sequential direction of an autoregressive layer, w_i = f(v_i; phi_i(w_<i)), and sum_i log dy_i/dx_i.

    v and w are (\*batch, D), the context (\*batch or (), context_dim), the log-determinant (\*batch,).

    Cost: one pass through the unmasked half of the network's weights, and as much again for the gradient, for any D.
    """
    made: Any = step.networks[0]
    if context is not None:
        v, context = together(v, context)
    rows = v if v.dim() == 2 else v.reshape(-1, made.input_dim)
    if is_called(made):
        w, log_derivatives = _one_by_one(step, rows, lambda known: made(known, context))
        return w.reshape(v.shape), log_derivatives.sum(-1).reshape(v.shape[:-1])
    tensors = tensors_of(made, context)
    if is_traced() or (torch.is_grad_enabled() and is_exported()):  # an exported program cannot hold the adjoint
        w, log_derivatives = one_by_one(step, rows, None, iter(tensors))
        log_det = log_derivatives.sum(-1)
    else:
        w, log_det = _Sweep.apply(step, rows, *tensors)
    return (w, log_det) if rows is v else (w.reshape(v.shape), log_det.reshape(v.shape[:-1]))


def parallel(step: Step, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The parallel direction, w_i = f(v_i; phi_i(v_<i)). Arguments and results are as in `solve`."""
    made: Any = step.networks[0]
    phi = made(v, context) if is_called(made) else made.parameters_of(v, context)
    w, log_derivative = _direction_of(step)(v, phi)
    return w, log_derivative.sum(-1)


def _direction_of(step: Step) -> Direction:
    """The direction of the univariate map in which a layer is applied."""
    univariate: Any = step.univariate
    return univariate.inverse if step.inverse else univariate.forward


def together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast v to the common batch shape, and a batched context to one row for each row of v."""
    if context.dim() > 1 and context.shape[:-1] != v.shape[:-1]:  # rarely, but checked at every call
        batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
        v, context = v.expand(*batch, -1), context.expand(*batch, -1)
    return v, context.reshape(-1, context.shape[-1]) if context.dim() > 1 else context


class _Sweep(torch.autograd.Function):
    """The sequential direction; the backward pass is its adjoint."""

    @staticmethod
    def forward(ctx: Any, step: Step, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        engine = _engine(step, tensors, v)
        w, log_det, activations = engine.forward(v)
        ctx.step, ctx.engine, ctx.count = step, engine, len(tensors)
        ctx.save_for_backward(v, w, *tensors, *activations)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, w, *saved = ctx.saved_tensors
        tensors, activations = saved[: ctx.count], Activations(*saved[ctx.count :])
        if torch.is_grad_enabled():  # by D passes, which can be differentiated again

            def passes(v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                w, log_derivatives = one_by_one(ctx.step, v, None, iter(tensors))
                return w, log_derivatives.sum(-1)

            return None, *gradients(passes, [v, *tensors], ctx.needs_input_grad[1:], (grad_w, grad_log_det))
        grad_v, by_weights, by_units, by_head = ctx.engine.adjoint(v, w, activations, grad_w, grad_log_det)
        return None, grad_v, *lay_back(ctx.step.networks[0], by_weights, by_units, by_head, tensors)


def _engine(step: Step, tensors: Sequence[Tensor], v: Tensor) -> TorchSweep:
    """The fastest sweep for a layer with these weights and biases."""
    made: Any = step.networks[0]
    plan, direction = Plan.of(made, tensors), _direction_of(step)
    has_kernels = type(step.univariate) is Affine and plan.head is None and v.dtype == torch.float32
    if not (has_kernels and v.is_cuda and _has_triton()):
        return TorchSweep(plan, direction)
    from pyro_maf.sweep.torch_engine.triton import TritonSweep

    return TritonSweep(plan, direction, made, step.inverse)


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton is installed in a version for which the kernels are tested; torch 2.6 brings the first."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return TorchVersion(triton.__version__) >= TorchVersion("3.2")


def at_once(step: Step, v: Tensor, context: Tensor | None, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Apply a layer in its parallel direction; return its output and log-derivatives."""
    is_made = isinstance(step.networks[0], MADE)
    seen, moved = (v, v) if is_made else (v[:, step.seen], v[:, step.moved])
    phi = torch.cat([_outputs(network, seen, context, tensors) for network in step.networks], -1)
    if not is_made:
        phi = phi.unflatten(-1, (-1, moved.shape[1])).mT
    moved, log_derivative = _direction_of(step)(moved, phi)
    return moved if is_made else v.index_copy(-1, step.moved, moved), log_derivative


def one_by_one(step: Step, v: Tensor, context: Tensor | None, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Apply a layer in its sequential direction, by D passes; return its output and log-derivatives."""
    network: Any = step.networks[0]
    each = 2 if context is None or not len(network.context_layers) else 3
    used = list(itertools.islice(tensors, each * len(network.layers) + 2 * (network.head is not None)))

    def outputs(partial: Tensor) -> Tensor:
        return _outputs(network, partial, context, iter(used))

    return _one_by_one(step, v, outputs)


def _one_by_one(step: Step, v: Tensor, outputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Solve for w given v, (batch, D), by D calls of a network; return w and log-derivatives."""
    direction, order = _direction_of(step), step.moved
    given, logs = v[:, order], []

    def mapped(i: int, parameters: Tensor) -> Tensor:
        value, log_derivative = direction(given[:, i], parameters.T)
        logs.append(log_derivative)
        return value

    w = walk_by_calls(order, outputs, mapped, v[:, 0])
    return w, torch.stack(logs, -1)


def triangular(step: Triangular, v: Tensor, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Apply a triangular layer; return its output and its log-determinant, the same for all points."""
    dim = v.shape[1]
    loc, log_scale, *matrix = step.parts(list(itertools.islice(tensors, len(step.tensors))), dim)
    factor = log_scale.exp().diag()
    for below in matrix:
        if below.dim() == 1:
            rows, columns = torch.tril_indices(dim, dim, -1)
            below = torch.zeros_like(factor).index_put((rows, columns), below)
        factor = factor + step.gain * below.tril(-1)
    if step.inverse:
        return torch.linalg.solve_triangular(factor, (v - loc).T, upper=False).T, log_scale.sum()
    return v @ factor.T + loc, log_scale.sum()


def _outputs(network: Any, x: Tensor, context: Tensor | None, tensors: Iterator[Tensor]) -> Tensor:
    x = compress_tails(x)
    for index, layer in enumerate(network.layers):
        weight, bias = next(tensors), next(tensors)
        weight = weight * layer.mask if hasattr(layer, "mask") else getattr(layer, "gain", 1.0) * weight
        x = x @ weight.T + bias  # the bias may differ from row to row
        if context is not None and len(network.context_layers):
            x = x + F.linear(context, next(tensors))
        if index < len(network.layers) - 1:
            x = ACTIVATIONS[network.activation](x)
    if not isinstance(network, MADE):
        return x
    x = x.unflatten(-1, (network.input_dim, -1))
    return x if network.head is None else block_linear(x, next(tensors), next(tensors))
