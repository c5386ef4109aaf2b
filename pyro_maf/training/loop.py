"""The loop of a fit: steps of Adam, validation of averaged weights after each epoch, checkpoints, and the end."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from pyro_maf._core.adam import Adam, clip
from pyro_maf._core.averaging import WeightAverage
from pyro_maf._core.interruption import Interruption
from pyro_maf._core.progress import Bar, bar
from pyro_maf.distributions import Density
from pyro_maf.tables import Rows
from pyro_maf.training.batches import Batches
from pyro_maf.training.checkpoint import Checkpoint, CheckpointFolder, generator_states, set_generator_states
from pyro_maf.training.log import Epoch, Log
from pyro_maf.training.objective import MaximumLikelihood, Mean
from pyro_maf.training.plateau import Schedule
from pyro_maf.training.processes import Processes

__all__ = ["Loop", "State"]

AVERAGED_EPOCHS = 2
AVERAGED_STEPS = 50
AVERAGING_ORDER = 8
WEIGHT_DECAY = 1e-6
SKIPPED_IN_A_ROW = 5
MOST_LOWERINGS = 10


class State:
    """State of a fit, all that a checkpoint holds: weights, optimizer, average, schedule, position and history.

    Args:
        density: The density to fit.
        weights: Its weights that are trained.
        batches: The training rows.
        schedule: Learning rate and patience.

    Attributes:
        optimizer: Adam over the weights.
        average: The average of the weights.
        best: State of the density with the best validation loss; empty before the first validation.
        train_loss: The mean loss of the present epoch's steps.
        history: The epochs so far.
        skipped: Number of steps left out because their loss or gradient was not finite.
        skipped_in_a_row, lowerings_in_a_row: Number of these, and of returns to the best weights, since the last step.
        stop_reason: Reason for ending before the last epoch, other than patience.
        interrupted: True if that was an interruption.
    """

    def __init__(
        self, density: Density, weights: list[torch.nn.Parameter], batches: Batches, schedule: Schedule
    ) -> None:
        self.density = density
        self.batches = batches
        self.schedule = schedule
        self._weights = weights
        self.start()
        self.best: dict[str, Tensor] = {}
        self.train_loss = Mean()
        self.history: list[Epoch] = []
        self.skipped = self.skipped_in_a_row = self.lowerings_in_a_row = 0
        self.stop_reason: str | None = None
        self.interrupted = False
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Duration in seconds, including the time before the fit was resumed."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Start optimizer and average from the present weights, on their device."""
        self.optimizer = Adam(self._weights, WEIGHT_DECAY)
        steps = max(AVERAGED_STEPS, AVERAGED_EPOCHS * len(self.batches))
        self.average = WeightAverage(self._weights, steps, order=AVERAGING_ORDER, with_initial=True)

    def record_best(self) -> None:
        """Record the present weights and statistics as the best."""
        self.best = {name: tensor.detach().clone() for name, tensor in self.density.state_dict().items()}

    def restore_best(self) -> None:
        """Set the weights and statistics to the best, if any were recorded."""
        if self.best:
            self.density.load_state_dict(self.best)

    def stop(self, reason: str, *, interrupted: bool = False) -> None:
        """Record the reason for ending, unless there is one."""
        if self.stop_reason is None:
            self.stop_reason, self.interrupted = reason, interrupted

    def checkpoint(self, taken: int) -> Checkpoint:
        """Return a checkpoint.

        Args:
            taken: Number of batches of the present epoch that are done.
        """
        tensors = {
            **_named("density", self.density.state_dict()),
            **_named("kept", self.best),
            **_named("average", dict(enumerate(self.average.values))),
            **_named("global", generator_states(self._weights[0].device)),
            "order": self.batches.order(taken),
            "training_loss": torch.as_tensor(self.train_loss.total),
        }
        for number, state in enumerate(self.optimizer.states):
            tensors.update(_named(f"optimizer/{number}", state))
        facts = {
            "taken": taken,
            "history": self.history,
            "seconds": self.seconds,
            "schedule": self.schedule.state(),
            "averaged": self.average.taken,
            "training_rows": self.train_loss.count,
            "skipped": [self.skipped, self.skipped_in_a_row, self.lowerings_in_a_row],
            # An interruption is over when the fit is resumed, and patience may be raised.
            "stop_reason": None if self.interrupted else self.stop_reason,
        }
        return Checkpoint(tensors, facts)

    def read(self, checkpoint: Checkpoint, path: Path) -> None:
        """Take over history and position from a checkpoint, after checking that this fit could have written it.

        Raises:
            ValueError: If it could not.
        """
        like = self.checkpoint(0)
        like.facts["history"] = [Epoch(0.0, 0.0, 0.0, 0.0, 0)]
        like.tensors.update(_named("kept", self.density.state_dict()))
        checkpoint.check(path, like)
        facts = checkpoint.facts
        self.history = [Epoch(*epoch) for epoch in facts["history"]]
        self.schedule.load(facts["schedule"])
        self.skipped, self.skipped_in_a_row, self.lowerings_in_a_row = facts["skipped"]
        self.batches.go_on(checkpoint.tensors["order"], facts["taken"])
        self.stop_reason = facts["stop_reason"]
        self._began -= facts["seconds"]
        self.best = checkpoint.under("kept")

    def load(self, checkpoint: Checkpoint) -> None:
        """Load weights, optimizer, average, loss so far and random states from a checkpoint."""
        device = self._weights[0].device
        self.density.load_state_dict(checkpoint.under("density"))
        average = checkpoint.under("average")
        values = [average[str(number)].to(device) for number in range(len(average))]
        self.average.load(values, checkpoint.facts["averaged"])
        self.optimizer.load([checkpoint.under(f"optimizer/{number}") for number in range(len(average))])
        if rows := checkpoint.facts["training_rows"]:
            self.train_loss.add(checkpoint.tensors["training_loss"].to(device), rows)
        set_generator_states(checkpoint.under("global"), device)


