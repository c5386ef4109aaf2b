"""Exponential average of weights in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential average of weights.

    Args:
        weights: The weights to average.
        steps: Approximate number of the last steps that it averages over.

    Attributes:
        values: The average of each weight.
        taken: Number of steps so far.
    """

    def __init__(self, weights: list[nn.Parameter], steps: int) -> None:
        self._weights = weights
        self._steps = steps
        self.start()

    def start(self) -> None:
        """Start from the present weights."""
        self.go_on([weight.detach().clone() for weight in self._weights], 0)

    def go_on(self, values: list[Tensor], taken: int) -> None:
        """Resume from the state of another average."""
        self.values = values
        self.taken = taken

    def follow(self) -> None:
        """Add the weights after a step. The first averages are over fewer steps, to forget the initial weights."""
        self.taken += 1
        fraction = max(1 / self._steps, 9 / (self.taken + 9))
        torch._foreach_lerp_(self.values, [weight.detach() for weight in self._weights], fraction)

    def swap(self) -> None:
        """Exchange the weights and their average."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self.values, strict=True):
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)
