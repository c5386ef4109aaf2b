"""Exponential average of weights that oscillate around an optimum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""Exponential average of weights, which at first is over fewer steps, to forget the initial weights.

    Step n takes the average a to a + f (w - a) with f = max(1 / steps, (1 + q) / (n + s + q)): a polynomial-decay
    average of order q, of the s = 1 or 0 initial weights and those after each step, until it spans `steps` of them.

    Args:
        weights: The weights to average, which the optimizer changes in place.
        steps: Approximate number of the last steps that it averages over.
        order: The order q: 0 for the plain mean at first, higher to forget faster.
        with_initial: Whether the initial weights are the first of those averaged.

    Attributes:
        values: The average of each weight.
        taken: Number of steps so far.

    Example:
        >>> weight = torch.zeros(1)
        >>> average = WeightAverage([weight], steps=10)
        >>> for value in (1.0, 2.0, 3.0):
        ...     _ = weight.fill_(value)
        ...     average.add()
        >>> average.values[0]
        tensor([2.])

    Reference:
        Shamir & Zhang, *Stochastic Gradient Descent for Non-smooth Optimization*, 2013, section 4.
    """

    def __init__(self, weights: Sequence[Tensor], steps: int, *, order: int = 0, with_initial: bool = False) -> None:
        self._weights = list(weights)
        self._steps = steps
        self._order = order
        self._initial = int(with_initial)
        self._best: list[Tensor] | None = None
        self.restart()

    def restart(self) -> None:
        """Restart the average from the present weights; the best average stays."""
        self.load([weight.detach().clone() for weight in self._weights], 0)

    def load(self, values: list[Tensor], taken: int) -> None:
        """Resume from the values and the number of steps of another average."""
        self.values = values
        self.taken = taken

    @torch.no_grad()
    def add(self) -> None:
        """Add the weights after a step."""
        self.taken += 1
        fraction = max(1 / self._steps, (1 + self._order) / (self.taken + self._initial + self._order))
        torch._foreach_lerp_(self.values, self._weights, fraction)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for weight, average in zip(self._weights, self.values, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    def record_best(self) -> None:
        """Record the present average as the best."""
        self._best = [value.clone() for value in self.values]

    @torch.no_grad()
    def use_best(self) -> None:
        """Set the weights to the best average, or to the present one if none was recorded."""
        for weight, value in zip(self._weights, self._best or self.values, strict=True):
            weight.copy_(value)
