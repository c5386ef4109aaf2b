"""Progress bar over the epochs of a fit."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from pyro_maf._core.progress import SECONDS_BETWEEN_UPDATES, progress_bar
from pyro_maf.training.module import MaximumLikelihood

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """A bar on stderr: epoch, losses, elapsed time and maximum remaining time, which patience may cut short.

    Args:
        console: The console that it is shown on.
        fit: The module in training.
    """

    def __init__(self, console: Console, fit: MaximumLikelihood) -> None:
        self._fit = fit
        self._before = len(fit.history)
        self._progress = progress_bar("epoch {task.fields[epoch]}", "{task.fields[losses]}", console)
        self._updated = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the bar."""
        total = self._before + int(trainer.max_epochs or 0)
        self._task = self._progress.add_task("", total=total, completed=self._before, epoch=self._before + 1, losses="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance within the epoch."""
        if time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES:
            self._updated = time.monotonic()
            fraction = (batch_idx + 1) / int(trainer.num_training_batches)
            self._progress.update(self._task, completed=self._before + trainer.current_epoch + fraction)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the epoch's losses."""
        if history := self._fit.history:
            best = f"best {self._fit.schedule.best:.3f}"
            losses = f"train {history[-1].train_loss:.3f}  val {history[-1].validation_loss:.3f}  {best}"
            self._progress.update(self._task, completed=len(history), epoch=len(history), losses=losses)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the bar, and leave it on the screen."""
        self._progress.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Stop the bar after an error, and restore the terminal."""
        self._progress.stop()
