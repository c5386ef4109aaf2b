"""The result of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import InputError, check_positive
from pyro_maf.distributions import (
    ConditionalDensity,
    ConditionalFlowPrior,
    ConditionalTableDensity,
    FlowPrior,
    TableDensity,
)
from pyro_maf.tables import Rows
from pyro_maf.tables.layout import NAMELESS, Layout, TableLike, numbers
from pyro_maf.tables.mixture import Mixture
from pyro_maf.tables.named_rows import named_rows
from pyro_maf.tables.reader import check_context
from pyro_maf.tables.table import Table
from pyro_maf.training.baselines import Comparison, compare
from pyro_maf.training.scores import LogLikelihood, log_prob_of

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["FitResult"]


@dataclass(frozen=True, repr=False)
class FitResult:
    """A fitted density, with its loss history and the reason for stopping.

    Losses are mean negative log-likelihoods in nats, in the data's units.

    Attributes:
        density: A `FlowPrior`, or a `ConditionalFlowPrior` if there is a context, in eval mode. It holds the fitted
            model with its best weights. With grid or categorical columns, a `TableDensity` around it, or its
            conditional form.
        train_loss: The mean loss of each epoch's training batches, under the weights at each step.
        validation_loss: The loss on the validation rows after each epoch, with the averaged weights.
        best_epoch: Number of epochs after which the weights were best; 0 if none were better than the initial weights.
        validation_log_likelihood: The mean log-likelihood of the validation rows under the best weights, which these
            rows selected. For a `TableDensity`, the losses use dequantised numbers and are upper bounds of its
            negative.
        test: The mean log-likelihood of the test rows, on which no choice was based: a `LogLikelihood` (mean, standard
            error, rows); None without test rows, for instance with fewer than 1,000 rows of data.
        seconds: Duration, without the time between an interruption and its resumption.
        stop_reason: Reason for stopping, in words.
        interrupted: True if Ctrl-C stopped the fit.
        skipped_steps: Number of steps skipped because their loss or its gradient was not finite.
        validation_rows: The validation rows (data, context, weights), on the CPU; weights have mean 1, or are None.
        validation_places: Indices of the validation rows in the data, from 0; None if they were passed as `validation`.
        test_rows, test_places: Likewise for the test rows; None if there are none.
        training_rows: The training rows, or some of many, to which `comparison` fits simple densities.
        gaussians: A mixture of Gaussians fitted to these rows in the fit's units, if the fit used one.
        rows: Number of rows of data.
        folder: Folder of the fit, if any.
        repeats: Number of rows that repeat an earlier one; an estimate for rows that are streamed.
        warnings: Possible failures without an error, one line each: columns with few values, columns that follow from
            others, heavy tails, a context that spans orders of magnitude, repeated rows, a best epoch of 0, too few
            epochs.
        layout, context_layout: The form of the data and of the context, and the names of their columns.

    Example:
        >>> import pandas as pd, pyro_maf
        >>> frame = pd.DataFrame({"a": [1.0, 2.5, 3.1, 4.2, 0.3, 5.9, 7.7], "b": [2.0, 0.4, 1.9, 6.3, 8.1, 9.2, 3.3]})
        >>> frame = pd.concat([frame, 10 - frame])
        >>> result = pyro_maf.fit(pyro_maf.MAF(2, num_layers=1), frame, max_epochs=1, progress=False)
        >>> result.score(frame).shape, list(result.sample(3).columns)
        (torch.Size([14]), ['a', 'b'])
    """

    density: FlowPrior | ConditionalFlowPrior | TableDensity | ConditionalTableDensity
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    best_epoch: int
    validation_log_likelihood: float
    seconds: float
    stop_reason: str
    interrupted: bool = False
    skipped_steps: int = 0
    validation_rows: Rows | None = None
    folder: Path | None = None
    warnings: tuple[str, ...] = ()
    repeats: int = 0
    validation_places: Tensor | None = None
    test: LogLikelihood | None = None
    test_rows: Rows | None = None
    test_places: Tensor | None = None
    training_rows: Rows | None = None
    gaussians: Mixture | None = None
    rows: int = 0
    layout: Layout = NAMELESS
    context_layout: Layout = NAMELESS

    @cached_property
    def comparison(self) -> Comparison | None:
        """The flow and simpler densities on the test rows or, if there are none, on the validation rows.

        A Gaussian, a mixture of Gaussians chosen by BIC and, if there are not too many rows, a kernel density, in the
        same
        units: their log-likelihoods, and how far they are behind the flow. It is printed after a progress bar, and its
        `warnings` report a density that is ahead. None for a result without training rows.

        Cost: at most some two seconds, at the first access.
        """
        role, rows = ("validation", self.validation_rows) if self.test_rows is None else ("test", self.test_rows)
        if rows is None or self.training_rows is None:
            return None
        return compare(self.density, self.training_rows, rows, role, gaussians=self.gaussians)

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.validation_loss)

    @property
    def headline(self) -> str:
        """The log-likelihood of the test rows or, if there are none, of the validation rows, in words."""
        if self.test is not None:
            return f"test log-likelihood {self.test}"
        return f"validation log-likelihood {self.validation_log_likelihood:.3f} nats, of rows that chose the epoch"

    def score(self, rows: TableLike | Table, context: TableLike | None = None) -> Tensor:
        """Log-likelihood of each row, (rows,), in nats, in the data's units; without gradient, on the CPU.

        Args:
            rows: Rows as for `fit`, in the same units. If the fit had column names, columns are matched by name, and
                others are ignored; otherwise they are matched by position. A row of a data frame or a dictionary of
                single numbers counts as one row.
            context: Rows of context, for a density that takes one. It may be left out if its columns are among `rows`.

        Returns:
            The log-densities; -inf outside the support and for infinite values, NaN for a row with a missing value.

        Raises:
            TypeError: For values that are not numeric.
            ValueError: For missing columns or a wrong number of them; for a context that is missing, superfluous or of
                another length, or in a data frame whose index is a reordering of that of the rows.
        """
        picked = named_rows("score", rows, context).as_in("score", self.layout, self.context_layout, name="rows")
        self._check_context("score", picked.context)
        return torch.cat([torch.empty(0), *log_prob_of(self.density, picked.data, picked.context)])

    def sample(self, number: int, context: TableLike | None = None) -> Tensor | DataFrame | dict[str, Tensor]:
        """Draw new rows, in the form of the fitted data: a data frame, a dictionary or a tensor.

        Uses torch's global random state.

        Args:
            number: Number of rows.
            context: For a density that takes a context: one row for all draws, or one row for each.

        Raises:
            ValueError: For a context that is missing, superfluous, not finite, or has another number of rows.
        """
        number = check_positive("sample", "number", number)
        self._check_context("sample", context)
        if context is None:
            return self.layout.like(self.density.unwrapped.sample((number,)).cpu())
        shape = self.density.unwrapped.context_shape
        table = numbers("sample", "context", self.context_layout.pick("sample", "context", context))
        if table.shape == shape or (table.dim() < 2 and table.numel() % shape.numel() == 0):
            table = table.reshape(-1, *shape)
        if table.shape[1:] != shape:
            raise ValueError(
                f"sample expected context of shape {(1, *shape)} or {(number, *shape)}, got {tuple(table.shape)}."
            )
        if len(table) not in (1, number):
            raise ValueError(
                f"sample expected context of 1 row, for all draws, or of {number}, one for each, got {len(table)}."
            )
        if (wrong := ~table.isfinite().flatten(1)).any():
            row, column = wrong.nonzero()[0].tolist()
            labels = self.context_layout.encoded_labels
            where = f"row {row}, column {labels[column]!r}" if labels else f"row {row}"
            raise InputError(f"sample expected finite context, got a missing or infinite value in {where}.", row=row)
        density = cast(ConditionalDensity, self.density)
        if len(table) == 1:
            return self.layout.like(density.condition(table[0]).sample((number,)).cpu())
        return self.layout.like(density.condition(table).sample().cpu())

    def _check_context(self, who: str, context: TableLike | None) -> None:
        names = self.context_layout.labels
        which = f", with the columns {', '.join(names)}" if names else ""
        check_context(who, "context", context, self.density.unwrapped.context_dim, more=which)

    def __repr__(self) -> str:
        steps = "1 step" if self.skipped_steps == 1 else f"{self.skipped_steps} steps"
        skipped = f"; {steps} without a finite loss and gradient skipped" if self.skipped_steps else ""
        resumable = "; resume=True goes on" if self.folder and self.interrupted else ""
        count = len(self.warnings)
        warned = f"; {count} warning{'s' * (count > 1)}, see .warnings" if count else ""
        return (
            f"FitResult({self.headline}; best epoch {self.best_epoch} of {self.epochs}, {self.seconds:.1f} s; "
            f"stopped: {self.stop_reason}{resumable}{skipped}{warned})"
        )
