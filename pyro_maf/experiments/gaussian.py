"""The Gaussian with a full covariance: as a model to train, and its maximum likelihood fit in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.tables.moments import RunningMoments
from pyro_maf.transforms import ConditionalFlow, Coupling, Flow, LowerTriangularAffine, Stack

__all__ = ["fit_gaussian", "gaussian"]

ROUNDING = 1e-6
"""A column whose residual deviation given the others is below this fraction of its deviation counts as collinear:
in float32 that much is rounding."""


def gaussian(
    input_dim: int, context_dim: int = 0, factor: Tensor | None = None, weight: Tensor | None = None
) -> Flow | ConditionalFlow:
    """Build a flow whose density is N(A c, L L^T), in training with the log of each scale linear in the context c too.

    Args:
        input_dim: D.
        context_dim: C, 0 for no context: then the mean is 0.
        factor: L, (D, D), by default the identity.
        weight: A, (D, C), by default 0.
    """
    layer = LowerTriangularAffine(input_dim, scale_tril=factor)
    return ConditionalFlow(Stack([layer, _linear_in(context_dim, input_dim, weight)])) if context_dim else layer


def _linear_in(context_dim: int, input_dim: int, weight: Tensor | None) -> Flow:
    """Layer y_i = exp((B c + b)_i) x_i + (A c + a)_i of a context c, with A = `weight`; a, B and b begin at 0."""
    # With no dimension to pass through, the network of a coupling sees the context alone; without hidden layers it is
    # linear. Its outputs are the D shifts, then the D log-scales.
    layer = Coupling(input_dim, mask=[False] * input_dim, hidden_dims=[], context_dim=context_dim)
    if weight is not None:
        coefficients = layer.to(weight.dtype).get_parameter("networks.0.context_layers.0.weight")
        with torch.no_grad():
            coefficients[:input_dim] = weight
    return layer


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
    loc, scale, standard = _standardised(data)
    if context is None:
        layer = LowerTriangularAffine(data.shape[1], scale_tril=_factor(standard, data.dtype))
        return FlowPrior(layer, loc=loc, scale=scale).eval()
    context_loc, context_scale, predictors = _standardised(context)
    # The columns of a one-hot context are dependent: the pseudo-inverse yields the minimum-norm solution.
    weight = torch.linalg.pinv(predictors) @ standard
    factor = _factor(standard - predictors @ weight, data.dtype)
    model = gaussian(data.shape[1], context.shape[1], factor, weight.T.to(data.dtype))
    return ConditionalFlowPrior(
        model, loc=loc, scale=scale, context_loc=context_loc, context_scale=context_scale
    ).eval()


def _standardised(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of the columns, as maximum likelihood requires, and the rows in these units."""
    moments = RunningMoments()
    moments.add(table)
    loc, scale = moments.moments()
    return loc, scale, (table.double() - loc) / scale


def _factor(centred: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Cholesky factor of the covariance of rows whose mean is 0."""
    factor = torch.linalg.cholesky_ex(centred.T @ centred / len(centred)).L
    # Beyond the first non-positive pivot the factor holds the original matrix, or NaN.
    collinear = ~(factor.diagonal() > ROUNDING)
    if collinear.any():
        raise ValueError(
            f"fit_gaussian expected rows with a covariance of full rank, got {len(centred)} rows in which column "
            f"{int(collinear.int().argmax())} follows from those before it: drop that column or add rows."
        )
    return factor.to(dtype)
