"""A run of layers as one differentiable operation, compiled for CPUs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from pyro_maf._core.memory_pool import empty
from pyro_maf._core.torch_state import gradients, is_intercepted
from pyro_maf.sweep.builder import UnfitError
from pyro_maf.sweep.kernels import kernels, loaded
from pyro_maf.sweep.layout import Array, Step, Triangular
from pyro_maf.sweep.program import Pack, Program, Programs, Reading, is_ordinary
from pyro_maf.sweep.threads import in_parts
from pyro_maf.sweep.torch_engine.layers import at_once, one_by_one, together, triangular

__all__ = ["Run", "add_up", "run"]

DTYPES = (torch.float32, torch.float64)


class Run(NamedTuple):
    """A run of layers as a program, with the tensors that it reads.

    Attributes:
        program: The compiled layout of the layers.
        steps: The layers, in the order in which they are applied.
        tensors: Parameters of their networks, with the same dtype, on the CPU.
    """

    program: Program
    steps: Sequence[Step | Triangular]
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, programs: Programs, place: object, steps: Sequence[Step | Triangular], dim: int) -> Run | None:
        """The layers in their current state, at least one of them with a network, or None if torch has to apply them.

        `programs` are those of the flow that the layers belong to; `place` identifies the run among them.
        """
        reading = Reading.of(steps)
        if reading is None or reading.tensors[0].dtype not in DTYPES or not reading.is_uniform():
            return None
        program = programs.get(place)
        if program is None or not program.reading.holds_for(reading):
            context_dim = max(network.context_dim for step in steps for network in step.networks)  # type: ignore[type-var]
            try:
                program = programs[place] = Program(reading, steps, dim, context_dim)  # type: ignore[arg-type]
            except UnfitError:
                return None
        return cls(program, steps, reading.tensors)

    def __call__(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        r"""Return the output and the sum of the log-determinants, (\*batch,), or None if torch has to apply the layers.

        Input and output are (\*batch, D), the context (\*batch or (), context_dim).
        """
        return self._through(v, context, None)

    def log_density(self, v: Tensor, context: Tensor | None, constant: float) -> Tensor | None:
        r"""`constant` - |w|^2 / 2 - log-determinant, (\*batch,), for the output w; or None, as `__call__`.

        Up to the constant, this is the log-density of v if its noise w is standard normal. It is a single graph node.
        """
        density: Tensor | None = self._through(v, context, constant)
        return density

    def _through(self, v: Tensor, context: Tensor | None, constant: float | None) -> Any:
        """Return the log-density if there is a constant, otherwise the pair."""
        if (inputs := self.inputs(v, context)) is None:
            return None
        rows, features, needs_gradient = inputs
        if needs_gradient:
            features = None if features is None else unwrap_if_dead(features)
            result = _apply(self, constant, unwrap_if_dead(rows), features, *self.tensors)
        else:
            if features is not None and features.stride(0) == 0:
                features = features[:1]  # the kernels accept a single row for all points
            pack = self.program.remembered(self.tensors)
            result = _result(constant, *_forward(self.program, pack, rows, features, constant))
        if rows is v:
            return result
        batch = v.shape[:-1]
        if features is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])  # type: ignore[union-attr]
        if constant is not None:
            return result.reshape(batch)
        return result[0].reshape(*batch, v.shape[-1]), result[1].reshape(batch)

    def inputs(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, bool] | None:
        """v and context as rows, (batch, D) and (batch, context_dim), and whether a gradient is needed.

        None if torch has to apply the layers.
        """
        program, tensors = self.program, self.tensors
        if not is_ordinary(v, tensors[0].dtype):
            return None
        context = context if program.context_dim else None
        if not program.fits(v, context):
            return None  # torch then raises an error that names the problem
        if kernels() is None:  # checked last, since it loads or compiles them
            return None
        if context is not None:
            v, context = together(v, context)
        rows = v if v.dim() == 2 else v.reshape(-1, program.dim)
        if context is not None and context.dim() == 1:
            context = context.expand(len(rows), -1)
        inputs = (rows, *tensors) if context is None else (rows, context, *tensors)
        return rows, context, torch.is_grad_enabled() and any(map(_requires_grad, inputs))


_requires_grad = operator.attrgetter("requires_grad")


def run(
    programs: Programs, place: object, steps: Sequence[Step | Triangular], dim: int, v: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Apply the layers in turn, as a `Run`, or return None if torch has to apply them."""
    if is_intercepted():
        return None
    ready = Run.of(programs, place, steps, dim)
    return None if ready is None else ready(v, context)


class _Layers(torch.autograd.Function):
    """The layers, or the log-density of their standard normal noise; the backward pass is the walk back."""

    @staticmethod
    def forward(ctx: Any, run: Run, constant: float | None, v: Tensor, context: Tensor | None, *tensors: Tensor) -> Any:
        w, log_det, saved = _recorded(run, v, context, tensors, constant)
        ctx.run, ctx.constant = run, constant
        ctx.save_for_backward(*saved, *(() if constant is None else (w,)))
        return _result(constant, w, log_det)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, saved, is_density = ctx.needs_input_grad[2:], ctx.saved_tensors, ctx.constant is not None
        saved, noise = saved[: 2 + len(needed)], saved[-1]
        if torch.is_grad_enabled() or is_intercepted():
            plain = partial(_plain, ctx.run.steps, is_density)
            return None, None, *gradients(plain, saved[2:], needed, grads)
        arrays = [grad.contiguous().numpy() for grad in grads]
        w, factors = (noise.numpy(), *arrays) if is_density else arrays
        return None, None, *_backward(ctx.run.program, saved, needed, w, factors, is_density)


