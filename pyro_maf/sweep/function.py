"""A run of layers as one differentiable operation compiled for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf._core.torch_state import is_intercepted
from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.sweep.layout import Step
from pyro_maf.sweep.loading import kernels, loaded
from pyro_maf.sweep.plan import Array, together
from pyro_maf.sweep.program import Pack, Program, Reading, program_of
from pyro_maf.sweep.threads import in_parts

__all__ = ["run"]

DTYPES = (torch.float32, torch.float64)
WEIGHTS_A_POINT = 2**21
"""Number of weights above which packing them and their gradients takes longer than torch does in all: at one point, a
training step of five layers of 784 variables and 1,024 units takes torch 32 ms, and the program 100."""


def run(
    owner: nn.Module, place: object, steps: Sequence[Step], v: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    r"""The layers in turn, or None where the compiled program does not apply and torch does.

    Args:
        owner: The flow that the layers belong to.
        place: Which of its runs this is.
        steps: The layers, the one that is applied first first; at least one with a network.
        v: (\*batch, D).
        context: (\*batch or (), context_dim), or None.

    Returns:
        The last layer's output, (\*batch, D), and the sum of the log-determinants, (\*batch,).
    """
    if is_intercepted() or v.dtype not in DTYPES:
        return None
    reading = Reading.of(steps)
    if reading is None or not Reading([], [], [v, *reading.tensors]).is_uniform(v):
        return None
    if kernels() is None:  # asked last, since it loads or compiles them: a flow of splines never needs them
        return None
    program = program_of(owner, place, steps, reading)
    if program is None:
        return None
    context = context if program.context_dim else None
    if not program.fits(v, context):
        return None  # where an error names what is wrong
    if context is not None:
        v, context = together(v, context)
    rows = v if v.dim() == 2 else v.reshape(-1, program.dim)
    if context is not None and context.dim() == 1:
        context = context.expand(len(rows), -1)
    inputs = [rows, *reading.tensors] if context is None else [rows, context, *reading.tensors]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        if program.num_weights > WEIGHTS_A_POINT * len(rows) and not any(step.sequential for step in steps):
            return None
        w, log_det = _Run.apply(program, steps, rows, context, *reading.tensors)
    else:
        w, log_det = _forward(program, program.remembered(reading.tensors), rows, context, None)
    return (w, log_det) if rows is v else (w.reshape(v.shape), log_det.reshape(v.shape[:-1]))


class _Run(torch.autograd.Function):
    """The layers, with the walk back as the backward."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, steps: Sequence[Step], v: Tensor, context: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Not the pack of an earlier call: gradcheck, for one, writes through `.data`, which no version counter records.
        pack = program.pack(tensors)
        chunk = program.chunk_of(len(v))
        tape = v.new_empty(-(-len(v) // chunk) * program.rows, chunk)
        w, log_det = _forward(program, pack, v, context, tape)
        ctx.program, ctx.steps, ctx.leading = program, steps, 1 if context is None else 2
        ctx.save_for_backward(pack.weights, tape, *([v] if context is None else [v, context]), *tensors)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        weights, tape, *inputs = ctx.saved_tensors
        v, context, tensors = inputs[0], inputs[1] if ctx.leading == 2 else None, inputs[ctx.leading :]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or is_intercepted():
            return None, None, *_by_plain_operations(ctx.steps, v, context, tensors, needed, (grad_w, grad_log_det))
        return None, None, *_backward(ctx.program, weights, tape, tensors, needed, grad_w, grad_log_det)


def _forward(
    program: Program, pack: Pack, v: Tensor, context: Tensor | None, tape: Tensor | None
) -> tuple[Tensor, Tensor]:
    """w, (batch, D), and log-determinants of v (batch, D); fills the tape, if there is one."""
    v = v.detach().contiguous()
    w, log_det, tables, rows = torch.empty_like(v), v.new_empty(len(v)), program.tables, v.numpy()
    features = np.empty((len(v), 0), rows.dtype) if context is None else context.detach().contiguous().numpy()
    network = (
        rows,
        features,
        pack.weights.numpy(),
        pack.biases.numpy(),
        tables.layers,
        tables.matrices,
        tables.variables,
        tables.seen,
        tables.steps,
        tables.result,
        program.rows,
    )
    chunk = program.chunk_of(len(v))
    results = np.empty((0, chunk), rows.dtype) if tape is None else tape.numpy(), w.numpy(), log_det.numpy()

    def walk(first: int, end: int) -> None:
        loaded().parallel.forward(*network, first, end, program.few, *results)

    in_parts(walk, len(v), chunk, program.work)
    return w, log_det


def _backward(
    program: Program,
    weights: Tensor,
    tape: Tensor,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad_w: Tensor,
    grad_log_det: Tensor,
) -> list[Tensor | None]:
    """Gradients with respect to v, the context and the tensors; None where not needed."""
    tables, points = program.tables, len(grad_w)
    of_tensors = np.array(needed[2:])
    wanted = of_tensors[tables.matrices["weight"]] | of_tensors[tables.matrices["addend"]]
    grad_v = grad_w.new_empty(points, program.dim if needed[0] else 0)
    grad_context = grad_w.new_empty(points, program.context_dim if needed[1] else 0)
    network = (
        weights.numpy(),
        tables.layers,
        tables.matrices,
        tables.variables,
        tables.seen,
        tables.heard,
        tables.steps,
        tables.result,
    )
    results = [tensor.contiguous().numpy() for tensor in (tape, grad_w, grad_log_det)]
    results += grad_v.numpy(), grad_context.numpy()

    def walk(first: int, end: int) -> tuple[Array, Array]:
        gradients, by_biases = program.room_for_gradients(grad_w)
        loaded().parallel.backward(*network, wanted, program.rows, first, end, *results, gradients, by_biases)
        return gradients, by_biases

    parts = in_parts(walk, points, tape.shape[1], program.work)
    by_tensors = _unpacked(program, parts, tensors) if wanted.any() else tensors
    program.room += parts
    every = [grad_v, grad_context, *by_tensors]
    return [gradient if need else None for gradient, need in zip(every, needed, strict=True)]


def _unpacked(program: Program, parts: Sequence[tuple[Array, Array]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with respect to the tensors, views of one."""
    tables, flat = program.tables, (tensors[0].new_empty if parts else tensors[0].new_zeros)(program.offsets[-1])
    with np.errstate(all="ignore"):  # entries that no row sees are arbitrary
        for others in parts[1:]:
            for total, other in zip(parts[0], others, strict=True):
                total += other
    if parts:
        orders = tables.seen, tables.row_order, tables.column_order
        loaded().parallel.unpack(tables.matrices, *orders, program.offsets, *parts[0], flat.numpy())
    return [own.view_as(tensor) for own, tensor in zip(flat.split_with_sizes(program.sizes), tensors, strict=True)]


def _by_plain_operations(
    steps: Sequence[Step],
    v: Tensor,
    context: Tensor | None,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor, Tensor],
) -> list[Tensor | None]:
    """The same gradients by plain operations, which can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        results = _plain(steps, v, context, tensors)
    inputs = [v, context, *tensors]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(results, wanted, grads, create_graph=again, allow_unused=True))  # type: ignore[arg-type]
    return [next(gradients) if need else None for need in needed]


def _plain(
    steps: Sequence[Step], v: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The layers in turn by plain operations, with these tensors as the networks' own."""
    every, total = iter(tensors), v.new_zeros(len(v))
    for step in steps:
        if step.univariate is None:
            v = v[:, step.moved]
            continue
        is_made = isinstance(step.networks[0], MADE)
        seen, moved = (v, v) if is_made else (v[:, step.seen], v[:, step.moved])
        outputs = torch.cat([_outputs(network, seen, context, every) for network in step.networks], -1)
        size = moved.shape[1], step.univariate.num_parameters
        phi = outputs.unflatten(-1, size) if is_made else outputs.unflatten(-1, size[::-1]).mT
        direction = step.univariate.inverse if step.inverse else step.univariate.forward
        moved, log_derivative = direction(moved, phi)
        v = moved if is_made else v.index_copy(-1, step.moved, moved)
        total = total + step.log_sign * log_derivative.sum(-1)
    return v, total


def _outputs(network: Any, x: Tensor, context: Tensor | None, tensors: Any) -> Tensor:
    x = compress_tails(x)
    for index, layer in enumerate(network.layers):
        weight, bias = next(tensors), next(tensors)
        x = F.linear(x, weight * layer.mask if hasattr(layer, "mask") else getattr(layer, "gain", 1.0) * weight, bias)
        if len(network.context_layers):
            x = x + F.linear(context, next(tensors))  # type: ignore[arg-type]
        if index < len(network.layers) - 1:
            x = ACTIVATIONS[network.activation](x)
    return x
