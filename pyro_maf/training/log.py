"""The log of a fit: a line an epoch, as csv, and for TensorBoard if that is installed."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyro_maf._core.files import BOARD, LOG
from pyro_maf.saving import try_to_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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


class Log:
    """Log of a fit in its folder: `log.csv`, and the same for TensorBoard if that is installed.

    The file is rewritten as a whole at each epoch, so that it agrees with the fit, also a resumed one.

    Args:
        folder: The folder of the fit.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._events = folder / BOARD
        self._has_board = find_spec("tensorboard") is not None
        self._board: SummaryWriter | None = None

    def write(self, history: Sequence[Epoch]) -> None:
        """Write the epochs so far, of which the last is new."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["epoch", *Epoch._fields])
        rows.writerows([number, *epoch] for number, epoch in enumerate(history, 1))
        try_to_write(self._path, text.getvalue().encode())
        if self._has_board:
            self._write_to_board(len(history), history[-1])

    def close(self) -> None:
        """Close the file of TensorBoard."""
        if self._board is not None:
            self._board.close()

    def _write_to_board(self, number: int, epoch: Epoch) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._board is None:
                # Not before: until its first checkpoint, a fit leaves the folder unchanged. Later entries are purged.
                self._board = SummaryWriter(str(self._events), purge_step=number)
            for name, value in epoch._asdict().items():
                self._board.add_scalar(name, value, number)
            self._board.flush()
        except OSError as error:
            self._has_board, self._board = False, None
            warnings.warn(f"fit could not write to {self._events}: {error}. It goes on without.", stacklevel=2)