# Bypasses a check of each parameter for leftovers of torch.func.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Layers).apply


def _result(constant: float | None, w: Tensor, log_det: Tensor) -> Any:
    """Results of `_forward`: w and log-determinants, or only log-densities."""
    return (w, log_det) if constant is None else log_det


def _recorded(
    run: Run, v: Tensor, context: Tensor | None, tensors: Sequence[Tensor], constant: float | None
) -> tuple[Tensor, Tensor, list[Any]]:
    """Results of `_forward`, and what `_backward` reads: packed weights, tape, v, context and the tensors."""
    # Not the pack of an earlier call: gradcheck, for example, writes through `.data`, which no version counter records.
    program, points = run.program, v.shape[0]
    pack, chunk = program.pack(tensors), program.chunk_of(points)
    rows = -(-points // chunk) * program.rows
    tape = empty(rows * chunk, v).view(rows, chunk)
    w, log_det = _forward(program, pack, v, context, constant, tape)
    return w, log_det, [pack.memory, tape, v, context, *tensors]


def _forward(
    program: Program, pack: Pack, v: Tensor, context: Tensor | None, constant: float | None, tape: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w, (batch, D), and log-determinants, or log-densities, for v (batch, D); fills the tape, if there is one."""
    v, points = (v.detach() if v.requires_grad else v).contiguous(), v.shape[0]
    w, log_det, rows = torch.empty_like(v), v.new_empty(points), v.numpy()
    if tape is None:  # for a single point, sums over each row take half the time of products of padded rows
        results = np.empty((0, 1 if points == 1 else program.chunk_of(points)), rows.dtype)
    else:
        results = tape.numpy()
    features = rows[:, :0] if context is None else context.detach().contiguous().numpy()
    network = program.tables, (pack.weights, pack.biases), (rows, features), program.rows
    outputs, addend = (w.numpy(), log_det.numpy()), math.nan if constant is None else constant

    def walk(first: int, end: int) -> None:
        loaded().forward(*network, first, end, addend, results, outputs)

    in_parts(walk, points, results.shape[1], program.work)
    return w, log_det


def _backward(
    program: Program,
    saved: Sequence[Tensor],
    needed: Sequence[bool],
    grad_w: Array,
    grad_log_det: Array,
    of_density: bool,
) -> list[Tensor | None]:
    """Gradients w.r.t. v, the context and the tensors; None where not needed. For `saved` see `_recorded`."""
    of_v, of_context, *of_tensors = needed
    pack, tape, v, context, *tensors = saved
    wanted, has_all = program.every_matrix, all(of_tensors)
    if not has_all:
        is_needed, matrices = np.array(of_tensors), program.tables.matrices
        wanted = is_needed[matrices["weight"]] | is_needed[matrices["addend"]]
    grad_v = v.new_empty(v.shape) if of_v else None
    grad_context = context.new_empty(context.shape) if of_context else None
    nothing = grad_w[:, :0]
    memory = empty(program.shift + program.num_weights, pack)
    flat, network = memory.numpy(), (program.tables, pack.numpy(), program.rows)
    by_inputs = nothing if grad_v is None else grad_v.numpy(), nothing if grad_context is None else grad_context.numpy()
    arrays = tape.numpy(), (grad_w, grad_log_det), of_density, by_inputs

    def walk(first: int, end: int) -> tuple[Array, Array]:
        # The gradients of the first part are stored behind those of the tensors.
        gradients = program.room_for_gradients(pack, None if first else flat[program.shift :])
        loaded().backward(*network, first, end, *arrays, gradients, wanted, False)
        return gradients

    parts = in_parts(walk, len(grad_w), tape.shape[1], 2 * program.work)
    if not any(of_tensors):
        return [grad_v, grad_context, *[None] * len(tensors)]
    unpack(program, parts, flat[: program.size])
    by_tensors = list(memory.split_with_sizes(program.sizes)[:-1])
    for place in program.of_weights:
        by_tensors[place] = by_tensors[place].view_as(tensors[place])
    if has_all:
        return [grad_v, grad_context, *by_tensors]
    needed_ones = (gradient if need else None for gradient, need in zip(by_tensors, of_tensors, strict=True))
    return [grad_v, grad_context, *needed_ones]


def unpack(program: Program, parts: list[tuple[Array, Array]], flat: Array) -> None:
    """Fill `flat` with the sum of the parts' gradients, in the order of the tensors."""
    add_up(parts)
    if parts:
        loaded().unpack(program.tables, program.offsets, *parts[0], flat)
    else:
        flat[:] = 0


def add_up(parts: list[tuple[Array, Array]]) -> None:
    """Sum the parts' gradients into the first part, and drop the others."""
    if len(parts) < 2:
        return
    with np.errstate(all="ignore"):  # masked entries are arbitrary
        for others in parts[1:]:
            for total, other in zip(parts[0], others, strict=True):
                total += other
    del parts[1:]


def _plain(
    steps: Sequence[Step | Triangular], is_density: bool, v: Tensor, context: Tensor | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Apply the layers in turn, or compute the log-density up to its constant, by plain torch operations."""
    every, total = iter(tensors), v.new_zeros(len(v))
    for step in steps:
        if isinstance(step, Triangular):
            v, log_det = triangular(step, v, every)
            total = total + step.log_sign * log_det
            continue
        if step.univariate is None:
            v = v[:, step.moved]
            continue
        passes = one_by_one if step.sequential else at_once
        v, log_derivative = passes(step, v, context, every)
        total = total + step.log_sign * log_derivative.sum(-1)
    return (-total - 0.5 * v.square().sum(-1),) if is_density else (v, total)
