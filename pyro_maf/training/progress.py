"""A progress bar over the epochs of a fit."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from pyro_maf.showing import SECONDS_BETWEEN_UPDATES, progress_bar
from pyro_maf.training.module import MaximumLikelihood

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """One bar on stderr: epoch, losses, time spent and the most that is left, which patience may cut short.

    Args:
        console: Where it goes.
        fit: What it is of.
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
        """Move on within the epoch."""
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
        """Leave the bar as it is."""
        self._progress.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._progress.stop()
