"""State of a fit, as stored in a checkpoint, and the schedule of the learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_maf._core.optimization import Adam, WeightAverage
from pyro_maf._core.torch_state import generator_states, set_generator_states
from pyro_maf.distributions import Density
from pyro_maf.training.batches import Batches
from pyro_maf.training.objective import MaximumLikelihood
from pyro_maf.training.records import Checkpoint, Epoch

__all__ = ["WEIGHT_DECAY", "Schedule", "State", "overfitting"]

AVERAGED_EPOCHS = 2
AVERAGED_STEPS = 50
AVERAGING_ORDER = 8
WEIGHT_DECAY, RELAXED = 1e-6, 10.0
LEAST_TREND = 3
"""Minimum number of consecutive epochs that make a trend; or a sixth of the patience, if that is more."""


class Schedule:
    """Early stopping, and a schedule that lowers the decay or rate after a quarter of the patience without improvement.

    The weight decay is divided by 10, as often as `relaxations` allows; after that, the learning rate is halved.

    Args:
        learning_rate: Initial learning rate.
        patience: Number of epochs without a better validation loss after which to stop.
        weight_decay: Initial factor by which the weights are added to their gradients; by default the paper's.
        relaxations: How often the weight decay may be lowered.

    Attributes:
        learning_rate, weight_decay, relaxations: Current values.
        best: The lowest validation loss so far.
        best_epoch: The epoch of that loss.

    Example:
        >>> schedule = Schedule(learning_rate=1.0, patience=4)
        >>> [schedule.improves(epoch, loss) for epoch, loss in enumerate([3.0, 2.0, 2.5])]
        [True, True, False]
        >>> schedule.learning_rate, schedule.reason
        (0.5, None)
    """

    def __init__(
        self, learning_rate: float, patience: int, weight_decay: float = WEIGHT_DECAY, relaxations: int = 0
    ) -> None:
        self.learning_rate = learning_rate
        self.patience = patience
        self.weight_decay = weight_decay
        self.relaxations = relaxations
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
            self._lowered_at = epoch
            if self.relaxations:
                self.weight_decay /= RELAXED
                self.relaxations -= 1
            else:
                self.lower()
        return False

    def lower(self) -> None:
        """Halve the learning rate."""
        self.learning_rate /= 2
        self._lowered_at = self._epoch

    def state(self) -> dict[str, float]:
        """State to resume from, for `load`."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load(self, state: Mapping[str, float]) -> None:
        """Resume from a state; the patience is unaffected."""
        vars(self).update(state)

    @property
    def reason(self) -> str | None:
        """Reason for stopping if the patience is exhausted; otherwise None."""
        is_over = self._epoch - self.best_epoch >= self.patience
        return f"no better validation log-likelihood for {self.patience} epochs" if is_over else None


