"""The sequential direction of a MADE as one sweep, and its adjoint, for any device, dtype and univariate map.

It solves w_i = f(v_i; phi_i(w_<i)), i = 1 .. D. When w_1 .. w_i are solved, the hidden units of degree up to i are
final. So the sweep walks over i, completing at each step the newly determined units of every layer and one set of
parameters phi_i. The work is that of one pass through the unmasked part of the weights. The adjoint walks back from D
to 1 in the same manner, and is the transposed triangular solve: from the saved activations it computes the gradient
with respect to every pre-activation; the gradients of the weights are then one product per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.nn.weights import current

__all__ = ["Activations", "Direction", "Plan", "TorchSweep", "lay_back", "plan_of", "tensors_of", "walk"]

EVERY = slice(None)
Direction = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a univariate map: (v, phi) to (w, log dy/dx), elementwise."""


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
        """Lay out a MADE with these weights and biases, as returned by `tensors_of`. Differentiable."""
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
    return Plan.of(made, tensors_of(made, context))


def tensors_of(made: MADE, context: Tensor | None) -> list[Tensor]:
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


def lay_back(
    made: MADE, by_weights: list[Tensor], by_units: list[Tensor], by_head: list[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients w.r.t. the results of `tensors_of`, from those w.r.t. a plan's weights and pre-activations."""
    gradients = []
    for by_weight, by_unit, bias in zip(by_weights, by_units, tensors[1::2], strict=False):  # the head's follow them
        gradients += [by_weight, by_unit.sum(1) if bias.dim() == 1 else by_unit.T]
    if not made.is_natural:
        place = made.order.argsort()
        outputs = _output_rows(made, place)
        gradients[0] = gradients[0][:, place]
        gradients[-2], gradients[-1] = gradients[-2][outputs], gradients[-1][..., outputs]
        by_head = [part[place] for part in by_head]
    for gradient, layer in zip(gradients[::2], made.masked_layers, strict=True):
        gradient.mul_(layer.mask)
    return [*gradients, *by_head]


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
