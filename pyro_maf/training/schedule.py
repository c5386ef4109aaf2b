"""When to lower the learning rate, and when to stop."""

from __future__ import annotations

import math
from typing import Any

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
        """Take note of a validation loss; whether it is the best yet."""
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
        """Where it is, for `go_on`."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def go_on(self, state: dict[str, Any]) -> None:
        """Be where another was; the patience stays this one's."""
        vars(self).update(state)

    @property
    def reason(self) -> str | None:
        """Why to end: that the patience is at its end; or None."""
        is_over = self._epoch - self.best_epoch >= self.patience
        return f"no better validation log-likelihood for {self.patience} epochs" if is_over else None
