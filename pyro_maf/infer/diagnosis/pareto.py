"""Pareto-smoothed importance sampling: the tail shape of importance weights, and weights smoothed with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_maf.infer.models.double_precision import widened
from pyro_maf.infer.start.normal import truncated

__all__ = ["fit_pareto", "smoothed_log_weights"]

LEAST, LEAST_TAIL = 10, 5
"""Minimum number of weights, and of weights in their tail."""
EQUAL, NEGLIGIBLE = 1e-10, 0.1
"""Spread of log weights, in nats, below which they are equal, and above which it never counts as rounding; at the
latter 99.7 % of the draws are effective."""
GRID = 30
SPREAD = 3.0
"""Spread of the grid, in quartiles of the tail."""
PRIOR_SHAPE, PRIOR_SIZE = 0.5, 10
"""Shape towards which a tail is shrunk, and the number of draws that this counts as."""


def fit_pareto(excesses: Tensor) -> tuple[float, float]:
    r"""Fit a generalised Pareto distribution to excesses over a threshold, (n,) in ascending order.

    Zhang and Stephens' estimate: with theta = -k / sigma, the likelihood has a one-dimensional profile, over which
    theta is averaged on a grid. The shape is shrunk towards 0.5, as by ten more draws.

    Returns:
        Shape k and scale sigma.

    Example:
        >>> quantiles = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
        >>> shape, scale = fit_pareto(((1 - quantiles) ** -0.4 - 1) * 2 / 0.4)
        >>> round(shape, 2), round(scale, 2)
        (0.4, 2.0)

    Reference:
        Zhang & Stephens, *A new and efficient estimation method for the generalized Pareto distribution*, 2009.
    """
    size = len(excesses)
    points = GRID + math.isqrt(size)
    places = torch.arange(1, points + 1, dtype=excesses.dtype, device=excesses.device) - 0.5
    quartile = excesses[int(size / 4 + 0.5) - 1]
    thetas = 1 / excesses[-1] + (1 - (points / places).sqrt()) / (SPREAD * quartile)
    shapes = torch.log1p(-thetas[:, None] * excesses).mean(1)
    profile = size * ((-thetas / shapes).log() - shapes - 1)
    weights = torch.softmax(profile.nan_to_num(nan=-math.inf), 0)
    theta = (weights * thetas).sum()
    shape = torch.log1p(-theta * excesses).mean()
    shrunk = (size * shape + PRIOR_SIZE * PRIOR_SHAPE) / (size + PRIOR_SIZE)
    return float(shrunk), float(-shape / theta)


def smoothed_log_weights(log_weights: Tensor, rounding: float = 0.0) -> tuple[Tensor, float]:
    r"""Replace the largest of n log weights by quantiles of a Pareto distribution, and normalise.

    The tail consists of the largest 3 \sqrt n weights, at most a fifth of them. Importance weights have a mean, the
    evidence, which a tail with shape 1 or more does not. An estimate of such a shape is not a tail that continues but a
    step at the end of even weights, as for a guide wider than the posterior that lacks its far tails. In that case the
    weights are truncated at \sqrt n times their mean.

    Args:
        log_weights: (n,); those that are not finite are left out.
        rounding: Upper bound of their rounding error, in nats: if they differ by less, and by less than 0.1, they are
            equal.

    Returns:
        The logarithms of weights that sum to one, in float64; minus infinity for those left out, or for all if fewer
        than ten are left. And k-hat: minus infinity for equal weights, infinity for a tail with fewer than five draws.

    Example:
        >>> smooth, shape = smoothed_log_weights(torch.zeros(50))
        >>> float(smooth.exp().sum()), shape
        (1.0, -inf)

    Reference:
        Vehtari et al., *Pareto smoothed importance sampling*, 2024; Ionides, *Truncated importance sampling*, 2008.
    """
    weights = widened(log_weights)
    smooth = torch.full_like(weights, -torch.inf)
    is_scored = weights.isfinite()
    ordered, order = weights[is_scored].sort()
    size = len(ordered)
    if size < LEAST:
        return smooth.to(log_weights.device), math.inf
    ordered -= ordered[-1].clone()
    shape = math.inf
    if float(ordered[0]) > -max(EQUAL, min(rounding, NEGLIGIBLE)):
        ordered, shape = torch.zeros_like(ordered), -math.inf
    else:
        length = math.ceil(min(size / 5, 3 * math.sqrt(size)))
        threshold = max(float(ordered[-length - 1]), math.log(torch.finfo(ordered.dtype).tiny))
        tail = ordered > threshold
        count = int(tail.sum())
        if count >= LEAST_TAIL:
            base = math.exp(threshold)
            shape, scale = fit_pareto(ordered[tail].exp() - base)
            if shape < 1:
                ordered[tail] = (_quantiles(shape, scale, count, ordered) + base).log().clamp(max=0.0)
            else:
                ordered = truncated(ordered)
    smooth[is_scored] = torch.empty_like(ordered).scatter_(0, order, ordered.log_softmax(0))
    return smooth.to(log_weights.device), shape


def _quantiles(shape: float, scale: float, count: int, like: Tensor) -> Tensor:
    """Quantiles of a generalised Pareto distribution at `count` even levels, ascending."""
    levels = (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count
    logs = torch.log1p(-levels)
    return -scale * logs if shape == 0 else scale * torch.expm1(-shape * logs) / shape
