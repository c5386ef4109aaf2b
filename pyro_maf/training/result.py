"""What a fit gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_maf.training.data import Rows

__all__ = ["FitResult"]


@dataclass(frozen=True, repr=False)
class FitResult:
    """A fitted density, how it got there, and why it stopped there.

    Losses are mean negative log-likelihoods in nats, in the data's own units.

    Attributes:
        density: A `FlowPrior`, or a `ConditionalFlowPrior` where there is a context, in eval mode. It holds the model
            that was fitted, with its best weights.
        train_loss: The mean loss of each epoch's training batches, taken while the weights moved.
        validation_loss: The loss on the validation rows after each epoch, with the averaged weights.
        best_epoch: How many epochs the best weights were trained for; 0 if none was better than the given weights.
        validation_log_likelihood: The mean log-likelihood of the validation rows under the best weights.
        seconds: How long it took, without any time between an interruption and going on.
        stop_reason: Why it ended, in words.
        skipped_steps: How many steps were left out because their loss or its gradient was not finite.
        held_out: The validation rows, a pair (data, context), on the CPU.
        held_out_places: Where in the data these were, from 0; None where they were given as `validation`.
        rows: How many rows of data were given.
        folder: Where the fit is kept, if anywhere.
        repeats: How many of all rows repeat an earlier one; of rows that are streamed, about how many.
        warnings: What may have gone wrong without an error, a line each: columns of few values, columns that follow
            from others, heavy tails, a context over orders of magnitude, rows that repeat, a best epoch of 0, too few
            epochs.
    """

    density: Any
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    best_epoch: int
    validation_log_likelihood: float
    seconds: float
    stop_reason: str
    skipped_steps: int = 0
    held_out: Rows | None = None
    folder: Path | None = None
    warnings: tuple[str, ...] = ()
    repeats: int = 0
    held_out_places: Tensor | None = None
    rows: int = 0

    @property
    def epochs(self) -> int:
        """How many epochs there were."""
        return len(self.validation_loss)

    def __repr__(self) -> str:
        steps = "1 step" if self.skipped_steps == 1 else f"{self.skipped_steps} steps"
        skipped = f"; {steps} without a finite loss and gradient skipped" if self.skipped_steps else ""
        resumable = "; resume=True goes on" if self.folder and self.stop_reason == "interrupted" else ""
        count = len(self.warnings)
        warned = f"; {count} warning{'s' * (count > 1)}, see .warnings" if count else ""
        return (
            f"FitResult(validation log-likelihood {self.validation_log_likelihood:.3f} nats "
            f"after epoch {self.best_epoch} of {self.epochs}, {self.seconds:.1f} s; "
            f"stopped: {self.stop_reason}{resumable}{skipped}{warned})"
        )
