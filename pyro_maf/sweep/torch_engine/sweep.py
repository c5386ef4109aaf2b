r"""The sweep in torch: each weight is touched once forward and once in reverse.

Solves w_i = f(v_i; phi_i(w_<i)), i = 1 .. D, where phi is a MADE. Once w_1 .. w_i are solved, the hidden units of
degree up to i are final. So the sweep walks over i, completing at each step the newly determined units of every layer
and one set of parameters phi_i. The work is that of one pass through the non-zero part of the masked weights.

The adjoint walks back from D to 1 in the same manner, and is the transposed triangular solve: from the saved
activations it computes the gradient with respect to every pre-activation; that of the weights is then one product a
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE, compress_tails
from pyro_maf.nn.weights import current

__all__ = [
    "Activations",
    "Direction",
    "Plan",
    "TorchSweep",
    "hidden_widths",
    "lay_back",
    "plan_of",
    "tensors_of",
    "walk",
]

Direction = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a univariate map: (v, phi) to (w, log dy/dx), elementwise."""


class Plan(NamedTuple):
    """A MADE in the layout of a sweep. Arrays are feature-major: units by batch.

    Attributes:
        weights: One matrix per layer, (units out, units in); columns of the first and rows of the last follow the
            order of the variables; the last has P adjacent rows for each variable.
        biases: One per layer, (units out, 1), or (units out, batch) where the context differs along the batch.
        order: The variables, first to last.
        ready: For each hidden layer, the number of units that are final once the first 0, 1, .. D - 1 variables are
            determined.
        activation: The elementwise function between layers.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    order: Tensor
    ready: list[list[int]]
    activation: Callable[[Tensor], Tensor]

    @property
    def dim(self) -> int:
        """D, the number of variables."""
        return self.weights[0].shape[1]

    @property
    def num_parameters(self) -> int:
        """P, the outputs for each variable."""
        return self.weights[-1].shape[0] // self.dim

    @classmethod
    def of(cls, made: MADE, tensors: Sequence[Tensor]) -> Plan:
        """Lay out a MADE with these weights and biases, as `tensors_of` returns them. Differentiable."""
        masked = [weight * layer.mask for weight, layer in zip(tensors[::2], made.masked_layers, strict=True)]
        rows = [bias.reshape(-1, bias.shape[-1]).T for bias in tensors[1::2]]
        if not made.is_natural:
            outputs = output_rows(made, made.order)
            masked[0] = masked[0][:, made.order]
            masked[-1], rows[-1] = masked[-1][outputs], rows[-1][outputs]
        return cls(tuple(masked), tuple(rows), made.order, made.ready, ACTIVATIONS[made.activation])


def plan_of(made: MADE, context: Tensor | None = None) -> Plan:
    """The plan of a MADE with its current weights, at a context. Differentiable."""
    return Plan.of(made, tensors_of(made, context))


def tensors_of(made: MADE, context: Tensor | None) -> list[Tensor]:
    """Weight and bias of each layer in turn, as a call would compute them. Differentiable.

    The weight is that before the mask; the bias includes the term of the context, (units,) or (batch, units).
    """
    tensors: list[Tensor] = []
    for layer, term in zip(map(current, made.masked_layers), made.context_terms(context), strict=True):
        bias: Tensor | None = layer.bias  # a user may have removed it
        bias = layer.weight.new_zeros(layer.out_features) if bias is None else bias
        tensors += layer.weight, bias if term is None else bias + term
    return tensors


def lay_back(made: MADE, weights: Sequence[Tensor], units: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Map gradients in the layout of a plan back to the weights and biases that it was built from.

    Args:
        made: The network.
        weights: Gradients with respect to the plan's weights.
        units: Gradients with respect to the pre-activations of each layer above the inputs, (units, batch).
        tensors: The weights and biases.
    """
    weights = list(weights)
    biases = [unit.sum(1) if bias.dim() == 1 else unit.T for unit, bias in zip(units, tensors[1::2], strict=True)]
    if not made.is_natural:
        place = made.order.argsort()
        outputs = output_rows(made, place)
        weights[0] = weights[0][:, place]
        weights[-1], biases[-1] = weights[-1][outputs], biases[-1][..., outputs]
    masked = [weight.mul_(layer.mask) for weight, layer in zip(weights, made.masked_layers, strict=True)]
    return [gradient for pair in zip(masked, biases, strict=True) for gradient in pair]


def output_rows(made: MADE, order: Tensor) -> Tensor:
    """Rows of the last layer for the variables in an order."""
    rows = torch.arange(made.input_dim * made.outputs_per_input, device=order.device)
    return rows.view(made.input_dim, -1)[order].flatten()


class Activations(NamedTuple):
    """Intermediate results of a sweep: one set of activations.

    Attributes:
        w: The solution, (D, batch), in the order of the variables.
        parameters: phi, (D, P, batch).
        before: Pre-activations of the hidden units, layer by layer, (units, batch); 0 for those that no output sees.
    """

    w: Tensor
    parameters: Tensor
    before: Tensor


