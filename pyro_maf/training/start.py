"""Initialisation of a model from training rows: its linear layers by regression, or its base by a mixture."""

from __future__ import annotations

from typing import cast

import torch

from pyro_maf.distributions import ConditionalFlowPrior, ConditionalTableDensity, FlowPrior, TableDensity
from pyro_maf.distributions.angle_flow import AngleFlow
from pyro_maf.distributions.mixture_flow import MixtureFlow
from pyro_maf.flows import IAF, MAF
from pyro_maf.tables import Rows
from pyro_maf.tables.regression import triangular_regression
from pyro_maf.tables.rows import in_proportion

__all__ = ["FENCE", "start_at"]

FENCE = 10.0
"""Distance, in standard deviations, to which values are clipped for the initialisation, as for the units."""


def start_at(
    density: FlowPrior | ConditionalFlowPrior | TableDensity | ConditionalTableDensity,
    training: Rows,
    seed: int,
    *,
    of_mixture: bool,
) -> None:
    """Initialise the linear layers of a model by regressions of training rows, or its base by a mixture of them.

    The rows are all or some, and are dequantised. Linear layers that are not the identity stay unchanged.
    """
    inner = density.unwrapped
    prior = inner.prior if isinstance(inner, TableDensity) else inner
    model = prior.model.flow if isinstance(prior.model, AngleFlow) else prior.model
    stack = cast("MAF | IAF | None", model if isinstance(model, (MAF, IAF)) else None)
    weights = [] if stack is None else [weight for layer in stack.linear for weight in layer.parameters()]
    if any(map(torch.any, weights)):
        return  # trained already, or set by the user
    if model is None or not (weights or (isinstance(model, MixtureFlow) and of_mixture)):
        return
    rows = training.rounded_for(inner)
    values, context = rows.data, rows.context
    if isinstance(inner, TableDensity):
        values, context = inner.of_prior(values, context, seed)
    # An untrained embedding network says nothing about the context yet.
    seen = None if context is None or prior.context_net is not None else prior.features(context)
    z = prior.standardised(values)
    if isinstance(prior.model, AngleFlow):
        z, seen = prior.model.for_flow(z, seen)
    z = z.clamp(-FENCE, FENCE)
    if seen is not None:
        seen = seen.clamp(-FENCE, FENCE) if seen.shape[1] == model.context_dim else None
    if stack is not None:
        some = slice(None) if rows.weights is None else in_proportion(rows.weights, len(z))
        stack.become_linear(*triangular_regression(z[some].cpu(), None if seen is None else seen[some].cpu()))
    elif isinstance(model, MixtureFlow):
        model.base.start_at(z, rows.weights, seen)
