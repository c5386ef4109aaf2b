r"""Layers by torch operations, for any device, dtype and univariate map; they define correctness.

The parallel direction is a call of the network. The sequential direction solves w_i = f(v_i; phi_i(w_<i)), i = 1 .. D,
where phi is a MADE, by a sweep that touches each weight once forward and once in reverse: when w_1 .. w_i are solved,
the hidden units of degree up to i are final. So the sweep walks over i, completing at each step the newly determined
units of every layer and one set of parameters phi_i. The work is that of one pass through the unmasked part of the
weights. The adjoint walks back from D to 1 in the same manner, and is the transposed triangular solve: from the saved
activations it computes the gradient with respect to every pre-activation; the gradients of the weights are then one
product per layer.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from pyro_maf._core.torch_state import gradients, is_exported, is_traced
from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.nn.layers import block_linear
from pyro_maf.nn.weights import current, is_called, walk_by_calls
from pyro_maf.sweep.layout import Step, Triangular
from pyro_maf.univariate import Affine

__all__ = ["Activations", "Plan", "TorchSweep", "at_once", "one_by_one", "parallel", "plan_of", "solve"]
__all__ += ["together", "triangular", "walk"]

EVERY = slice(None)
Direction = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a univariate map: (v, phi) to (w, log dy/dx), elementwise."""


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
    tensors = _tensors_of(made, context)
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
        return None, grad_v, *_lay_back(ctx.step.networks[0], by_weights, by_units, by_head, tensors)


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


# -- the sweep --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A MADE in the layout of a sweep. Arrays are feature-major: units by batch.

    Attributes:
        weights: One matrix per layer, (units out, units in). Columns of the first and rows of the last follow the order
            of the variables; the last has P adjacent rows for each variable.
        biases: One per layer, (units out, 1), or (units out, batch) if the context differs along the batch.
        order: The variables, first to last.
        head: A, (D, P, r), and b, (D, P), if the P parameters of each variable are A z + b for its r outputs z.
        ready: For each hidden layer, the number of units that are final once the first 0, 1, .. D - 1 variables are
            determined.
        activation: The elementwise function between layers.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    order: Tensor
    head: tuple[Tensor, Tensor] | None
    ready: list[list[int]]
    activation: Callable[[Tensor], Tensor]

    @property
    def dim(self) -> int:
        """D, the number of variables."""
        return self.weights[0].shape[1]

    @property
    def num_outputs(self) -> int:
        """r, the number of outputs per variable; P without a head."""
        return self.weights[-1].shape[0] // self.dim

    def parameters_at(self, variables: int | slice, outputs: Tensor) -> Tensor:
        """Parameters (.., P) of the variables at these places in the order, from outputs (.., r, batch)."""
        if self.head is None:
            return outputs.mT
        matrix, bias = (part[variables] for part in self.head)
        return outputs.mT @ matrix.mT + bias[..., None, :]

    @property
    def hidden_widths(self) -> list[int]:
        """Number of units of each hidden layer."""
        return [weight.shape[0] for weight in self.weights[:-1]]

    @classmethod
    def of(cls, made: MADE, tensors: Sequence[Tensor]) -> Plan:
        """Lay out a MADE with these weights and biases, as returned by `_tensors_of`. Differentiable."""
        count = 2 * len(made.layers)
        masked = [weight * layer.mask for weight, layer in zip(tensors[:count:2], made.masked_layers, strict=True)]
        rows, head = [bias.reshape(-1, bias.shape[-1]).T for bias in tensors[1:count:2]], tensors[count:]
        if not made.is_natural:
            outputs = _output_rows(made, made.order)
            masked[0] = masked[0][:, made.order]
            masked[-1], rows[-1] = masked[-1][outputs], rows[-1][outputs]
            head = [part[made.order] for part in head]
        heads = (head[0], head[1]) if head else None
        return cls(tuple(masked), tuple(rows), made.order, heads, made.ready, ACTIVATIONS[made.activation])


def plan_of(made: MADE, context: Tensor | None = None) -> Plan:
    """The plan of a MADE with its current weights, at a context. Differentiable."""
    return Plan.of(made, _tensors_of(made, context))


