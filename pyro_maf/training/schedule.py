"""When to lower the learning rate, and when to stop."""

from __future__ import annotations

import math

__all__ = ["Schedule"]


class Schedule:
    """Halves the learning rate when the validation loss has not improved for a while, and ends when it has not at all.

    Args:
        learning_rate: The first one.
        patience: Epochs without a better validation loss after which to end.

    Attributes:
        learning_rate: The one to use now.
        best: The lowest validation loss so far.
        best_epoch: The epoch it came after.

    Example:
        >>> schedule = Schedule(learning_rate=1.0, patience=4)
        >>> [schedule.improves(epoch, loss) for epoch, loss in enumerate([3.0, 2.0, 2.5])]
        [True, True, False]
        >>> schedule.learning_rate, schedule.is_over
        (0.5, False)
    """

    def __init__(self, learning_rate: float, patience: int) -> None:
        self.learning_rate = learning_rate
        self.patience = patience
        self.best = math.inf
        self.best_epoch = 0
        self._epoch = 0
        self._lowered_at = 0

    def improves(self, epoch: int, validation_loss: float) -> bool:
        """Take note of a validation loss; whether it is the best yet."""
        self._epoch = epoch
        if validation_loss < self.best:
            self.best, self.best_epoch = validation_loss, epoch
            return True
        if epoch - max(self.best_epoch, self._lowered_at) >= max(1, self.patience // 4):
            self.learning_rate /= 2
            self._lowered_at = epoch
        return False

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return self._epoch - self.best_epoch >= self.patience
