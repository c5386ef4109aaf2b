"""The log of a fit: a line an epoch, as csv, and for TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from pyro_maf.saving import write_whole

__all__ = ["Epoch", "Log"]


class Epoch(NamedTuple):
    """What is known of an epoch at its end.

    Attributes:
        seconds: Since the fit began, without the time it was interrupted.
        train_loss, validation_loss: In nats.
        learning_rate: That of its steps.
        skipped_steps: How many steps were left out so far.
    """

    seconds: float
    train_loss: float
    validation_loss: float
    learning_rate: float
    skipped_steps: int


class Log(Callback):
    """Writes `log.csv`, whole at each epoch, so that it always agrees with the fit, one taken up again included.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.csv"
        self._board = _board(folder / "tensorboard")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write what has come to be known."""
        history: Any = module.history
        self._write(history)
        if self._board is not None:
            for name, value in history[-1]._asdict().items():
                self._board.add_scalar(name, value, len(history))
            self._board.flush()

    def _write(self, history: Sequence[Epoch]) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["epoch", *Epoch._fields])
        rows.writerows([number, *epoch] for number, epoch in enumerate(history, 1))
        write_whole(self._path, text.getvalue().encode())


def _board(folder: Path) -> Any:
    """What TensorBoard reads, where it is installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
