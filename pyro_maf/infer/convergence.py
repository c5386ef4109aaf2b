"""Learning rate schedule and convergence test of a guide's fit, and its return to the best weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

import torch
from torch import Tensor

__all__ = ["BestWeights", "Schedule"]

WARM_UP = 50
WINDOW = 200
HALVINGS = 5
LAST_PART = 0.3

BLOCK = 25
FALL, SPREADS = 5.0, 10.0
"""Nats, and median deviations, by which a block of losses is far worse than the best."""


class Schedule:
    r"""Learning rate of each step: warm-up, halved whenever the bound has stopped rising, annealed near the end.

    Losses are averaged in windows of 200 steps. If the mean of a window is not better than the best before it by more
    than its standard error, the rate is halved; after five halvings the bound has converged. If that has not happened
    by 70 % of the steps, the rate falls to 1/32 over the rest.

    Args:
        learning_rate: Maximum learning rate.
        steps: Maximum number of steps.

    Attributes:
        is_as_good_as_any: True if the last window was no worse than the best, up to its standard error.
    """

    def __init__(self, learning_rate: float, steps: int) -> None:
        self._highest, self._steps = learning_rate, steps
        self._taken, self._halvings, self._warm_from = 0, 0, 0
        self._best = math.inf
        self._window: list[float] = []
        self.is_as_good_as_any = False

    @property
    def converged(self) -> bool:
        """True after the last halving, if the bound has stopped rising."""
        return self._halvings >= HALVINGS

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        warm = min(1.0, (self._taken - self._warm_from + 1) / WARM_UP)
        annealed = 2.0 ** (-HALVINGS * max(0.0, 1 - (self._steps - self._taken) / (LAST_PART * self._steps)))
        return self._highest * warm * min(2.0**-self._halvings, annealed)

    def restart(self) -> None:
        """Warm up again, to half the rate, and leave out the present window."""
        self._highest /= 2
        self._warm_from = self._taken
        self._window = []

    def step(self, loss: float) -> bool:
        """Record a step's loss; return True if it ended a window."""
        self._taken += 1
        self._window.append(loss)
        if len(self._window) < WINDOW:
            return False
        mean, error = self._mean()
        if not mean < self._best - error:
            self._halvings += 1
        self.is_as_good_as_any = mean <= self._best + error
        self._best = min(self._best, mean)
        self._window = []
        return True

    def ends_as_good_as_any(self) -> bool:
        """Return True if the losses since the last window, if any, are no worse than the best."""
        if len(self._window) < 2:
            return False
        mean, error = self._mean()
        return mean <= self._best + error

    def _mean(self) -> tuple[float, float]:
        """Return the mean loss of the present window, and its standard error."""
        return fmean(self._window), stdev(self._window) / math.sqrt(len(self._window))


class BestWeights:
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

    def step(self, loss: float) -> bool:
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
    def restore(self) -> None:
        """Set the parameters to the best weights."""
        for parameter, value in zip(self._parameters, self._best, strict=True):
            parameter.copy_(value)
        self._first, self._block = self._best, []

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]
