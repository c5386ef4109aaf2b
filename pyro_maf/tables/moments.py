"""Location and scale of columns, robust against outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["NORMAL_QUARTILES", "Moments", "context_moments_of", "moments_of", "plain_moments_of", "quantiles"]

NORMAL_QUARTILES, NORMAL_TAILS = 1.3490, 3.2897
"""Distances, in standard deviations, between the quartiles and between the 5 % quantiles of a normal distribution."""
FENCE = 10.0
"""Distance of the fence from the median, in standard deviations."""
MOST_BEYOND = 0.1
"""Fraction of rows beyond a fence estimated from the quartiles from which on the 5 % quantiles replace them."""
OUTLIERS = 0.005
"""Maximum fraction of rows of a context that have a fence."""
MOST_ENTRIES = 2**22
"""Maximum number of context entries that are measured if they share their units."""


class Moments(NamedTuple):
    """Location and scale of each column, (D,) each."""

    loc: Tensor
    scale: Tensor

    def float(self) -> Moments:
        """Round to float32."""
        return Moments(self.loc.float(), self.scale.float())


def plain_moments_of(table: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each column, outliers included, in float64; a constant column has scale 1.

    Example:
        >>> plain_moments_of(torch.tensor([[1.0], [2.0], [6.0]])).loc
        tensor([3.], dtype=torch.float64)
    """
    # In units of a power of two near a column's size, so that squares neither overflow nor underflow.
    largest = table.abs().amax(0).double()
    size = torch.where(largest > 0, largest / (2 * largest.frexp().mantissa), 1.0)
    table = table.double() / size
    if weights is None:
        variance, mean = torch.var_mean(table, 0, correction=0)
    else:
        share = weights.double() / weights.double().sum()
        mean = share @ table
        variance = share @ (table - mean).square()
    deviation = variance.sqrt() * size
    return Moments(mean * size, torch.where(deviation > 0, deviation, 1.0))


def moments_of(table: Tensor, most_beyond: float = 1.0, weights: Tensor | None = None) -> Moments:
    r"""Mean and standard deviation of each column, with outliers moved to a fence, in float64.

    The fence lies 10 standard deviations on either side of the median, as estimated from the quartiles: far enough to
    leave ordinary columns unchanged, and near enough for a value of 1e6 to count no more than one of 10. The data are
    not clipped: a value beyond the fence stays where it is, in these units. If more than a tenth of the rows lie beyond
    it, the 5 % and 95 % quantiles replace the quartiles; if half of the rows share one value and fewer than a tenth
    have another, the median distance of the latter does. A constant column has scale 1.

    Args:
        table: Rows, (N, D).
        most_beyond: A column with a larger fraction of its rows beyond the fence has no fence.
        weights: Weight of each row, (N,), also for quartiles and fractions; by default 1.

    Cost: a partial sort of each column.

    Example:
        >>> rows = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
        >>> moments_of(rows).loc.tolist(), moments_of(rows).scale.tolist()
        ([2.0, 7.0], [1.0, 1.0])
        >>> normal = torch.randn(9000, 1, generator=torch.Generator().manual_seed(0))
        >>> normal[0] = 1e6
        >>> round(moments_of(normal).scale.item(), 1)
        1.0
    """
    moments = Moments(*torch.empty(2, table.shape[1], dtype=torch.float64))
    # One column at a time, since a sorted copy of all of them might not fit in memory.
    for index, column in enumerate(table.detach().unbind(1)):
        values = column.double()
        within = values.clamp(*_fence(values, most_beyond, weights))
        loc, scale = plain_moments_of(within[:, None], weights)
        moments.loc[index], moments.scale[index] = loc, scale
    return moments


def context_moments_of(table: Tensor, weights: Tensor | None = None, *, together: bool = False) -> Moments:
    """Moments of a context, like `moments_of`, but with a fence only against few outliers, up to one row in 200.

    A network takes a context linearly. In units of the bulk, rows of a heavy tail would be so far out that they would
    dominate the gradient. With `together`, all entries of an image, series or set share their units: units per entry
    would amplify a margin that hardly varies, and remove an image's shades.
    """
    if not together:
        return moments_of(table, OUTLIERS, weights)
    some = slice(None, None, -(-table.numel() // MOST_ENTRIES))
    table, width = table[some], table.shape[1]
    row_weights = None if weights is None else weights[some].repeat_interleave(width)
    loc, scale = moments_of(table.reshape(-1, 1), OUTLIERS, row_weights)
    return Moments(loc.expand(width), scale.expand(width))


def _fence(column: Tensor, most_beyond: float, weights: Tensor | None) -> tuple[float, float]:
    """Lower and upper fence of a column."""
    tail, low, median, high, other_tail = quantiles(column, (0.05, 0.25, 0.5, 0.75, 0.95), weights)
    values, row_weights = column.numpy(), None if weights is None else weights.double().numpy()
    apart = np.abs(values - median)
    reach = FENCE * (high - low) / NORMAL_QUARTILES
    if np.average(apart > reach, weights=row_weights) > MOST_BEYOND:
        reach = FENCE * (other_tail - tail) / NORMAL_TAILS
    elif not reach and (others := apart > 0).any():
        (distance,) = quantiles(torch.from_numpy(apart[others]), (0.5,), None if weights is None else weights[others])
        reach = FENCE * distance
    if np.average(apart > reach, weights=row_weights) > most_beyond:
        reach = math.inf
    return median - reach, median + reach


def quantiles(column: Tensor, levels: Sequence[float], weights: Tensor | None) -> list[float]:
    """Quantiles; with weights, the smallest value up to which the weights sum to at least the level."""
    values = column.numpy()
    if weights is None:
        return np.quantile(values, levels).tolist()
    order = np.argsort(values)
    below = weights.double().numpy()[order].cumsum()
    return values[order[np.searchsorted(below, np.multiply(levels, below[-1]))]].tolist()
