"""The Gaussian with a full covariance: as a model to train, and its maximum likelihood fit in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.training.units import Moments, Units
from pyro_maf.transforms import ConditionalFlow, Coupling, Flow, LowerTriangularAffine, Stack

__all__ = ["fit_gaussian", "gaussian", "gaussian_given"]

ROUNDING = 1e-6
"""A column whose residual deviation given the others is below this fraction of its deviation counts as collinear:
in float32 that much is rounding."""


def gaussian(input_dim: int, factor: Tensor | None = None) -> Flow:
    """Build a flow whose density is N(0, L L^T), with L = `factor`, (D, D), by default the identity."""
    return LowerTriangularAffine(input_dim, scale_tril=factor)


def gaussian_given(
    input_dim: int, context_dim: int, factor: Tensor | None = None, weight: Tensor | None = None
) -> ConditionalFlow:
    """Build the same with mean A c, with A = `weight`, (D, C), by default 0.

    In training the log of each dimension's scale becomes linear in c too.
    """
    # A coupling that passes nothing through and has no hidden layer: its shift is linear in the context.
    by_context = Coupling(input_dim, mask=[False] * input_dim, hidden_dims=[], context_dim=context_dim)
    if weight is not None:
        network: Any = by_context.networks[0].to(weight.dtype)
        with torch.no_grad():
            network.context_layers[0].weight[:input_dim] = weight
    return ConditionalFlow(Stack([gaussian(input_dim, factor), by_context]))


def fit_gaussian(data: Tensor, context: Tensor | None = None) -> FlowPrior | ConditionalFlowPrior:
    r"""Fit N(y; m, S) or, with a context, N(y; m + A c, S): the maximum of the likelihood, without any steps.

    m and S are mean and covariance of the rows, or of the residuals of the least squares regression of y on c. With a
    one-hot context that is a mean for each class and a common covariance.

    Args:
        data: Rows (N, D) of finite numbers, on the CPU.
        context: Rows (N, C), or None.

    Returns:
        The density in the data's units and dtype, in eval mode.

    Cost: products over the rows and a Cholesky factor, in float64: O(N (D + C)^2 + D^3).

    Raises:
        ValueError: For rows whose covariance is singular: too few of them, or a column that the others determine.

    Example:
        >>> data = 3 + 2 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> density = fit_gaussian(data)
        >>> round(density.log_prob(data).mean().item(), 1)  # -log(2 pi e) - 2 log 2
        -4.2
    """
    units = _moments(data)
    standard = _standardised(data, *units)
    if context is None:
        return FlowPrior(gaussian(data.shape[1], _factor(standard, data.dtype)), **units._asdict()).eval()
    context_units = _moments(context)
    given = _standardised(context, *context_units)
    # The columns of a one-hot context are dependent: the pseudo-inverse yields the minimum-norm solution.
    weight = torch.linalg.pinv(given) @ standard
    factor = _factor(standard - given @ weight, data.dtype)
    return ConditionalFlowPrior(
        gaussian_given(data.shape[1], context.shape[1], factor, weight.T.to(data.dtype)),
        loc=units.loc,
        scale=units.scale,
        context_loc=context_units.loc,
        context_scale=context_units.scale,
    ).eval()


def _moments(table: Tensor) -> Units:
    """Mean and standard deviation of the columns, as maximum likelihood requires, outliers included."""
    moments = Moments()
    moments.add(table)
    return moments.units()


def _standardised(rows: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (rows.double() - loc) / scale


def _factor(centred: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Cholesky factor of the covariance of rows whose mean is 0."""
    factor = torch.linalg.cholesky_ex(centred.T @ centred / len(centred)).L
    # Beyond the first non-positive pivot the factor holds the original matrix, or NaN.
    follows = ~(factor.diagonal() > ROUNDING)
    if follows.any():
        raise ValueError(
            f"fit_gaussian expected rows with a covariance of full rank, got {len(centred)} rows in which column "
            f"{int(follows.int().argmax())} follows from those before it: drop that column or add rows."
        )
    return factor.to(dtype)