class Loop:
    """Minimisation of the mean negative log-likelihood with Adam, with the weights of the best validation loss.

    An exponential average of the weights is validated: it is better than any of them, and allows a high learning
    rate.

    Args:
        density: The density to fit, in the data's units.
        batches: The training rows.
        held_out: The validation rows.
        schedule: Learning rate and patience.
        max_epochs: Maximum number of epochs, those before a checkpoint included.
        max_grad_norm: Norm to which a step's gradient is clipped.
        interruption: Request to stop by the user.
        processes: The processes that take part.
        folder: Folder of checkpoints and log, if any.

    Attributes:
        state: State of the fit.
    """

    def __init__(
        self,
        density: Density,
        batches: Batches,
        held_out: Batches,
        *,
        schedule: Schedule,
        max_epochs: int,
        max_grad_norm: float,
        interruption: Interruption,
        processes: Processes,
        folder: CheckpointFolder | None = None,
    ) -> None:
        self._density = density
        self._batches = batches
        self._held_out = held_out
        self._schedule = schedule
        self._max_epochs = max_epochs
        self._max_grad_norm = max_grad_norm
        self._interruption = interruption
        self._processes = processes
        self._folder = folder
        self._objective = MaximumLikelihood(density, processes)
        self._log = Log(folder.folder) if folder is not None and processes.is_first else None
        self.state = State(density, self._objective.weights, batches, schedule)
        self._found = None if folder is None else folder.found
        if folder is not None and self._found is not None:
            self.state.read(self._found, folder.path)

    def run(self, progress: bool | str) -> None:
        """Train to the end; leave the density on its device with its best weights, in eval mode.

        Args:
            progress: As in `fit`.

        Raises:
            KeyboardInterrupt: At a second Ctrl-C.
        """
        device = self._objective.weights[0].device
        shown = progress if self._processes.is_first else False
        try:
            self._density.train()
            if self._goes_on:
                with (
                    nullcontext() if self._log is None else closing(self._log),
                    bar(shown, "{task.description} {task.fields[epoch]}", "{task.fields[losses]}") as line,
                ):
                    self._show(line)
                    self._begin(device)
                    while self._goes_on:
                        self._epoch(line)
        finally:
            self._interruption.settle()
            self._density.to(device)
            self.restore_best()
            self._density.eval()

    def restore_best(self) -> None:
        """Set the weights and statistics to those with the best validation loss, if any were validated."""
        self._objective.share_statistics(False)
        self.state.restore_best()

    def save(self, taken: int) -> None:
        """Write a checkpoint.

        Args:
            taken: Number of batches of the present epoch that are done.
        """
        if self._folder is not None and self._processes.is_first:
            self._folder.write(self.state.checkpoint(taken))

    @property
    def _goes_on(self) -> bool:
        is_over = self.state.stop_reason or self._schedule.reason
        return len(self.state.history) < self._max_epochs and not is_over

    @property
    def _is_due(self) -> bool:
        return self._folder is not None and self._folder.is_due

    @property
    def _is_interrupted(self) -> bool:
        """True if any of the processes was interrupted."""
        return bool(self._processes.total(float(self._interruption.requested))[0])

    def _begin(self, device: torch.device) -> None:
        """Bring the processes together, and resume; or record the initial weights, in case no others are better."""
        device = self._processes.launch(device)
        self._density.to(device)
        for rows in (self._batches, self._held_out):
            rows.to(device)
        self._processes.copy_first(self._objective.weights)
        self._objective.share_statistics(self._processes.are_several)
        self.state.start()
        found = int(self._processes.total(float(self._found is not None))[0])
        if 0 < found < self._processes.count:
            raise ValueError(
                f"fit expected a folder that all processes share, but only {found} of {self._processes.count} found a "
                "fit to go on with there."
            )
        if self._found is not None:
            self.state.load(self._found)
            return
        self._objective.fit_statistics(self._batches.sample, initial=True)
        self.state.average.restart()
        self._density.eval()
        self._schedule.improves(0, self._objective.validation_loss(self._held_out))
        self._density.train()
        self.state.record_best()
        self.save(taken=0)

    def _epoch(self, line: Bar) -> None:
        """Take a step for each batch, or for those that are left of a resumed epoch, and validate."""
        for taken, batch in enumerate(self._batches, 1):
            if not isinstance(batch, Rows):
                continue
            self._step(batch)
            if line.is_due:
                self._show(line, taken / len(self._batches))
            interrupted = self._is_interrupted
            if interrupted or self._is_due:
                self.save(taken)
            if interrupted:
                # The rest is for the result alone: a resumed fit starts here.
                self._folder = None
                self.state.stop("interrupted", interrupted=True)
            if self.state.stop_reason:
                break
        self._validate()
        # The log may be ahead of the checkpoint, but not behind.
        if self._log is not None:
            self._log.write(self.state.history)
        if self._is_due or not self._goes_on:
            self.save(taken=0)
        self._show(line)

    def _step(self, batch: Rows) -> None:
        """Take one step of Adam, unless the loss or its gradient is not finite."""
        loss, rows, gradients = self._objective.step(batch)
        norm = clip(gradients, self._max_grad_norm)
        if not math.isfinite(norm + float(loss)):
            self._skip()
            return
        state = self.state
        state.skipped_in_a_row = state.lowerings_in_a_row = 0
        state.optimizer.step(gradients, self._schedule.learning_rate)
        state.average.add()
        state.train_loss.add(loss, rows)

    def _skip(self) -> None:
        """Skip a step; after several in a row, return to the best weights with half the learning rate."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row < SKIPPED_IN_A_ROW:
            return
        state.skipped_in_a_row = 0
        state.lowerings_in_a_row += 1
        if state.lowerings_in_a_row > MOST_LOWERINGS:
            state.stop("no step had a finite loss and gradient, however low the learning rate")
            return
        self._schedule.lower()
        state.restore_best()
        state.optimizer.reset()
        state.average.restart()
        warnings.warn(
            f"fit skipped {SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: it goes on from the "
            f"best weights so far, with a learning rate of {self._schedule.learning_rate:.3g}.",
            stacklevel=2,
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Validate the averaged weights, with their statistics, and record them if they are the best so far."""
        state = self.state
        self._density.eval()
        state.average.swap()
        self._objective.fit_statistics(self._batches.sample)
        all_skipped = not state.train_loss.count
        learning_rate = self._schedule.learning_rate
        losses = state.train_loss.take(), self._objective.validation_loss(self._held_out)
        state.history.append(Epoch(state.seconds, *losses, learning_rate, state.skipped))
        epoch = len(state.history)
        if self._schedule.improves(epoch, losses[1]):
            state.record_best()
        state.average.swap()
        self._density.train()
        if all_skipped:
            state.stop(f"no step of epoch {epoch} had a finite loss and gradient")
        elif self._is_interrupted:
            state.stop("interrupted", interrupted=True)

    def _show(self, line: Bar, fraction: float = 0.0) -> None:
        """Show the last epoch and its losses, and how much of the next is done."""
        history, losses = self.state.history, ""
        if history:
            best = f"best {self._schedule.best:.3f}"
            losses = f"train {history[-1].train_loss:.3f}  val {history[-1].validation_loss:.3f}  {best}"
        done = len(history) + fraction
        line.show("epoch", done, self._max_epochs, epoch=max(1, len(history)), losses=losses)


def _named(prefix: str, tensors: Mapping[str, Tensor] | Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
