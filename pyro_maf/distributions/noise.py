"""Noise of a density: the inverse of its map from noise to values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_maf.distributions.density import ConditionalDensity, ConditionedDensity
from pyro_maf.distributions.flow_prior import FlowPrior
from pyro_maf.distributions.made_mog import MADEMoG
from pyro_maf.distributions.maf_mog import MAFMoG
from pyro_maf.transforms import Flow

__all__ = ["noise_of"]


def noise_of(model: Any, y: Tensor, context: Tensor | None = None) -> Tensor:
    r"""Noise u, (rows, D), that `model` maps to y; standard normal if the model is exact.

    For a flow u = flow.inv(y). For mixtures of Gaussians u_i = Phi^-1(F_i(y_i | y_<i)), with F_i the distribution
    function of the conditional.

    Args:
        model: A flow, a `FlowPrior`, a `MADEMoG` or a `MAFMoG`, or a conditional form of one of the latter three.
        y: Rows (rows, D), or (rows, D + 1) on a simplex, inside the support, of the model's dtype and on its device.
        context: Rows (rows, C) for a model that takes a context and does not already hold one.

    Cost: that of `log_prob`.

    Raises:
        TypeError: For any other model.

    Example:
        >>> from pyro_maf import MAF
        >>> prior = FlowPrior(MAF(2), loc=torch.tensor([5.0, 5.0]))
        >>> noise_of(prior, torch.tensor([[5.0, 6.0]])).shape
        torch.Size([1, 2])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 3.1.
    """
    if isinstance(model, ConditionalDensity):
        return noise_of(model.density, y, context)
    if isinstance(model, ConditionedDensity):
        return noise_of(model.density, y, model.context[: len(y)])
    if isinstance(model, FlowPrior):
        return noise_of(model.model, model.standardised(y), model._standardised(context))
    if isinstance(model, MAFMoG):
        return noise_of(model.base, model.flow.inverse_and_log_det(y, context)[0], context)
    if isinstance(model, MADEMoG):
        return _normal_quantiles(*model.mixtures(y, context), y)
    if isinstance(model, Flow):
        return model.inverse_and_log_det(y, context)[0]
    raise TypeError(f"noise expected flows, FlowPriors, MADEMoGs or MAFMoGs, got {type(model).__name__}.")


def _normal_quantiles(log_pi: Tensor, mu: Tensor, log_sigma: Tensor, y: Tensor) -> Tensor:
    """Phi^-1 of each mixture's distribution function at y, computed from the smaller tail."""
    # erfc keeps its relative precision in the tail, where torch.special.ndtr rounds to 0.
    standard = ((y[..., None] - mu) * (-log_sigma).exp()).double() / math.sqrt(2)
    below = (log_pi.double().exp() * torch.erfc(-standard)).sum(-1) / 2
    above = (log_pi.double().exp() * torch.erfc(standard)).sum(-1) / 2
    return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).to(y.dtype)
