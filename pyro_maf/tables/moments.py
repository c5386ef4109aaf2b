"""Moments of columns: a location and a scale that are robust to a few outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Moments", "RunningMoments", "context_moments_of", "moments_of"]

BLOCK_ROWS = 2**16
NORMAL_QUARTILES = 1.3490
NORMAL_TAILS = 3.2897
"""Distance in standard deviations of a normal distribution between its quartiles, and between its 5 % quantiles."""
FENCE = 10.0
MOST_BEYOND = 0.1
OUTLIERS = 0.005


class Moments(NamedTuple):
    """Location and scale of each column, (D,) each, in float64."""

    loc: Tensor
    scale: Tensor

    def float(self) -> Moments:
        """Round to float32."""
        return Moments(self.loc.float(), self.scale.float())


class RunningMoments:
    """Mean, variance and range of columns, accumulated block by block in float64.

    Sums are taken in units of a power of two of the first block's size, so that squares neither overflow nor vanish.

    Attributes:
        low, high: The range of each column so far.

    Example:
        >>> running = RunningMoments()
        >>> for block in (torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])):
        ...     running.add(block)
        >>> running.moments().loc, running.high
        (tensor([3.], dtype=torch.float64), tensor([6.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._rows = 0
        self._size = self._mean = self._squares = self.low = self.high = torch.zeros(())

    def add(self, table: Tensor) -> None:
        """Add the rows of a block."""
        table = table.double()
        low, high = table.aminmax(dim=0)
        if not self._rows:
            self._size = _power_of_two(low.abs().maximum(high.abs()))
        variance, mean = torch.var_mean(table / self._size, 0, correction=0)
        if not self._rows:
            self._mean, self._squares, self.low, self.high = mean, torch.zeros_like(mean), low, high
        total = self._rows + len(table)
        apart = mean - self._mean
        self._squares = self._squares + len(table) * (variance + apart**2 * self._rows / total)
        self._mean = self._mean + apart * len(table) / total
        self.low, self.high = self.low.minimum(low), self.high.maximum(high)
        self._rows = total

    def moments(self) -> Moments:
        """Return mean and standard deviation; a constant column has scale 1."""
        deviation = (self._squares / self._rows).sqrt() * self._size
        return Moments(self._mean * self._size, torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


def moments_of(table: Tensor, most_beyond: float = 1.0) -> Moments:
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
    fences = [_fence(column.double().numpy(), most_beyond) for column in table.detach().unbind(1)]
    low, high = torch.tensor(fences, dtype=torch.float64).reshape(-1, 2).unbind(1)
    running = RunningMoments()
    for block in table.split(BLOCK_ROWS):
        running.add(block.double().clamp(low, high))
    return running.moments()


def context_moments_of(table: Tensor) -> Moments:
    """Moments of a context: as `moments_of`, but with a fence against a few outliers only, up to one row in 200.

    A network takes a context linearly: in units of its bulk, the rows of a heavy tail would be so far out that they
    would dominate the steps of a fit.
    """
    return moments_of(table, OUTLIERS)


def _power_of_two(value: Tensor) -> Tensor:
    """The power of two of the size of each value, by which a division is exact; 1 for 0."""
    return torch.where(value > 0, torch.ldexp(torch.ones_like(value), value.frexp().exponent - 1), 1.0)


def _fence(column: NDArray[np.float64], most_beyond: float) -> tuple[float, float]:
    """Lower and upper fence of a column."""
    tail, low, median, high, other_tail = np.quantile(column, [0.05, 0.25, 0.5, 0.75, 0.95])
    reach = FENCE * (high - low) / NORMAL_QUARTILES
    apart = np.abs(column - median)
    if (apart > reach).mean() > MOST_BEYOND:
        reach = FENCE * (other_tail - tail) / NORMAL_TAILS
    elif not reach and (others := apart[apart > 0]).size:
        reach = FENCE * np.median(others)
    if (apart > reach).mean() > most_beyond:
        reach = np.inf
    return float(median - reach), float(median + reach)
