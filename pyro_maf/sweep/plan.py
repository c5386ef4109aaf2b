"""A MADE laid out for a sweep: masked weights and biases in the order of the variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE

__all__ = ["Plan", "ScalarMap"]

ScalarMap = Callable[..., tuple[Tensor, Tensor]]
"""A map of one dimension: (v, \\*parameters) to (w, log-derivative), elementwise."""


class Plan(NamedTuple):
    """What a sweep needs of a MADE. Arrays are feature-major: units by batch.

    Attributes:
        weights: One matrix per layer, (units out, units in); columns of the first and rows of the last follow the
            order of the variables; the last has P adjacent rows for each variable.
        biases: One per layer, (units out, 1), or (units out, batch) where the context differs along the batch.
        ready: For each hidden layer, the number of units that are final once the first 0, 1, .. D - 1 variables are
            known.
        activation: The elementwise function between layers.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
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
        biases = [
            (layer.bias if term is None else layer.bias + term).reshape(-1, layer.out_features).T
            for layer, term in zip(made.masked_layers, made.context_terms(context), strict=True)
        ]
        rows = torch.arange(made.input_dim * made.outputs_per_input, device=made.order.device)
        rows = rows.view(made.input_dim, -1)[made.order].flatten()
        weights[0] = weights[0][:, made.order]
        weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
        return cls(tuple(weights), tuple(biases), made.ready, ACTIVATIONS[made.activation])
