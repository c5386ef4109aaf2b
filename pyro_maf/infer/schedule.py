"""How the learning rate of a guide falls, and when it is done."""

from __future__ import annotations

import math
from statistics import fmean, stdev

__all__ = ["Schedule"]

WARM_UP = 50
WINDOW = 200
CUTS = 5
LAST_PART = 0.3


class Schedule:
    r"""The learning rate of each step: warm-up, halved whenever the bound has stopped rising, annealed near the end.

    Losses are looked at in windows of 200 steps. Where the mean of a window is no better than the best before it, by
    more than its own standard error, the rate is halved; after five halvings there is nothing more to gain, and the
    bound has converged. Should that not have happened by seventy per cent of the steps, the rate falls to a
    thirty-second over the rest.

    Args:
        learning_rate: The highest.
        steps: The most there will be.

    Attributes:
        is_as_good_as_any: Whether the last window was no worse than the best, up to its standard error.
    """

    def __init__(self, learning_rate: float, steps: int) -> None:
        self._highest, self._steps = learning_rate, steps
        self._taken, self._cuts, self._warm_from = 0, 0, 0
        self._best = math.inf
        self._window: list[float] = []
        self.is_as_good_as_any = False

    @property
    def converged(self) -> bool:
        """Whether the bound has stopped rising for good."""
        return self._cuts >= CUTS

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        warm = min(1.0, (self._taken - self._warm_from + 1) / WARM_UP)
        annealed = 2.0 ** (-CUTS * max(0.0, 1 - (self._steps - self._taken) / (LAST_PART * self._steps)))
        return self._highest * warm * min(2.0**-self._cuts, annealed)

    def restart(self) -> None:
        """Warm up again, to half the rate, and leave out the present window."""
        self._highest /= 2
        self._warm_from = self._taken
        self._window = []

    def step(self, loss: float) -> bool:
        """Take note of a step's loss; true where it ended a window."""
        self._taken += 1
        self._window.append(loss)
        if len(self._window) < WINDOW:
            return False
        mean, error = self._mean()
        if not mean < self._best - error:
            self._cuts += 1
        self.is_as_good_as_any = mean <= self._best + error
        self._best = min(self._best, mean)
        self._window = []
        return True

    def ends_as_good_as_any(self) -> bool:
        """Whether the losses since the last window, if there are any, are no worse than the best."""
        if len(self._window) < 2:
            return False
        mean, error = self._mean()
        return mean <= self._best + error

    def _mean(self) -> tuple[float, float]:
        """Of the present window, with its standard error."""
        return fmean(self._window), stdev(self._window) / math.sqrt(len(self._window))
