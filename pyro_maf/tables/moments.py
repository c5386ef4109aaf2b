"""Moments of columns: a location and a scale that are robust to a few outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["NORMAL_QUARTILES", "Moments", "context_moments_of", "moments_of", "plain_moments_of", "quantiles"]

NORMAL_QUARTILES = 1.3490
NORMAL_TAILS = 3.2897
"""Distance in standard deviations of a normal distribution between its quartiles, and between its 5 % quantiles."""
FENCE = 10.0
MOST_BEYOND = 0.1
OUTLIERS = 0.005
MOST_ENTRIES = 2**22
"""Number of entries of contexts that are measured, if they are so together."""


class Moments(NamedTuple):
    """Location and scale of each column, (D,) each."""

    loc: Tensor
    scale: Tensor

    def float(self) -> Moments:
        """Round to float32."""
        return Moments(self.loc.float(), self.scale.float())


def plain_moments_of(table: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of the columns of `table`, outliers and all, in float64; a constant one has scale 1.

    Example:
        >>> plain_moments_of(torch.tensor([[1.0], [2.0], [6.0]])).loc
        tensor([3.], dtype=torch.float64)
    """
    # In units of a power of two of a column's size, so that squares neither overflow nor vanish.
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
    r"""Return mean and standard deviation of the columns of `table`, its outliers moved to a fence; in float64.

    The fence lies 10 standard deviations on either side of the median, those of a normal distribution with the column's
    quartiles: far enough to leave ordinary columns unchanged, and near enough for one value at 1e6 to count as little
    as one at 10. The data are not clipped: a tail beyond the fence is as far out as it is in these units. Where more
    than a tenth of the rows lie beyond it, the 5% and 95% quantiles take the quartiles' place; where half of the rows
    share one value and fewer than a tenth have another, the median distance of those does. A constant column has scale
    1.

    Args:
        table: Rows, (N, D).
        most_beyond: A column with a larger fraction of its rows beyond the fence has no fence.
        weights: How often each row counts, (N,), here and in quartiles and fractions; by default once.

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
    # A column at a time: a sorted copy of all of them might not fit.
    columns = (column.double() for column in table.detach().unbind(1))
    often = None if weights is None else weights.double().numpy()
    clamped = (column.clamp(*_fence(column.numpy(), most_beyond, often)) for column in columns)
    each = [[*map(float, plain_moments_of(column[:, None], weights))] for column in clamped]
    return Moments(*torch.tensor(each, dtype=torch.float64).reshape(-1, 2).T.contiguous())


def context_moments_of(table: Tensor, weights: Tensor | None = None, *, together: bool = False) -> Moments:
    """Moments of a context: as `moments_of`, but with a fence against a few outliers only, up to one row in 200.

    A network takes a context linearly: in units of its bulk, the rows of a heavy tail would be so far out that they
    would dominate the steps of a fit. `together`, all columns, the entries of an image, a series or a set, have the
    units of all of them: units of each would blow up a margin that hardly varies, and take an image's shades.
    """
    if not together:
        return moments_of(table, OUTLIERS, weights)
    some = slice(None, None, -(-table.numel() // MOST_ENTRIES))
    table, width = table[some], table.shape[1]
    often = None if weights is None else weights[some].repeat_interleave(width)
    loc, scale = moments_of(table.reshape(-1, 1), OUTLIERS, often)
    return Moments(loc.expand(width), scale.expand(width))


def quantiles(
    column: NDArray[np.float64], levels: list[float], weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Quantiles; with weights, the smallest value with a fraction of at least the level at or below it."""
    if weights is None:
        return np.quantile(column, levels)
    order = np.argsort(column)
    below = weights[order].cumsum()
    return column[order[np.searchsorted(below, np.multiply(levels, below[-1]))]]


def _fence(column: NDArray[np.float64], most_beyond: float, weights: NDArray[np.float64] | None) -> tuple[float, float]:
    """Lower and upper fence of a column."""
    tail, low, median, high, other_tail = quantiles(column, [0.05, 0.25, 0.5, 0.75, 0.95], weights)
    reach = FENCE * (high - low) / NORMAL_QUARTILES
    apart = np.abs(column - median)
    if np.average(apart > reach, weights=weights) > MOST_BEYOND:
        reach = FENCE * (other_tail - tail) / NORMAL_TAILS
    elif not reach and (others := apart[apart > 0]).size:
        reach = FENCE * quantiles(others, [0.5], None if weights is None else weights[apart > 0])[0]
    if np.average(apart > reach, weights=weights) > most_beyond:
        reach = np.inf
    return float(median - reach), float(median + reach)
