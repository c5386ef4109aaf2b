"""The log of a fit: a line an epoch, as csv, and for TensorBoard if that is installed."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from pyro_maf._core.files import BOARD, LOG
from pyro_maf.saving import try_to_write

__all__ = ["Epoch", "Log"]


class Epoch(NamedTuple):
    """Record of an epoch.

    Attributes:
        seconds: Time since the fit began, without interruptions.
        train_loss, validation_loss: Losses in nats.
        learning_rate: Learning rate of its steps.
        skipped_steps: Number of steps left out so far.
    """

    seconds: float
    train_loss: float
    validation_loss: float
    learning_rate: float
    skipped_steps: int


class Log(Callback):
    """Callback that rewrites `log.csv` as a whole at each epoch, so that it agrees with the fit, also a resumed one.

    Args:
        folder: The folder of the fit.
        history: The epochs, to which the fit appends.
    """

    def __init__(self, folder: Path, history: Sequence[Epoch]) -> None:
        self._path = folder / LOG
        self._history = history
        self._events = folder / BOARD
        self._has_board = find_spec("tensorboard") is not None
        self._board: Any = None

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the new epoch."""
        self._write()
        if not self._has_board:
            return
        try:
            # Not before: until its first checkpoint, a fit leaves the folder unchanged.
            self._board = self._board or _board(self._events, first=len(self._history))
            for name, value in self._history[-1]._asdict().items():
                self._board.add_scalar(name, value, len(self._history))
            self._board.flush()
        except OSError as error:
            self._has_board, self._board = False, None
            warnings.warn(f"fit could not write to {self._events}: {error}. It goes on without.", stacklevel=2)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Close the file of TensorBoard."""
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Close the file of TensorBoard after an error too."""
        self._close()

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _write(self) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["epoch", *Epoch._fields])
        rows.writerows([number, *epoch] for number, epoch in enumerate(self._history, 1))
        try_to_write(self._path, text.getvalue().encode())


def _board(folder: Path, first: int) -> Any:
    """Open the files of TensorBoard from epoch `first` on; purge later entries."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first)
