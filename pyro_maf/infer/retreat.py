"""Return to the best weights after divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

__all__ = ["Retreat"]

BLOCK = 25
FALL, SPREADS = 5.0, 10.0


class Retreat:
    r"""The best weights so far, by the median loss of 25 steps, and a test for far worse present ones.

    The weights of a block of steps are those at its beginning, which the losses of the block measure. A block is far
    worse if its median is above the best by 5 nats and ten times the median deviation of the best block.

    Args:
        parameters: The parameters that the optimizer changes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._best = self._first = self._copies()
        self._loss, self._margin = math.inf, 0.0
        self._block: list[float] = []

    def is_due(self, loss: float) -> bool:
        """Record a step's loss; return True if it ended a block far worse than the best."""
        self._block.append(loss)
        if len(self._block) < BLOCK:
            return False
        if self.has_fallen():
            return True
        middle = median(self._block)
        if middle < self._loss:
            self._best, self._loss = self._first, middle
            self._margin = FALL + SPREADS * median(abs(each - middle) for each in self._block)
        self._first, self._block = self._copies(), []
        return False

    def has_fallen(self) -> bool:
        """Return True if the losses since the last block are far worse than those of the best."""
        return bool(self._block) and median(self._block) > self._loss + self._margin

    @torch.no_grad()
    def take(self) -> None:
        """Set the parameters to the best weights."""
        for parameter, value in zip(self._parameters, self._best, strict=True):
            parameter.copy_(value)
        self._first, self._block = self._best, []

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]