def overfitting(history: Sequence[Epoch], patience: int) -> str | None:
    """Reason for stopping if the last epochs overfit, which no lower learning rate mends; otherwise None.

    Their training losses are all lower than any up to the best epoch, so the optimisation works, and their validation
    losses are all higher than those of the same number of epochs before them.
    """
    length = max(LEAST_TREND, patience // 6)
    if len(history) <= 2 * length:
        return None
    train = [epoch.train_loss for epoch in history]
    validation = [epoch.validation_loss for epoch in history]
    best = validation.index(min(validation)) + 1
    before, last = validation[-2 * length : -length], validation[-length:]
    learns = best <= len(history) - 2 * length and max(train[-length:]) < min(train[:best])
    if learns and min(last) > max(before):
        return f"validation log-likelihood fell for {length} epochs while that of the training rows rose"
    return None


class State:
    """State of a fit, as stored in a checkpoint: weights, optimizer, average, schedule, position and history.

    Attributes:
        optimizer, average: Adam for the weights, and their average.
        best: State of the density with the best validation loss; empty before the first validation.
        train_loss, train_rows: Sum of the losses of the current epoch's steps, and number of their rows. The sum stays
            on its device, since reading it would synchronise.
        history: The epochs so far.
        skipped: Number of steps skipped because their loss or gradient was not finite.
        skipped_in_a_row, lowerings_in_a_row: Skipped steps, and returns to the best weights, since the last step.
        stop_reason: Reason for stopping before the last epoch, other than patience.
        interrupted: True if the reason is an interruption.
    """

    def __init__(self, density: Density, objective: MaximumLikelihood, batches: Batches, schedule: Schedule) -> None:
        self.density = density
        self.batches = batches
        self.schedule = schedule
        self._split, weights = objective.split, objective.weights
        self._device = weights[0].device
        self.optimizer = Adam(weights, schedule.weight_decay)
        steps = max(AVERAGED_STEPS, AVERAGED_EPOCHS * len(batches))
        self.average = WeightAverage(weights, steps, order=AVERAGING_ORDER, with_initial=True)
        self.best: dict[str, Tensor] = {}
        self.train_loss: Tensor | float = 0.0
        self.train_rows = 0
        self.history: list[Epoch] = []
        self.skipped = self.skipped_in_a_row = self.lowerings_in_a_row = 0
        self.stop_reason: str | None = None
        self.interrupted = False
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Duration in seconds, including the time before the fit was resumed."""
        return time.monotonic() - self._began

    def taken_loss(self) -> float:
        """Return the mean loss of the steps so far, NaN if there were none, and start a new mean."""
        total, rows = self.train_loss, self.train_rows
        self.train_loss, self.train_rows = 0.0, 0
        return float(total) / rows if rows else math.nan

    def record_best(self) -> None:
        """Record the current weights and statistics as the best."""
        self.best = {name: tensor.detach().clone() for name, tensor in self.density.state_dict().items()}

    def restore_best(self) -> None:
        """Set the weights and statistics to the best, if any were recorded."""
        if self.best:
            self.density.load_state_dict(self.best)

    @property
    def reason(self) -> str | None:
        """Reason for stopping, or None: a recorded one, an exhausted patience, or overfitting."""
        return self.stop_reason or self.schedule.reason or overfitting(self.history, self.schedule.patience)

    def stop(self, reason: str, *, interrupted: bool = False) -> None:
        """Record the reason for stopping, unless one is recorded already."""
        if self.stop_reason is None:
            self.stop_reason, self.interrupted = reason, interrupted

    def checkpoint(self, taken: int) -> Checkpoint:
        """Return a checkpoint, with `taken` batches of the current epoch done."""
        loss = self.train_loss
        tensors = {
            **_named("density", self.density.state_dict()),
            **_named("kept", self.best),
            **_named("average", dict(enumerate(self._split(self.average.values)))),
            **_named("global", generator_states(self._device)),
            "order": self.batches.order(taken),
            "training_loss": loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64),
        }
        for number, state in enumerate(self._states()):
            tensors.update(_named(f"optimizer/{number}", state))
        facts = {
            "taken": taken,
            "history": self.history,
            "seconds": self.seconds,
            "schedule": self.schedule.state(),
            "averaged": self.average.taken,
            "training_rows": self.train_rows,
            "skipped": [self.skipped, self.skipped_in_a_row, self.lowerings_in_a_row],
            # An interruption is over when the fit is resumed, and patience may be raised.
            "stop_reason": None if self.interrupted else self.stop_reason,
        }
        return Checkpoint(tensors, facts)

    def load(self, checkpoint: Checkpoint, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ValueError: If this fit could not have written it.
        """
        like = self.checkpoint(0)
        like.facts["history"] = [Epoch(0.0, 0.0, 0.0, 0.0, 0)]
        like.tensors.update(_named("kept", self.density.state_dict()))
        checkpoint.check(path, like)
        facts, device = checkpoint.facts, self._device
        self.history = [Epoch(*epoch) for epoch in facts["history"]]
        self.schedule.load(facts["schedule"])
        self.optimizer.weight_decay = self.schedule.weight_decay
        self.skipped, self.skipped_in_a_row, self.lowerings_in_a_row = facts["skipped"]
        self.batches.load(checkpoint.tensors["order"], facts["taken"])
        self.stop_reason = facts["stop_reason"]
        self._began -= facts["seconds"]
        self.best = checkpoint.under("kept")
        self.density.load_state_dict(checkpoint.under("density"))
        average = checkpoint.under("average")
        for number, parameter in enumerate(self._split(self.average.values)):
            parameter.copy_(average[str(number)])
        self.average.load(self.average.values, facts["averaged"])
        for number, state in enumerate(self._states()):
            for name, tensor in checkpoint.under(f"optimizer/{number}").items():
                state[name].copy_(tensor)
        if facts["training_rows"]:
            self.train_loss = checkpoint.tensors["training_loss"].to(device)
            self.train_rows = facts["training_rows"]
        set_generator_states(checkpoint.under("global"), device)

    def _states(self) -> list[dict[str, Tensor]]:
        """State of the optimizer for each weight of the density."""
        states = self.optimizer.states
        moments = [self._split([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
        # A weight that is joined with others has taken as many steps as they.
        steps = [state["step"] for state in states] * (len(moments[0]) // len(states))
        each = zip(steps, *moments, strict=True)
        return [dict(zip(("step", "exp_avg", "exp_avg_sq"), state, strict=True)) for state in each]


def _named(prefix: str, tensors: Mapping[str, Tensor] | Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
