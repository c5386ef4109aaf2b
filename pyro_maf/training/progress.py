"""Progress bar over the epochs of a fit."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pyro_maf._core.progress import bar
from pyro_maf.training.module import MaximumLikelihood

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """A bar on stderr: epoch, losses, elapsed time and maximum remaining time, which patience may cut short.

    Args:
        progress: As in `fit`.
        fit: The module in training.
    """

    def __init__(self, progress: bool | str, fit: MaximumLikelihood) -> None:
        self._fit = fit
        self._progress = progress
        self._before = len(fit.history)
        self._fields = {"epoch": self._before + 1, "losses": ""}
        self._stack = ExitStack()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the bar."""
        self._total = self._before + int(trainer.max_epochs or 0)
        self._bar = self._stack.enter_context(
            bar(self._progress, "{task.description} {task.fields[epoch]}", "{task.fields[losses]}")
        )
        self._bar.show("epoch", self._before, self._total, **self._fields)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance within the epoch."""
        if self._bar.is_due:
            fraction = (batch_idx + 1) / int(trainer.num_training_batches)
            self._bar.show("epoch", self._before + trainer.current_epoch + fraction, self._total, **self._fields)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the epoch's losses."""
        if history := self._fit.history:
            best = f"best {self._fit.schedule.best:.3f}"
            losses = f"train {history[-1].train_loss:.3f}  val {history[-1].validation_loss:.3f}  {best}"
            self._fields = {"epoch": len(history), "losses": losses}
            self._bar.show("epoch", len(history), self._total, **self._fields)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the bar, and leave it on the screen."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Stop the bar after an error, and restore the terminal."""
        self._stack.close()
