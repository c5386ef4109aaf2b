"""A run of layers as one differentiable operation compiled for CPUs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core.memory_pool import empty
from pyro_maf._core.torch_state import is_intercepted
from pyro_maf.sweep.kernels import kernels, loaded
from pyro_maf.sweep.layout import LANES, Array, Step, Triangular
from pyro_maf.sweep.program import Pack, Program, Reading, program_of
from pyro_maf.sweep.threads import in_parts
from pyro_maf.sweep.torch_engine.layers import at_once, gradients, one_by_one, together, triangular

__all__ = ["Run", "add_up", "run", "unpack"]

DTYPES = (torch.float32, torch.float64)
ADDITION = 8
"""Multiplications that take as long as the addition of a number to one in memory."""


class Run(NamedTuple):
    """A run of layers as a program, with the tensors that it reads.

    Attributes:
        program: The layers, laid out.
        steps: The layers, the one that is applied first first.
        tensors: Parameters of their networks, all of one dtype, on the CPU.
    """

    program: Program
    steps: Sequence[Step | Triangular]
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, owner: nn.Module, place: object, steps: Sequence[Step | Triangular]) -> Run | None:
        """The layers in their current state, or None where no program has them and torch is to apply them.

        Args:
            owner: The flow that the layers belong to.
            place: Which of its runs this is.
            steps: The layers; at least one with a network.
        """
        reading = Reading.of(steps)
        if reading is None or reading.tensors[0].dtype not in DTYPES or not reading.is_uniform(reading.tensors[0]):
            return None
        program = program_of(owner, place, steps, reading)
        return None if program is None else cls(program, steps, reading.tensors)

    def of_networks(self) -> list[Tensor]:
        """Weights and biases of the networks, of all tensors."""
        others = {id(tensor) for step in self.steps if isinstance(step, Triangular) for tensor in step.tensors}
        return [tensor for tensor in self.tensors if id(tensor) not in others]

    def __call__(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        r"""The layers in turn, or None where torch is to apply them.

        Args:
            v: (\*batch, D).
            context: (\*batch or (), context_dim), or None.

        Returns:
            The last layer's output, (\*batch, D), and the sum of the log-determinants, (\*batch,).
        """
        inputs = self.inputs(v, context)
        if inputs is None:
            return None
        rows, features, needs_gradient = inputs
        if needs_gradient:
            w, log_det = _Layers.apply(self, rows, features, *self.tensors)
        else:
            w, log_det = _forward(self.program, self.program.remembered(self.tensors), rows, features, None)
        if rows is v:
            return w, log_det
        batch = self._batch(v, context)
        return w.reshape(*batch, v.shape[-1]), log_det.reshape(batch)

    def log_density(self, v: Tensor, context: Tensor | None, constant: float) -> Tensor | None:
        r"""`constant` - |w|^2 / 2 - log-determinant, (\*batch,), for the output w; or None, as `__call__`.

        It is the log-density of v whose noise w is standard normal, up to the constant. One node of the graph.
        """
        inputs = self.inputs(v, context)
        if inputs is None:
            return None
        rows, features, needs_gradient = inputs
        if needs_gradient:
            density = _Density.apply(self, constant, rows, features, *self.tensors)
        else:
            w, log_det = _forward(self.program, self.program.remembered(self.tensors), rows, features, None)
            density = _normal(w, log_det, constant)
        return density if rows is v else density.reshape(self._batch(v, context))

    def inputs(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, bool] | None:
        """v and context as rows, (batch, D) and (batch, context_dim), and whether a gradient is wanted.

        None where torch is to apply the layers.
        """
        program, tensors = self.program, self.tensors
        if v.dtype is not tensors[0].dtype or not Reading([], [], [v]).is_uniform(v):
            return None
        context = context if program.context_dim else None
        if not program.fits(v, context):
            return None  # where an error names what is wrong
        if kernels() is None:  # asked last, since it loads or compiles them
            return None
        if context is not None:
            v, context = together(v, context)
        rows = v if v.dim() == 2 else v.reshape(-1, program.dim)
        if context is not None and context.dim() == 1:
            context = context.expand(len(rows), -1)
        inputs = (rows, *tensors) if context is None else (rows, context, *tensors)
        return rows, context, torch.is_grad_enabled() and any(map(_requires_grad, inputs))

    def _batch(self, v: Tensor, context: Tensor | None) -> torch.Size:
        """Batch shape of v and context together."""
        if context is None or not self.program.context_dim:
            return v.shape[:-1]
        return torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])


_requires_grad = operator.attrgetter("requires_grad")


def run(
    owner: nn.Module, place: object, steps: Sequence[Step | Triangular], v: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The layers in turn, as a `Run` of them, or None where torch is to apply them."""
    if is_intercepted():
        return None
    ready = Run.of(owner, place, steps)
    return None if ready is None else ready(v, context)


