"""The start of a model of new rows: its linear layer at regressions, or its base at a mixture."""

from __future__ import annotations

import torch

from pyro_maf.distributions import ConditionalFlowPrior, ConditionalTableDensity, FlowPrior, TableDensity
from pyro_maf.distributions.angle_flow import AngleFlow
from pyro_maf.distributions.mixture_flow import MixtureFlow
from pyro_maf.distributions.steps import dequantised
from pyro_maf.tables import Rows
from pyro_maf.tables.regression import triangular_regression
from pyro_maf.tables.rows import in_proportion

__all__ = ["FENCE", "start_at"]

FENCE = 10.0
"""Standard deviations beyond which a value counts as this for the start, as it does for the units."""


def start_at(
    density: FlowPrior | ConditionalFlowPrior | TableDensity | ConditionalTableDensity,
    training: Rows,
    seed: int,
    *,
    of_mixture: bool,
) -> None:
    """Start the linear layer of a model at the regressions of training rows, or its base at a mixture of them.

    The rows are all or some, with numbers anywhere in their steps. A linear layer that is no identity stays.
    """
    inner = density.unwrapped
    prior = inner.prior if isinstance(inner, TableDensity) else inner
    model = prior.model.flow if isinstance(prior.model, AngleFlow) else prior.model
    linear = getattr(model, "linear", None)
    if linear is not None and any(map(torch.any, linear.parameters())):
        return  # trained before, or set by the user
    if linear is None and not (of_mixture and isinstance(model, MixtureFlow)):
        return
    rows = training.rounded_for(inner)
    values, context = rows.data, rows.context
    if isinstance(inner, TableDensity):
        values, context = rows.data[:, inner.numeric], inner.parts(rows.data, context)[1]
        values = dequantised(values, inner.steps.spacing, torch.Generator().manual_seed(seed))
    # What a network says of a context, it does not yet say before it is trained.
    seen = None if context is None or prior.context_net is not None else prior.features(context)
    z = prior.standardised(values)
    if isinstance(prior.model, AngleFlow):
        z, seen = prior.model.for_flow(z, seen)
    z = z.clamp(-FENCE, FENCE)
    if linear is not None:
        some = slice(None) if rows.weights is None else in_proportion(rows.weights, len(z))
        linear.become(*triangular_regression(z[some].cpu()))
    elif isinstance(model, MixtureFlow):
        seen = seen if seen is None or seen.shape[1] == model.context_dim else None
        model.base.start_at(z, rows.weights, None if seen is None else seen.clamp(-FENCE, FENCE))
