"""Learning rate schedule and convergence test of a guide."""

from __future__ import annotations

import math
from statistics import fmean, stdev

__all__ = ["Schedule"]

WARM_UP = 50
WINDOW = 200
CUTS = 5
LAST_PART = 0.3


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
        self._taken, self._cuts, self._warm_from = 0, 0, 0
        self._best = math.inf
        self._window: list[float] = []
        self.is_as_good_as_any = False

    @property
    def converged(self) -> bool:
        """True after the last halving, if the bound has stopped rising."""
        return self._cuts >= CUTS

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        warm = min(1.0, (self._taken - self._warm_from + 1) / WARM_UP)
        annealed = 2.0 ** (-CUTS * max(0.0, 1 - (self._steps - self._taken) / (LAST_PART * self._steps)))
        return self._highest * warm * min(2.0**-self._cuts, annealed)

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
            self._cuts += 1
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
