r"""Weight of one tail of a column: the inverse degrees of freedom of Student's t.

With scale s and weight w, a distance d from the median is that of a normal variable x, as in `Tails`, if

    d = s sqrt((exp(w x^2) - 1) / w),   x = sqrt(log(1 + w (d / s)^2) / w).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["HEAVY", "tail_weight"]

GRID = torch.tensor([0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2], dtype=torch.float64)
"""Tail weights, from normal to heavier than Cauchy."""
HEAVY = 3 / 16
"""Weight, five degrees of freedom, above which a tail is heavy. Of normal columns with 100 rows one in 30 exceeds it,
with 200 rows none; of columns with two degrees of freedom 7 in 10 with 100 rows do, 97 in 100 with 200. A spline fits
lighter tails without it."""
SCALES = torch.linspace(-3.0, 1.2, 22, dtype=torch.float64).exp()[:, None]
"""Scales, in units of the scale of a normal distribution with the same quantile."""
MEAN_WEIGHT = 1 / 8
"""Mean of the exponential prior of a weight, which dominates for few rows; for 1,000 normal rows the weight is 0."""
LEAST_ROWS = 20
MEDIAN, FURTHER_OUT = 0.5, (0.75, 0.875)
"""Quantile of the distances beyond which the tail is fitted, and those beyond which it must not be lighter."""
LIGHTER = 2.0
"""Gain in nats, for rows further out, of no tail over the lightest heavy one, from which a heavy tail seen beyond the
median is dismissed: tens of nats for clusters that lie apart, less than 1.5 for Student's t, Pareto and log-normal
columns."""
FARTHEST = 0.01
"""Fraction of the rows beyond a quantile, at least one, that only counts as being further out than all others, however
far: an error among the rows says nothing about the others."""
POINTS = 256
"""Number of quantiles that represent the rows of a tail, as good as all of them for a single parameter."""


def tail_weight(distances: Tensor, row_weights: Tensor) -> Tensor:
    """Weight of the tail of the positive distances from the median; 0 if it is lighter further out, as for clusters.

    The outer half is fitted, with the scale at its maximum likelihood. The weight is the mean of its posterior.
    """
    is_on_side = distances > 0
    distances, row_weights = distances[is_on_side], row_weights[is_on_side]
    if len(distances) < LEAST_ROWS:
        return GRID[0]
    order = torch.from_numpy(np.argsort(distances.numpy()))  # takes a tenth of the time of torch's sort
    distances, row_weights = distances[order], row_weights[order]
    log_posterior = _log_likelihood(distances, row_weights, MEDIAN) - GRID / MEAN_WEIGHT
    posterior = (log_posterior - log_posterior.max()).exp()
    weight = torch.trapezoid(GRID * posterior, GRID) / torch.trapezoid(posterior, GRID)
    if weight > HEAVY and any(_is_light(distances, row_weights, quantile) for quantile in FURTHER_OUT):
        return GRID[0]
    return weight


def _is_light(distances: Tensor, row_weights: Tensor, quantile: float) -> bool:
    """Return whether the ordered distances beyond a quantile are likelier without a tail than with a heavy one."""
    log_likelihood = _log_likelihood(distances, row_weights, quantile)
    return bool(log_likelihood[0] > log_likelihood[GRID == HEAVY] + LIGHTER)


def _log_likelihood(distances: Tensor, row_weights: Tensor, quantile: float) -> Tensor:
    """Log-likelihood of the ordered distances beyond a quantile, for each weight, maximised over the scale."""
    below = row_weights.cumsum(0)
    start = int(torch.searchsorted(below, quantile * below[-1:]))
    beyond, counts = distances[start + 1 :] / distances[start], row_weights[start + 1 :]
    near = len(beyond) - max(1, math.ceil(FARTHEST * len(beyond)))
    if near < 1:
        return torch.zeros_like(GRID)
    farther = counts[near:].sum()
    beyond, counts = _thinned(beyond[:near], counts[:near])
    unit = torch.special.ndtri(torch.tensor((1 + quantile) / 2, dtype=torch.float64))
    x, log_slope = _normal(beyond * unit / SCALES)
    log_prob = log_slope - SCALES.log() - 0.5 * x.square() - 0.5 * math.log(2 * math.pi)
    edges, _ = _normal(torch.stack([unit, beyond[-1] * unit]) / SCALES)
    log_beyond, log_farther = torch.special.log_ndtr(-edges).unbind(-1)
    return (log_prob @ counts + farther * log_farther - (counts.sum() + farther) * log_beyond).amax(1)


def _normal(distances: Tensor) -> tuple[Tensor, Tensor]:
    """The normal variable x of scaled distances d, and log dx/dd, for each weight: (weights, scales, rows)."""
    weights = GRID[:, None, None]
    growth = weights * distances.square()
    is_linear = growth == 0
    x = torch.where(is_linear, distances, (growth.log1p() / torch.where(is_linear, 1.0, weights)).sqrt())
    return x, (distances / x).log() - growth.log1p()


def _thinned(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """At most `POINTS` of ordered values, each representing the same total count."""
    if len(values) <= POINTS:
        return values, counts
    below = counts.cumsum(0)
    levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * below[-1]
    return values[torch.searchsorted(below, levels)], (below[-1] / POINTS).expand(POINTS)
