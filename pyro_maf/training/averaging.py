"""The average of weights that move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """An exponential average of weights.

    Args:
        weights: What it follows.
        steps: How many of the last steps it averages over, give or take.

    Attributes:
        values: The average of each weight.
        taken: How many steps it has followed.
    """

    def __init__(self, weights: list[nn.Parameter], steps: int) -> None:
        self._weights = weights
        self._steps = steps
        self.start()

    def start(self) -> None:
        """Begin with the weights as they are."""
        self.go_on([weight.detach().clone() for weight in self._weights], 0)

    def go_on(self, values: list[Tensor], taken: int) -> None:
        """Begin where another average had come to."""
        self.values = values
        self.taken = taken

    def follow(self) -> None:
        """Take in the weights after a step. Early on it averages over fewer, so that it forgets the start."""
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
