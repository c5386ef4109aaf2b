"""Learning-rate schedule and convergence test for fitting a guide, and its return to the best weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

import torch
from torch import Tensor

__all__ = ["BestWeights", "Schedule"]

WARM_UP = 50
LEAST_WINDOW, WINDOW_SHARE = 100, 8
"""A window is the last eighth of the steps so far, at least 100: slow gains are observed for longer."""
GAIN = 0.005
"""Minimum gain of a window, in nats: a smaller one moves no mean by more than a tenth of its deviation."""
FAR, WORTH = 5.0, 0.05
"""Divergence from the posterior, in nats, beyond which draws cannot be reweighted, and the minimum fraction of it that
a window has to gain.

At that divergence one draw in ten thousand is effective, so that a further gain does not make the weights useful.
Below this fraction per window, covering half of the distance would take six times the steps so far.
"""
TRIM = 20
"""The losses are trimmed by one in 20 at either end of a window: a single outlier moves the mean of hundreds."""
HALVINGS = 5
LAST_PART = 0.3

ALL, MOST = 0.999, 0.99
"""Fractions of effective draws at which nothing is left to gain, and at which only the noise of the steps is.

The corresponding divergence, half of 1 / fraction - 1 nats, bounds errors of means by 0.03 and 0.1 standard deviations.
"""

QUARTILES = 1.349
"""Distance between the quartiles of a standard normal distribution."""

BLOCK = 25
FALL, SPREADS = 5.0, 10.0
"""Nats, and median deviations, by which a block of losses is far worse than the best."""


class Schedule:
    r"""Learning rate of each step: warm-up, halved whenever nothing more is gained, annealed near the end.

    Losses are averaged in windows of an eighth of the steps so far, at least 100. If the mean of a window does not
    improve on the best before it by its standard error and by 0.005 nats, the rate is halved; after five halvings the
    bound has converged. If the log weights of the draws are known, the rate is also halved after a window with 99 % of
    its draws effective, and at 99.9 % nothing is left to gain. It is also halved after a window that gains less than a
    twentieth of the remaining divergence, as estimated from the spread of the log weights, if that is more than 5 nats.
    If none of this has happened by 70 % of the steps, the rate falls to 1/32 over the rest.

    Args:
        learning_rate: Maximum learning rate.
        steps: Maximum number of steps.

    Attributes:
        effective: Fraction of effective draws in the last window; 0 if unknown.
    """

    def __init__(self, learning_rate: float, steps: int) -> None:
        self._highest, self._steps = learning_rate, steps
        self._taken, self._halvings, self._warm_from = 0, 0, 0
        self._best = math.inf
        self._window: list[float] = []
        self._weights: list[Tensor] = []
        self.effective = 0.0

    @property
    def stop_reason(self) -> str:
        """Reason why nothing is left to gain, in words; "" if there may be more."""
        if self.effective >= ALL:
            return f"{100 * self.effective:.2f} % of the draws are effective"
        return "the evidence lower bound has converged" if self._halvings >= HALVINGS else ""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        warm = min(1.0, (self._taken - self._warm_from + 1) / WARM_UP)
        annealed = 2.0 ** (-HALVINGS * max(0.0, 1 - (self._steps - self._taken) / (LAST_PART * self._steps)))
        return self._highest * warm * min(2.0**-self._halvings, annealed)

    def restart(self) -> None:
        """Warm up again, to half the rate, and discard the current window."""
        self._highest /= 2
        self._warm_from = self._taken
        self._window, self._weights = [], []

    def step(self, loss: float, log_weights: Tensor | None = None) -> bool:
        """Record a step's loss and, if known, the log weights of its draws.

        Returns:
            True if it ended a window that was no worse than the best, up to its standard error or 0.005 nats.
        """
        self._taken += 1
        self._window.append(loss)
        if log_weights is not None:
            self._weights.append(log_weights)
        if len(self._window) < max(LEAST_WINDOW, self._taken // WINDOW_SHARE):
            return False
        mean, error = self._mean()
        self.effective = _effective(self._weights)
        far = _nats_left(self._weights)
        if self.effective >= MOST or not mean < self._best - max(error, GAIN, WORTH * far if far > FAR else 0.0):
            self._halvings += 1
        # If steps have hardly any noise, rounding would decide otherwise, and might return an average over early steps.
        is_as_good_as_any = mean <= self._best + max(error, GAIN)
        self._best = min(self._best, mean)
        self._window, self._weights = [], []
        return is_as_good_as_any

    def ends_as_good_as_any(self) -> bool:
        """Return whether the losses since the last window, if any, are as good as the best."""
        if len(self._window) < 2:
            return False
        mean, error = self._mean()
        return mean <= self._best + max(error, GAIN)

    def _mean(self) -> tuple[float, float]:
        """Return the trimmed mean loss of the current window, and its standard error."""
        out = len(self._window) // TRIM
        losses = sorted(self._window)[out : len(self._window) - out]
        return fmean(losses), stdev(losses) / math.sqrt(len(losses))


def _effective(log_weights: Sequence[Tensor]) -> float:
    """Fraction of effective draws in several steps, from their log weights; 0 without any."""
    if not log_weights:
        return 0.0
    weights = torch.softmax(torch.cat(list(log_weights)).double(), 0)
    return float(1 / weights.square().sum()) / len(weights)


def _nats_left(log_weights: Sequence[Tensor]) -> float:
    """Divergence of a guide from the posterior in nats, from the spread of the log weights of several steps.

    For log-normal weights it is half the variance of their logarithms, which is estimated from quartiles, since these
    are robust to a few outliers. 0 without any.
    """
    if not log_weights:
        return 0.0
    # Step by step: the weights of a step shift together if the guide improves or the rows change.
    spreads = [weights.quantile(0.75) - weights.quantile(0.25) for weights in log_weights]
    return float(torch.stack(spreads).mean() / QUARTILES) ** 2 / 2


class BestWeights:
    r"""The best weights so far, by the median loss of 25 steps, and a test whether the current ones are far worse.

    The weights of a block of steps are those at its start, which the losses of the block measure. A block is far worse
    if its median is above the best by 5 nats and ten times the median deviation of the best block.

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
        """Return whether the losses since the last block are far worse than those of the best."""
        return bool(self._block) and median(self._block) > self._loss + self._margin

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to the best weights."""
        for parameter, value in zip(self._parameters, self._best, strict=True):
            parameter.copy_(value)
        self._first, self._block = self._best, []

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]
