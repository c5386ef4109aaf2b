"""A MADE laid out in the order of its variables: masked weights and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE, MaskedLinear
from pyro_maf.nn.weights import current

__all__ = [
    "CONTEXT",
    "INPUTS",
    "LANES",
    "UNITS",
    "Array",
    "Direction",
    "Plan",
    "Tables",
    "biases_of",
    "lay_back",
    "lay_out_biases",
    "output_rows",
    "plan_of",
    "together",
    "weights_of",
]

LANES = 16
"""Tape columns and columns of gradients are padded to a multiple of this, so that loops over them are vectorised."""
INPUTS, UNITS, CONTEXT = range(3)
"""What a matrix of a program is multiplied with."""
Array = np.ndarray[Any, Any]
Direction = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a univariate map: (v, \\*parameters) to (w, log dy/dx), elementwise."""


class Tables(NamedTuple):
    """The arrays that the kernels follow.

    Attributes:
        layers, matrices: Records of `layout.LAYER` and `layout.MATRIX`.
        variables: Lists of variables and of rows, to which the layers refer.
        seen: For each row of each matrix, the number of columns that it sees, ascending.
        heard: For each column, the first row that sees it.
        row_order, column_order: The row and the column of the weight that stand there.
        steps: For each sequential layer, the numbers of units that are final, (levels + 1, D + 1).
        result: The row of each variable after the last layer.
    """

    layers: Array
    matrices: Array
    variables: Array
    seen: Array
    heard: Array
    row_order: Array
    column_order: Array
    steps: Array
    result: Array


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
    def of(cls, made: MADE, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Plan:
        """Lay out a MADE with these weights and biases, as `weights_of` and `biases_of` give them. Differentiable."""
        masked = [weight * layer.mask for weight, layer in zip(weights, made.masked_layers, strict=True)]
        if not made.is_natural:
            masked[0] = masked[0][:, made.order]
            masked[-1] = masked[-1][output_rows(made, made.order)]
        rows = lay_out_biases(made, biases)
        return cls(tuple(masked), tuple(rows), made.order, made.ready, ACTIVATIONS[made.activation])


def plan_of(made: MADE, context: Tensor | None = None) -> Plan:
    """The plan of a MADE with its current weights, at a context. Differentiable."""
    return Plan.of(made, weights_of(made), biases_of(made, context))


def weights_of(made: MADE) -> list[Tensor]:
    """A MADE's weights before the mask, one matrix per layer, as a call of its layers would compute them."""
    return [current(layer).weight for layer in made.masked_layers]


def biases_of(made: MADE, context: Tensor | None) -> list[Tensor]:
    """A MADE's biases plus the terms of the context, (units,) or (batch, units) per layer. Differentiable."""
    terms = made.context_terms(context)
    biases = [_bias_of(current(layer)) for layer in made.masked_layers]
    return [bias if term is None else bias + term for bias, term in zip(biases, terms, strict=True)]


def _bias_of(layer: MaskedLinear) -> Tensor:
    bias: Tensor | None = layer.bias  # a user may have removed it
    return layer.weight.new_zeros(layer.out_features) if bias is None else bias


def lay_out_biases(made: MADE, biases: Sequence[Tensor]) -> list[Tensor]:
    """Biases in the layout of a plan, (units, 1) or (units, batch). Differentiable."""
    rows = [bias.reshape(-1, bias.shape[-1]).T for bias in biases]
    if not made.is_natural:
        rows[-1] = rows[-1][output_rows(made, made.order)]
    return rows


def lay_back(
    made: MADE, weights: Sequence[Tensor], units: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Map gradients in the layout of a plan back to the weights and biases of its MADE.

    Args:
        made: The network.
        weights: Gradients with respect to the plan's weights.
        units: Gradients with respect to the pre-activations of each layer above the inputs, (units, batch).
        biases: The biases that the plan was built from.
    """
    weights, units = list(weights), list(units)
    by_biases = [unit.sum(1) if bias.dim() == 1 else unit.T for unit, bias in zip(units, biases, strict=True)]
    if not made.is_natural:
        place = made.order.argsort()
        outputs = output_rows(made, place)
        weights[0] = weights[0][:, place]
        weights[-1], by_biases[-1] = weights[-1][outputs], by_biases[-1][..., outputs]
    masked = [weight.mul_(layer.mask) for weight, layer in zip(weights, made.masked_layers, strict=True)]
    return masked, by_biases


def output_rows(made: MADE, order: Tensor) -> Tensor:
    """Rows of the last layer for the variables in an order."""
    rows = torch.arange(made.input_dim * made.outputs_per_input, device=order.device)
    return rows.view(made.input_dim, -1)[order].flatten()


def together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast v to the common batch shape, and a batched context to one row for each row of v."""
    batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
    if context.dim() > 1:
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    return v.expand(*batch, v.shape[-1]), context
