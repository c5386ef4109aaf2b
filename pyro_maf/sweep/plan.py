"""A MADE laid out for a sweep: masked weights and biases in the order of the variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE

__all__ = ["Direction", "Plan", "biases_of"]

Direction = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a map of one dimension: (v, \\*parameters) to (w, log dy/dx), elementwise."""


class Plan(NamedTuple):
    """What a sweep needs of a MADE. Arrays are feature-major: units by batch.

    Attributes:
        weights: One matrix per layer, (units out, units in); columns of the first and rows of the last follow the
            order of the variables; the last has P adjacent rows for each variable.
        biases: One per layer, (units out, 1), or (units out, batch) where the context differs along the batch.
        order: The variables, first to last.
        ready: For each hidden layer, the number of units that are final once the first 0, 1, .. D - 1 variables are
            known.
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
    def of(cls, made: MADE, context: Tensor | None = None) -> Plan:
        """Lay out a MADE; `context` is (batch, context_dim), (context_dim,) or None. Differentiable."""
        weights = [layer.masked_weight for layer in made.masked_layers]
        weights[0] = weights[0][:, made.order]
        weights[-1] = weights[-1][_output_rows(made)]
        activation = ACTIVATIONS[made.activation]
        return cls(tuple(weights), tuple(biases_of(made, context)), made.order, made.ready, activation)


def biases_of(made: MADE, context: Tensor | None) -> list[Tensor]:
    """The biases of a plan, with what the context adds to them. Differentiable."""
    biases: list[Tensor] = [layer.bias for layer in made.masked_layers]
    terms = made.context_terms(context)
    biases = [bias if term is None else bias + term for bias, term in zip(biases, terms, strict=True)]
    biases = [bias.reshape(-1, bias.shape[-1]).T for bias in biases]
    biases[-1] = biases[-1][_output_rows(made)]
    return biases


def _output_rows(made: MADE) -> Tensor:
    rows = torch.arange(made.input_dim * made.outputs_per_input, device=made.order.device)
    return rows.view(made.input_dim, -1)[made.order].flatten()
