"""The training loop: Adam steps, validation of averaged weights after each epoch, checkpoints, and stopping."""

from __future__ import annotations

import warnings
from contextlib import closing, nullcontext

import torch
from torch import nn

from pyro_maf._core.interruption import Interruption
from pyro_maf._core.processes import Processes
from pyro_maf._core.progress import Bar, bar
from pyro_maf.tables import Rows
from pyro_maf.training.batches import Batches
from pyro_maf.training.objective import objective_of
from pyro_maf.training.preparation import Trained
from pyro_maf.training.records import CheckpointFolder, Epoch, Log
from pyro_maf.training.state import Schedule, State
from pyro_maf.transforms import ActNorm, BatchNorm

__all__ = ["Loop"]

SKIPPED_IN_A_ROW = 5
MOST_LOWERINGS = 10


class Loop:
    """Minimisation of the mean negative log-likelihood by Adam, keeping the weights with the best validation loss.

    An exponential average of the weights is validated: it is better than the weights at any step, and allows a high
    learning rate. The constructor starts or joins the other processes, if any, and resumes from a checkpoint.

    Args:
        trained: The density to fit.
        batches, held_out: Training rows and validation rows.
        schedule: Learning rate, weight decay and patience.
        max_epochs: Maximum number of epochs, including those before a checkpoint.
        max_grad_norm: Norm to which a step's gradient is clipped.
        interruption: The user's request to stop.
        processes: The processes that take part.
        folder: Folder of checkpoints and log, if any.
        doubts: Whether an epoch is judged by its gain over the initial weights minus what may be due to chance.

    Attributes:
        state: State of the fit.
    """

    def __init__(
        self,
        trained: Trained,
        batches: Batches,
        held_out: Batches,
        *,
        schedule: Schedule,
        max_epochs: int,
        max_grad_norm: float,
        interruption: Interruption,
        processes: Processes,
        folder: CheckpointFolder | None = None,
        doubts: bool = False,
    ) -> None:
        self._density = density = trained.density
        self._offsets = trained.offsets
        self._has_modes = any(map(_depends_on_mode, density.modules()))
        self._batches = batches
        self._held_out = held_out
        self._schedule = schedule
        self._max_epochs = max_epochs
        self._max_grad_norm = max_grad_norm
        self._interruption = interruption
        self._processes = processes
        self._folder = folder
        self._home = next(weight.device for weight in density.parameters() if weight.requires_grad)
        device = processes.launch(self._home)
        for each in (density, batches, held_out):
            each.to(device)
        self._log = Log(folder.folder) if folder is not None and processes.is_first else None
        self._objective = objective_of(density, processes)
        self.state = State(trained.stored, self._objective, batches, schedule)
        self._initial = self._objective.losses(held_out) if doubts else None
        self._is_resumed = folder is not None and folder.checkpoint is not None
        if folder is not None and folder.checkpoint is not None:
            self.state.load(folder.checkpoint, folder.path)

    def run(self, progress: bool | str) -> None:
        """Train to the end, or until a second Ctrl-C; leave the density with its best weights, in eval mode."""
        shown = progress if self._processes.is_first else False
        try:
            self._switch_to_training(True)
            if self._continues:
                with (
                    nullcontext() if self._log is None else closing(self._log),
                    bar(shown, "{task.description} {task.fields[epoch]}", "{task.fields[losses]}") as line,
                ):
                    self._show(line)
                    self._begin()
                    while self._continues:
                        self._epoch(line)
        finally:
            self._interruption.settle()
            self._density.to(self._home)
            self.state.restore_best()
            self._objective.close()
            self._density.eval()

    def _switch_to_training(self, mode: bool) -> None:
        """Set the train/eval mode of every module, if any depends on it, since that takes as long as some steps."""
        if self._has_modes:
            self._density.train(mode)

    def save(self, taken: int) -> None:
        """Write a checkpoint, with `taken` batches of the current epoch done."""
        if self._folder is not None and self._processes.is_first:
            self._folder.write(self.state.checkpoint(taken))

    @property
    def _continues(self) -> bool:
        return len(self.state.history) < self._max_epochs and not self.state.reason

    @property
    def _is_due(self) -> bool:
        return self._folder is not None and self._folder.is_due

    @property
    def _is_interrupted(self) -> bool:
        """True if any of the processes was interrupted."""
        return bool(self._processes.total(float(self._interruption.requested))[0])

    def _begin(self) -> None:
        """Synchronise the processes, and record the initial weights in case none are better."""
        resumed = int(self._processes.total(float(self._is_resumed))[0])
        if 0 < resumed < self._processes.count:
            raise ValueError(
                f"fit expected a folder that all processes share, but only {resumed} of {self._processes.count} found "
                "a fit to resume there."
            )
        if self._is_resumed:
            return
        self._processes.copy_first(self._objective.weights)
        self._objective.fit_statistics(self._batches.sample, initial=True)
        self.state.average.restart()
        self._switch_to_training(False)
        self._schedule.improves(0, self._objective.mean(self._objective.losses(self._held_out)) - self._offsets[1])
        self._switch_to_training(True)
        self.state.record_best()
        self.save(taken=0)

    def _epoch(self, line: Bar) -> None:
        """Take a step for each batch, or each remaining one of a resumed epoch, and validate."""
        for taken, batch in enumerate(self._batches, 1):
            if not isinstance(batch, Rows):
                continue
            self.step(batch)
            if line.is_due:
                self._show(line, taken / len(self._batches))
            interrupted = self._is_interrupted
            if interrupted or self._is_due:
                self.save(taken)
            if interrupted:
                # The rest is only for the result: a resumed fit starts here.
                self._folder = None
                self.state.stop("interrupted", interrupted=True)
            if self.state.stop_reason:
                break
        self._validate()
        # The log may be ahead of the checkpoint, but not behind.
        if self._log is not None:
            self._log.write(self.state.history)
        if self._is_due or not self._continues:
            self.save(taken=0)
        self._show(line)

    def step(self, batch: Rows) -> None:
        """Take one step of Adam, unless the loss or its gradient is not finite."""
        state, learning_rate = self.state, self._schedule.learning_rate
        taken = self._objective.descend(batch, state.optimizer, state.average, learning_rate, self._max_grad_norm)
        if taken is None:
            self._skip()
            return
        state.skipped_in_a_row = state.lowerings_in_a_row = 0
        state.train_loss = state.train_loss + taken[0]
        state.train_rows += taken[1]

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
            f"fit skipped {SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: it continues from the "
            f"best weights so far, with a learning rate of {self._schedule.learning_rate:.3g}.",
            stacklevel=2,
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Validate the averaged weights, with their statistics, and record them if they are the best so far."""
        state = self.state
        self._switch_to_training(False)
        state.average.swap()
        self._objective.fit_statistics(self._batches.sample)
        all_skipped, learning_rate = not state.train_rows, self._schedule.learning_rate
        losses = self._objective.losses(self._held_out)
        of_training, of_validation = self._offsets
        means = state.taken_loss() - of_training, self._objective.mean(losses) - of_validation
        state.history.append(Epoch(state.seconds, *means, learning_rate, state.skipped))
        epoch = len(state.history)
        doubt = 0.0 if self._initial is None else self._objective.doubt(self._initial - losses)
        if self._schedule.improves(epoch, means[1] + doubt):
            state.record_best()
        state.optimizer.weight_decay = self._schedule.weight_decay
        state.average.swap()
        self._switch_to_training(True)
        if all_skipped:
            state.stop(f"no step of epoch {epoch} had a finite loss and gradient")
        elif self._is_interrupted:
            state.stop("interrupted", interrupted=True)

    def _show(self, line: Bar, fraction: float = 0.0) -> None:
        """Show the last epoch, its losses, and the progress of the current epoch."""
        history, losses = self.state.history, ""
        if history:
            best = f"best {self._schedule.best:.3f}"
            losses = f"train {history[-1].train_loss:.3f}  val {history[-1].validation_loss:.3f}  {best}"
        done = len(history) + fraction
        line.show("epoch", done, self._max_epochs, epoch=max(1, len(history)), losses=losses)


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether train and eval mode of a module may differ; in this package they do for two modules."""
    is_of_package = type(module).__module__.startswith("pyro_maf.") or type(module) is nn.ModuleList
    return isinstance(module, (ActNorm, BatchNorm)) or not is_of_package