def _tensors_of(made: MADE, context: Tensor | None) -> list[Tensor]:
    """Weight and bias of each layer in turn, and of the head, as a call would compute them. Differentiable.

    Weights are those before masking; biases include the term of the context, (units,) or (batch, units).
    """
    tensors: list[Tensor] = []
    for layer, term in zip(map(current, made.masked_layers), made.context_terms(context), strict=True):
        bias: Tensor | None = layer.bias  # a user may have removed it
        bias = layer.weight.new_zeros(layer.out_features) if bias is None else bias
        tensors += layer.weight, bias if term is None else bias + term
    if made.head is not None:
        tensors += current(made.head).weight, made.head.bias
    return tensors


def _lay_back(
    made: MADE, weights: list[Tensor], units: list[Tensor], head: list[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Map gradients w.r.t. a plan's weights and pre-activations back to those w.r.t. the results of `_tensors_of`."""
    added = zip(units, tensors[1::2], strict=False)  # the head's follow them
    biases = [unit.sum(1) if bias.dim() == 1 else unit.T for unit, bias in added]
    if not made.is_natural:
        place = made.order.argsort()
        outputs = _output_rows(made, place)
        weights[0] = weights[0][:, place]
        weights[-1], biases[-1] = weights[-1][outputs], biases[-1][..., outputs]
        head = [part[place] for part in head]
    masked = [weight.mul_(layer.mask) for weight, layer in zip(weights, made.masked_layers, strict=True)]
    return [*(gradient for pair in zip(masked, biases, strict=True) for gradient in pair), *head]


def _output_rows(made: MADE, order: Tensor) -> Tensor:
    """Rows of the last layer for the variables in an order."""
    rows = torch.arange(made.input_dim * made.rank, device=order.device)
    return rows.view(made.input_dim, -1)[order].flatten()


class Activations(NamedTuple):
    """Intermediate results of a sweep.

    Attributes:
        w: The solution, (D, batch), in the order of the variables.
        outputs: (D, r, batch), or phi, (D, P, batch), without a head.
        before: Pre-activations of the hidden units, layer by layer, (units, batch); 0 for units that no output sees.
    """

    w: Tensor
    outputs: Tensor
    before: Tensor


def walk(plan: Plan, step: Callable[[int, Tensor], Tensor], batch: int) -> Activations:
    """Walk over the variables; `step(i, phi_i)` maps phi_i (P, batch) to w_i (batch,).

    Cost: one pass through the unmasked half of the weights; D (layers + 1) small products.
    """
    like = plan.weights[0]
    w = like.new_empty(plan.dim, batch)
    seen = torch.empty_like(w)
    outputs = like.new_empty(plan.dim, plan.num_outputs, batch)
    hidden = like.new_zeros(sum(plan.hidden_widths), batch)
    before = hidden.split(plan.hidden_widths)
    after = [torch.empty_like(layer) for layer in before]
    done = [0] * len(before)
    rows = plan.num_outputs
    for i in range(plan.dim):
        known, count = seen, i
        for layer, ready in enumerate(plan.ready):
            new = slice(done[layer], ready[i])
            if new.stop > new.start:
                weight, bias = plan.weights[layer][new, :count], plan.biases[layer][new]
                torch.addmm(bias, weight, known[:count], out=before[layer][new])
                after[layer][new] = plan.activation(before[layer][new])
            done[layer] = new.stop
            known, count = after[layer], new.stop
        own = slice(i * rows, (i + 1) * rows)
        torch.addmm(plan.biases[-1][own], plan.weights[-1][own, :count], known[:count], out=outputs[i])
        w[i] = step(i, plan.parameters_at(i, outputs[i]).T)
        seen[i] = compress_tails(w[i])
    return Activations(w, outputs, hidden)


@dataclass(frozen=True)
class TorchSweep:
    """The sweep for one direction of a univariate map, and its adjoint, for any device and dtype."""

    plan: Plan
    direction: Direction

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Activations]:
        """w, log-determinant and the tensors saved for the adjoint, for v (batch, D)."""
        plan = self.plan
        given = v[:, plan.order].T.contiguous()
        solved = walk(plan, lambda i, parameters: self.direction(given[i], parameters.T)[0], v.shape[0])
        log_det = self.direction(given, plan.parameters_at(EVERY, solved.outputs))[1].sum(0)
        return solved.w.T[:, plan.order.argsort()], log_det, solved

    def adjoint(
        self, v: Tensor, w: Tensor, kept: Activations, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients of <grad_w, w> + <grad_log_det, log_det> w.r.t. v, weights, pre-activations and the head.

        Cost: one pass through the unmasked half of the weights, then one product per layer for the weights' gradients.
        """
        plan = self.plan
        given, total_w = (tensor[:, plan.order].T.contiguous() for tensor in (v, grad_w))
        dw_dv, dw_dphi, dlog_dv, dlog_dphi = _partials(plan, self.direction, given, kept.outputs)
        seen_slope, seen = _slope_of(compress_tails, kept.w)
        slope, active = _slope_of(plan.activation, kept.before)
        units = self.walk_back(total_w, dlog_dphi * grad_log_det, dw_dphi, seen_slope, slope)
        grad_v = torch.addcmul(dlog_dv * grad_log_det, dw_dv, total_w).T[:, plan.order.argsort()]
        after = active.split(plan.hidden_widths)
        grad_weights = [total @ below.T for total, below in zip(units, [seen, *after], strict=True)]
        return grad_v, grad_weights, units, self._by_head(given, kept.outputs, total_w, grad_log_det)

    def _by_head(self, v: Tensor, outputs: Tensor, total_w: Tensor, grad_log_det: Tensor) -> list[Tensor]:
        """Gradients w.r.t. the head, from those w.r.t. w including everything that depends on it."""
        if self.plan.head is None:
            return []
        with torch.enable_grad():
            matrix, bias = (part.detach().requires_grad_() for part in self.plan.head)
            plan = self.plan._replace(head=(matrix, bias))
            results = self.direction(v, plan.parameters_at(EVERY, outputs))
        return list(torch.autograd.grad(results, (matrix, bias), (total_w, grad_log_det.expand_as(v))))

    def walk_back(
        self, total_w: Tensor, total_phi: Tensor, dw_dphi: Tensor, seen_slope: Tensor, slope: Tensor
    ) -> list[Tensor]:
        """Gradients w.r.t. the pre-activations, layer by layer, (units, batch).

        `total_w`, the gradient w.r.t. w, lacks the contributions of later variables, and is completed in place;
        `total_phi` is that of the log-determinants w.r.t. the outputs, (D, r, batch). The slopes are those of
        `compress_tails` at w, (D, batch), and of the activation of each hidden unit, (units, batch).
        """
        plan = self.plan
        outputs, rows = plan.weights[-1].shape[0], plan.num_outputs
        flat_phi = total_phi.view(outputs, total_w.shape[1])
        slopes = slope.split(plan.hidden_widths)
        totals = [torch.zeros_like(layer) for layer in slopes]
        # Units that no output sees, from index plan.ready[.][-1] on, have gradient zero.
        for i in reversed(range(plan.dim)):
            total_phi[i].addcmul_(dw_dphi[i], total_w[i])
            above, weight, first, last = flat_phi, plan.weights[-1], i * rows, outputs
            for layer in reversed(range(len(totals))):
                ready = plan.ready[layer]
                new = slice(ready[i - 1] if i else 0, ready[i])
                if new.stop > new.start:
                    total = weight[first:last, new].T @ above[first:last]
                    totals[layer][new] = total.mul_(slopes[layer][new])
                above, weight, first, last = totals[layer], plan.weights[layer], new.start, ready[-1]
            if i:
                total_w[i - 1].addcmul_(weight[first:last, i - 1] @ above[first:last], seen_slope[i - 1])
        return [*totals, flat_phi]


def _partials(plan: Plan, direction: Direction, v: Tensor, outputs: Tensor) -> list[Tensor]:
    """dw/dv, dw/dphi, dlog/dv, dlog/dphi of the univariate map as a function of outputs phi, elementwise."""
    with torch.enable_grad():
        inputs = v.detach().requires_grad_(), outputs.detach().requires_grad_()
        results = direction(inputs[0], plan.parameters_at(EVERY, inputs[1]))
        options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        pairs = [torch.autograd.grad(result.sum(), inputs, **options) for result in results]
    return [partial.contiguous() for pair in pairs for partial in pair]


def _slope_of(activation: Callable[[Tensor], Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative and value of an elementwise function at `before`."""
    with torch.enable_grad():
        before = before.detach().requires_grad_()
        after = activation(before)
        (slope,) = torch.autograd.grad(after.sum(), before)
    return slope, after.detach()