class _Layers(torch.autograd.Function):
    """The layers, with the walk back as the backward."""

    @staticmethod
    def forward(ctx: Any, run: Run, v: Tensor, context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        w, log_det, saved = _recorded(run, v, context, tensors)
        ctx.run = run
        ctx.save_for_backward(*saved)
        return w, log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_intercepted():
            return None, *_by_plain_operations(_plain, ctx.run, ctx.saved_tensors, needed, (grad_w, grad_log_det))
        return None, *_backward(ctx.run.program, ctx.saved_tensors, needed, grad_w, grad_log_det)


class _Density(torch.autograd.Function):
    """The log-density of what the layers map to standard normal noise."""

    @staticmethod
    def forward(ctx: Any, run: Run, constant: float, v: Tensor, context: Tensor | None, *tensors: Tensor) -> Tensor:
        w, log_det, saved = _recorded(run, v, context, tensors)
        ctx.run = run
        ctx.save_for_backward(w, *saved)
        return _normal(w, log_det, constant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        w, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or is_intercepted():
            return None, None, *_by_plain_operations(_plain_density, ctx.run, saved, needed, (grad,))
        grads, factors = (torch.empty_like(w), torch.empty_like(grad)), grad.contiguous().numpy()
        arrays = [each.numpy() for each in (w, *grads)]
        loaded().differentiate_normal(0.0, factors, arrays[0], factors, *arrays[1:])
        return None, None, *_backward(ctx.run.program, saved, needed, *grads)


def _normal(w: Tensor, log_det: Tensor, constant: float) -> Tensor:
    """`constant` - |w|^2 / 2 - log-determinant, in the place of the latter."""
    loaded().normal(constant, w.numpy(), log_det.numpy())
    return log_det


def _recorded(
    run: Run, v: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Any]]:
    """w and log-determinants of v, and what `_backward` reads: packed weights, tape, v, context and the tensors."""
    # Not the pack of an earlier call: gradcheck, for one, writes through `.data`, which no version counter records.
    program, points = run.program, v.shape[0]
    pack, chunk = program.pack(tensors), program.chunk_of(points)
    rows = -(-points // chunk) * program.rows
    tape = empty(rows * chunk, v).view(rows, chunk)
    w, log_det = _forward(program, pack, v, context, tape)
    return w, log_det, [pack.memory, tape, v, context, *tensors]


def _forward(
    program: Program, pack: Pack, v: Tensor, context: Tensor | None, tape: Tensor | None
) -> tuple[Tensor, Tensor]:
    """w, (batch, D), and log-determinants of v (batch, D); fills the tape, if there is one."""
    v, points = v.detach().contiguous(), v.shape[0]
    w, log_det, rows, chunk = torch.empty_like(v), v.new_empty(points), v.numpy(), program.chunk_of(points)
    features = rows[:, :0] if context is None else context.detach().contiguous().numpy()
    network = program.tables, pack.weights, pack.biases, rows, features, program.rows
    results = np.empty((0, chunk), rows.dtype) if tape is None else tape.numpy(), w.numpy(), log_det.numpy()

    def walk(first: int, end: int) -> None:
        loaded().forward(*network, first, end, program.few, *results)

    in_parts(walk, points, chunk, program.work)
    return w, log_det


def _backward(
    program: Program, saved: Sequence[Tensor], needed: Sequence[bool], grad_w: Tensor, grad_log_det: Tensor
) -> list[Tensor | None]:
    """Gradients with respect to v, the context and the tensors; None where not needed. For `saved` see `_recorded`."""
    points, tensors, wanted = grad_w.shape[0], saved[4:], program.every_matrix
    if not all(needed[2:]):
        of_tensors, matrices = np.array(needed[2:]), program.tables.matrices
        wanted = of_tensors[matrices["weight"]] | of_tensors[matrices["addend"]]
    grad_v = grad_w.new_empty(points, program.dim if needed[0] else 0)
    grad_context = grad_w.new_empty(points, program.context_dim if needed[1] else 0)
    memory = empty(program.shift + program.num_weights, grad_w)
    parts = _walked_back(program, saved, wanted, memory, (grad_w, grad_log_det), (grad_v, grad_context))
    by_tensors = tensors
    if any(needed[2:]):
        flat = memory[: program.offsets[-1]]
        unpack(program, parts, flat)
        parts_of_flat = zip(flat.split_with_sizes(program.sizes), tensors, strict=True)
        by_tensors = [part if tensor.dim() == 1 else part.view_as(tensor) for part, tensor in parts_of_flat]
    every = [grad_v, grad_context, *by_tensors]
    return [gradient if need else None for gradient, need in zip(every, needed, strict=True)]


def _walked_back(
    program: Program,
    saved: Sequence[Tensor],
    wanted: Array,
    memory: Tensor,
    grads: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
) -> list[tuple[Array, Array]]:
    """Gradients with respect to packed weights and biases, of each part of the points.

    Args:
        program: The program.
        saved: What `_recorded` saved.
        wanted: For each matrix, whether its gradient is.
        memory: Room for the first part's gradients with respect to the weights, behind that of the unpacked ones.
        grads: Gradients with respect to w and the log-determinants.
        results: Those with respect to v and the context, filled here; with no columns if not wanted.
    """
    tape = saved[1]
    arrays = [tensor.contiguous().numpy() for tensor in (tape, *grads)] + [tensor.numpy() for tensor in results]
    network = program.tables, saved[0].numpy(), wanted, program.rows

    def walk(first: int, end: int) -> tuple[Array, Array]:
        gradients = program.room_for_gradients(tape, None if first else memory[program.shift :])
        loaded().backward(*network, first, end, *arrays, *gradients, False)
        return gradients

    return in_parts(walk, arrays[1].shape[0], tape.shape[1], 2 * program.work)


def unpack(program: Program, parts: list[tuple[Array, Array]], flat: Tensor) -> None:
    """Fill `flat` with the sum of the parts' gradients, in the order of the tensors."""
    add_up(parts)
    if parts:
        loaded().unpack(program.tables, program.offsets, *parts[0], flat.numpy())
    else:
        flat.zero_()


def add_up(parts: list[tuple[Array, Array]]) -> None:
    """Leave the sum of the parts' gradients in the first of them, the only one then."""
    if len(parts) < 2:
        return
    with np.errstate(all="ignore"):  # entries that no row sees are arbitrary
        for others in parts[1:]:
            for total, other in zip(parts[0], others, strict=True):
                _add(total, other)
    del parts[1:]


def _add(total: Array, other: Array) -> None:
    def add(first: int, end: int) -> None:
        total[first:end] += other[first:end]

    in_parts(add, len(total), LANES, ADDITION)


def _by_plain_operations(
    plain: Callable[..., tuple[Tensor, ...]],
    run: Run,
    saved: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The same gradients by plain operations, which can be differentiated again."""
    return gradients(lambda v, context, *tensors: plain(run.steps, v, context, tensors), saved[2:], needed, grads)


def _plain_density(
    steps: Sequence[Step | Triangular], v: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The log-density by plain operations, up to the constant."""
    w, log_det = _plain(steps, v, context, tensors)
    return (-log_det - 0.5 * w.square().sum(-1),)


def _plain(
    steps: Sequence[Step | Triangular], v: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The layers in turn by plain operations, with these tensors as the networks' own."""
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
    return v, total