def walk(plan: Plan, step: Callable[[int, Tensor], Tensor], batch: int) -> Activations:
    """Walk over the variables; `step(i, phi_i)` maps phi_i (P, batch) to w_i (batch,).

    Cost: one pass through the non-zero half of the weights; D (layers + 1) small products.
    """
    like = plan.weights[0]
    w = like.new_empty(plan.dim, batch)
    seen = torch.empty_like(w)
    parameters = like.new_empty(plan.dim, plan.num_parameters, batch)
    hidden = like.new_zeros(sum(hidden_widths(plan)), batch)
    before = hidden.split(hidden_widths(plan))
    after = [torch.empty_like(layer) for layer in before]
    done = [0] * len(before)
    rows = plan.num_parameters
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
        torch.addmm(plan.biases[-1][own], plan.weights[-1][own, :count], known[:count], out=parameters[i])
        w[i] = step(i, parameters[i])
        seen[i] = compress_tails(w[i])
    return Activations(w, parameters, hidden)


@dataclass(frozen=True)
class TorchSweep:
    """The sweep of a univariate map, and its adjoint, on any device and in any dtype.

    Args:
        plan: The network.
        direction: One direction of the univariate map.
    """

    plan: Plan
    direction: Direction

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Activations]:
        """w, log-determinant and the tensors saved for the adjoint, for v (batch, D)."""
        plan = self.plan
        given = v[:, plan.order].T.contiguous()
        solved = walk(plan, lambda i, parameters: self.direction(given[i], parameters.T)[0], v.shape[0])
        log_det = self.direction(given, solved.parameters.transpose(1, 2))[1].sum(0)
        return solved.w.T[:, plan.order.argsort()], log_det, solved

    def adjoint(
        self, v: Tensor, w: Tensor, kept: Activations, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of <grad_w, w> + <grad_log_det, log_det> w.r.t. v, the weights and the pre-activations.

        Cost: one pass through the non-zero half of the weights, then one product a layer for the weights' gradients.
        """
        plan = self.plan
        given, total_w = (tensor[:, plan.order].T.contiguous() for tensor in (v, grad_w))
        dw_dv, dw_dphi, dlog_dv, dlog_dphi = partials(self.direction, given, kept.parameters)
        seen_slope, seen = slope_of(compress_tails, kept.w)
        slope, active = slope_of(plan.activation, kept.before)
        units = self.walk_back(total_w, dlog_dphi * grad_log_det, dw_dphi, seen_slope, slope)
        grad_v = torch.addcmul(dlog_dv * grad_log_det, dw_dv, total_w).T[:, plan.order.argsort()]
        after = active.split(hidden_widths(plan))
        grad_weights = [total @ below.T for total, below in zip(units, [seen, *after], strict=True)]
        return grad_v, grad_weights, units

    def walk_back(
        self, total_w: Tensor, total_phi: Tensor, dw_dphi: Tensor, seen_slope: Tensor, slope: Tensor
    ) -> list[Tensor]:
        """Gradient with respect to the pre-activations, layer by layer, (units, batch).

        Args:
            total_w: Gradient w.r.t. w, (D, batch), without the contributions of later variables; completed in place.
            total_phi: Gradient of the log-determinants w.r.t. phi, (D, P, batch).
            dw_dphi: (D, P, batch).
            seen_slope: The derivative of `compress_tails` at w, (D, batch).
            slope: The derivative of the activation of each hidden unit, (units, batch).
        """
        plan = self.plan
        outputs, rows = plan.weights[-1].shape[0], plan.num_parameters
        flat_phi = total_phi.view(outputs, total_w.shape[1])
        slopes = slope.split(hidden_widths(plan))
        totals = [torch.zeros_like(layer) for layer in slopes]
        # Units that no output sees have index plan.ready[.][-1] and up: their gradient is zero.
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


def hidden_widths(plan: Plan) -> list[int]:
    """Number of units of each hidden layer."""
    return [weight.shape[0] for weight in plan.weights[:-1]]


def partials(direction: Direction, v: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dw/dv, dw/dphi, dlog/dv, dlog/dphi of the univariate map, elementwise."""
    with torch.enable_grad():
        v, parameters = v.detach().requires_grad_(), parameters.detach().requires_grad_()
        w, log_derivative = direction(v, parameters.transpose(1, 2))
        partials: list[Tensor] = []
        for value, keep in ((w, True), (log_derivative, False)):
            partials += torch.autograd.grad(
                value.sum(), (v, parameters), retain_graph=keep, allow_unused=True, materialize_grads=True
            )
    dw_dv, dw_dphi, dlog_dv, dlog_dphi = partials
    return dw_dv, dw_dphi.contiguous(), dlog_dv, dlog_dphi.contiguous()


def slope_of(activation: Callable[[Tensor], Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative and value of an elementwise function at `before`."""
    with torch.enable_grad():
        before = before.detach().requires_grad_()
        after = activation(before)
        (slope,) = torch.autograd.grad(after.sum(), before)
    return slope, after.detach()
