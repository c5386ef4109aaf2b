"""Layers by plain operations of torch, for any device, dtype and univariate map: they define correctness."""

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

from pyro_maf._core.torch_state import is_exported, is_traced
from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.nn.weights import is_called, own_tensors, walk_by_calls
from pyro_maf.sweep.layout import Step, Triangular
from pyro_maf.sweep.torch_engine.sweep import Activations, Direction, Plan, TorchSweep, lay_back, tensors_of
from pyro_maf.univariate import Affine

__all__ = ["at_once", "gradients", "one_by_one", "parallel", "solve", "takes_triton", "together", "triangular"]


def solve(step: Step, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""The sequential direction of an autoregressive layer: w_i = f(v_i; phi_i(w_<i)).

    Args:
        step: The layer.
        v: The input, (\*batch, D).
        context: (\*batch or (), context_dim), or None.

    Returns:
        w, (\*batch, D), and the sum over i of log dy_i/dx_i, (\*batch,).

    Cost: one pass through the non-zero half of the network's weights, and as much again for the gradient, whatever D.
    """
    made: Any = step.networks[0]
    if own_tensors(made) is None and is_called(made):
        return _by_calls(step, v, context)
    if context is not None:
        v, context = together(v, context)
    rows = v if v.dim() == 2 else v.reshape(-1, made.input_dim)
    tensors = tensors_of(made, context)
    if is_traced() or (torch.is_grad_enabled() and is_exported()):  # what is exported cannot hold the sweep's adjoint
        w, log_derivatives = one_by_one(step, rows, None, iter(tensors))
        log_det = log_derivatives.sum(-1)
    else:
        w, log_det = _Sweep.apply(step, rows, *tensors)
    return (w, log_det) if rows is v else (w.reshape(v.shape), log_det.reshape(v.shape[:-1]))


def parallel(step: Step, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The parallel direction, w_i = f(v_i; phi_i(v_<i)). Arguments and results are those of `solve`."""
    made: Any = step.networks[0]
    is_plain = own_tensors(made) is not None or not is_called(made)
    phi = made.parameters_of(v, context) if is_plain else made(v, context)
    w, log_derivative = direction_of(step)(v, phi)
    return w, log_derivative.sum(-1)


def direction_of(step: Step) -> Direction:
    """The direction of its univariate map in which a layer is applied."""
    univariate: Any = step.univariate
    return univariate.inverse if step.inverse else univariate.forward


def together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast v to the common batch shape, and a batched context to one row for each row of v."""
    batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
    if context.dim() > 1:
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    return v.expand(*batch, v.shape[-1]), context


def _by_calls(step: Step, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Solve by calls of the network, which run hooks and user-defined modules. Cost: D calls."""
    made: Any = step.networks[0]
    direction = direction_of(step)
    if context is not None:
        v, context = together(v, context)
    rows = v.reshape(-1, made.input_dim)
    given = rows[:, made.order].T
    log_derivatives: list[Tensor] = []

    def mapped(i: int, parameters: Tensor) -> Tensor:
        value, log_derivative = direction(given[i], parameters.T)
        log_derivatives.append(log_derivative)
        return value

    w = walk_by_calls(made, mapped, context, rows, len(rows))
    return w.reshape(v.shape), torch.stack(log_derivatives).sum(0).reshape(v.shape[:-1])


class _Sweep(torch.autograd.Function):
    """The sequential direction, with its adjoint as the backward."""

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
        if torch.is_grad_enabled():  # by passes, so that they can be differentiated again

            def passes(v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                w, log_derivatives = one_by_one(ctx.step, v, None, iter(tensors))
                return w, log_derivatives.sum(-1)

            return None, *gradients(passes, [v, *tensors], ctx.needs_input_grad[1:], (grad_w, grad_log_det))
        grad_v, by_weights, by_units = ctx.engine.adjoint(v, w, activations, grad_w, grad_log_det)
        return None, grad_v, *lay_back(ctx.step.networks[0], by_weights, by_units, tensors)


def _engine(step: Step, tensors: Sequence[Tensor], v: Tensor) -> TorchSweep:
    """The fastest sweep of a layer with these weights and biases."""
    made: Any = step.networks[0]
    plan, direction = Plan.of(made, tensors), direction_of(step)
    if not takes_triton(step, v):
        return TorchSweep(plan, direction)
    from pyro_maf.sweep.torch_engine.triton import TritonSweep

    return TritonSweep(plan, direction, made, step.inverse)


def takes_triton(step: Step, v: Tensor) -> bool:
    """Return whether there are Triton kernels for a layer's univariate map, device and dtype."""
    return type(step.univariate) is Affine and v.is_cuda and v.dtype == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    """Return whether there is a Triton that the tests compile the kernels with; torch 2.6 brings the first."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return TorchVersion(triton.__version__) >= TorchVersion("3.2")


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients with respect to the inputs that need one; in grad mode they can be differentiated again.

    Args:
        function: Function of the inputs, by operations that can be differentiated.
        inputs: Tensors, or None.
        needed: Whether the gradient with respect to each is.
        grads: Gradients with respect to the results.
    """
    with torch.enable_grad():
        # As views: one input may depend on another, and the gradient through that is not the function's.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        results = function(*inputs)
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    # Of one variable, the log-determinant may depend on nothing that is wanted.
    pairs = [pair for pair in zip(results, grads, strict=True) if pair[0].requires_grad]
    outputs, by_outputs = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, wanted, by_outputs, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


def at_once(step: Step, v: Tensor, context: Tensor | None, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """A layer in its parallel direction: its output and log-derivatives."""
    is_made = isinstance(step.networks[0], MADE)
    seen, moved = (v, v) if is_made else (v[:, step.seen], v[:, step.moved])
    outputs = torch.cat([_outputs(network, seen, context, tensors) for network in step.networks], -1)
    size = moved.shape[1], step.univariate.num_parameters  # type: ignore[union-attr]
    phi = outputs.unflatten(-1, size) if is_made else outputs.unflatten(-1, size[::-1]).mT
    moved, log_derivative = direction_of(step)(moved, phi)
    return moved if is_made else v.index_copy(-1, step.moved, moved), log_derivative


def one_by_one(step: Step, v: Tensor, context: Tensor | None, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """A layer in its sequential direction, by D passes."""
    network: Any = step.networks[0]
    each = 2 if context is None or not len(network.context_layers) else 3
    used = list(itertools.islice(tensors, each * len(network.layers)))
    order, place = step.moved, step.moved.argsort()  # by positions, as an exported program has no constants of tensors
    given, columns, logs = v[:, order], [torch.zeros_like(v[:, 0])] * v.shape[1], []
    for i in range(v.shape[1]):
        outputs = _outputs(network, torch.stack(columns, -1)[:, place], context, iter(used))
        phi = outputs.unflatten(-1, (v.shape[1], -1))[:, order]
        columns[i], log_derivative = direction_of(step)(given[:, i], phi[:, i])
        logs.append(log_derivative)
    return torch.stack(columns, -1)[:, place], torch.stack(logs, -1)


def triangular(step: Triangular, v: Tensor, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """A triangular layer: its output, and its log-determinant, for all points the same."""
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
        x = x @ weight.T + bias  # which may differ from row to row
        if context is not None and len(network.context_layers):
            x = x + F.linear(context, next(tensors))
        if index < len(network.layers) - 1:
            x = ACTIVATIONS[network.activation](x)
    return x
