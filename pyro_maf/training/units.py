"""The units that columns come in: their means and standard deviations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "Units", "units_of"]

BLOCK_ROWS = 2**16


class Units(NamedTuple):
    """Mean and standard deviation of each column."""

    loc: Tensor
    scale: Tensor


class Moments:
    """Mean, variance and range of columns whose rows come block by block, summed up in float64.

    Attributes:
        low, high: The range of each column so far.

    Example:
        >>> moments = Moments()
        >>> for block in (torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])):
        ...     moments.add(block)
        >>> moments.units(torch.float32).loc, moments.high
        (tensor([3.]), tensor([6.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._rows = 0
        self._mean = self._squares = self.low = self.high = torch.zeros(())

    def add(self, table: Tensor) -> None:
        """Take in the rows of a block."""
        table = table.double()
        variance, mean = torch.var_mean(table, 0, correction=0)
        low, high = table.aminmax(dim=0)
        if not self._rows:
            self._mean, self._squares, self.low, self.high = mean, torch.zeros_like(mean), low, high
        total = self._rows + len(table)
        apart = mean - self._mean
        self._squares = self._squares + len(table) * (variance + apart**2 * self._rows / total)
        self._mean = self._mean + apart * len(table) / total
        self.low, self.high = self.low.minimum(low), self.high.maximum(high)
        self._rows = total

    def units(self, dtype: torch.dtype) -> Units:
        """Mean and deviation; a column that does not vary keeps its scale."""
        deviation = (self._squares / self._rows).sqrt()
        scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        return Units(self._mean.to(dtype), scale.to(dtype))


def units_of(table: Tensor) -> Units:
    """Mean and standard deviation of the columns of `table`, in its dtype; a column that does not vary keeps its scale.

    Example:
        >>> units_of(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
        Units(loc=tensor([2., 7.]), scale=tensor([1., 1.]))
    """
    moments = Moments()
    for block in table.split(BLOCK_ROWS):
        moments.add(block)
    return moments.units(table.dtype)
