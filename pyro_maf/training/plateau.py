"""Learning rate schedule and early stopping."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Schedule"]


class Schedule:
    """Halving of the learning rate after a quarter of the patience without a better validation loss; early stopping.

    Args:
        learning_rate: Initial learning rate.
        patience: Number of epochs without a better validation loss after which to stop.

    Attributes:
        learning_rate: Present learning rate.
        best: The lowest validation loss so far.
        best_epoch: The epoch of that loss.

    Example:
        >>> schedule = Schedule(learning_rate=1.0, patience=4)
        >>> [schedule.improves(epoch, loss) for epoch, loss in enumerate([3.0, 2.0, 2.5])]
        [True, True, False]
        >>> schedule.learning_rate, schedule.reason
        (0.5, None)
    """

    def __init__(self, learning_rate: float, patience: int) -> None:
        self.learning_rate = learning_rate
        self.patience = patience
        self.best = math.inf
        self.best_epoch = 0
        self._epoch = 0
        self._lowered_at = 0

    def improves(self, epoch: int, validation_loss: float) -> bool:
        """Record a validation loss; return True if it is the best so far."""
        self._epoch = epoch
        if validation_loss < self.best:
            self.best, self.best_epoch = validation_loss, epoch
            return True
        if epoch - max(self.best_epoch, self._lowered_at) >= max(1, self.patience // 4):
            self.lower()
        return False

    def lower(self) -> None:
        """Halve the learning rate."""
        self.learning_rate /= 2
        self._lowered_at = self._epoch

    def state(self) -> dict[str, Any]:
        """State to resume from, for `load`."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state, except for its patience."""
        vars(self).update(state)

    @property
    def reason(self) -> str | None:
        """Reason for stopping, that the patience is exhausted; or None."""
        is_over = self._epoch - self.best_epoch >= self.patience
        return f"no better validation log-likelihood for {self.patience} epochs" if is_over else None
