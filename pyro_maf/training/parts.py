"""Split of the rows of a fit into training, validation and test rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.distributions import FlowPrior, TableDensity
from pyro_maf.tables import MappedRows, Rows
from pyro_maf.tables.reader import Reader

__all__ = ["Aside", "divide", "fractions_of", "without_far_rows"]

VALIDATION_FRACTION, LEAST_VALIDATED, MOST_VALIDATED = 0.1, 16, 1 / 3
"""Fraction of the rows for validation; and, if that would be fewer rows, their minimum number, up to this fraction.
With only three validation rows, the best epoch may have a scale far too small for a fourth, which costs tens of
nats."""
LEAST_TESTED = 1000
"""Number of rows from which on some are held out for testing: a tenth of fewer is not informative, and training needs
them."""


class Aside(NamedTuple):
    """Held-out rows and their indices in the data, from 0, or None if they are not part of it."""

    rows: Rows
    places: Tensor | None

    def take(self, index: Tensor) -> Aside:
        """Select the rows at `index`."""
        return Aside(self.rows.take(index), None if self.places is None else self.places[index])

    def rounded_for(self, prior: FlowPrior | TableDensity, reader: Reader) -> Aside:
        """Convert the rows to the dtypes of a density, and check them."""
        rows = self.rows.rounded_for(prior)
        reader.at(None if self.places is None else self.places.tolist()).check_rounded(rows, prior)
        return self._replace(rows=rows)

    def normalised(self) -> Aside:
        """The rows with weights of mean 1."""
        return self._replace(rows=self.rows.normalised())


def fractions_of(
    validation: float | None, test: float | None, rows: int, *, starts: bool = False
) -> tuple[float, float]:
    """Fractions of the rows for validation and for testing.

    Args:
        validation: As in `fit`; 0 if the validation rows are separate.
        test: As in `fit`: by default as for validation, but at most half of the rest, from 1,000 rows on.
        rows: Number of rows.
        starts: Whether the fit starts at a mixture, which is the result unless the validation rows clearly prefer
            another.

    Raises:
        ValueError: For fractions that leave no rows for training.

    Example:
        >>> fractions_of(None, None, 999), fractions_of(None, None, 1000), fractions_of(0.5, None, 1000)
        ((0.1, 0.0), (0.1, 0.1), (0.5, 0.25))
        >>> fractions_of(None, None, 64), fractions_of(None, None, 64, starts=True)
        ((0.25, 0.0), (0.1, 0.0))
    """
    if validation is None:
        most = 0.0 if starts else MOST_VALIDATED * (1 - (test or 0.0))
        validation = max(VALIDATION_FRACTION, min(LEAST_VALIDATED / rows, most))
    fraction = float(validation)
    if test is None:
        return fraction, min(fraction, (1 - fraction) / 2) if rows >= LEAST_TESTED else 0.0
    if not (test >= 0 and fraction + test < 1):
        raise ValueError(
            f"fit expected test as a fraction of at least 0 that leaves rows to train with, got {test!r} beside "
            f"{fraction:g} for validation."
        )
    return fraction, float(test)


def divide(
    rows: Rows | MappedRows, fractions: tuple[float, float], generator: torch.Generator, *, by_chance: bool
) -> tuple[Rows | MappedRows, Aside, Aside, int]:
    """Split rows at random, with equal rows in the same part, like `Rows.split`.

    Returns:
        Training, validation and test rows, each possibly none, and the number of rows that repeat an earlier one.
    """
    validation, test = fractions
    split = rows.split(validation + test, generator, by_chance=by_chance)
    aside = Aside(split.held_out, split.places)
    is_tested = torch.zeros(len(split.places), dtype=torch.bool)
    if test and not validation:
        is_tested[:] = True
    elif test:
        is_tested[split.held_out.split(test / (validation + test), generator, by_chance=by_chance).places] = True
    return split.training, aside.take(~is_tested), aside.take(is_tested), split.repeats


def without_far_rows(
    aside: Aside, prior: FlowPrior | TableDensity, reach: Tensor, reader: Reader, role: str
) -> tuple[Aside, list[str]]:
    """Round held-out rows, and drop those beyond a standardised distance in any column, with a message if there are.

    The log-likelihood of one such row would outweigh all others, and determine the epoch or the score.
    """
    aside = aside.rounded_for(prior, reader)
    far = (prior.standardised(aside.rows.data).abs() > reach).any(1)
    if aside.places is None or far.all() or not far.any():
        return aside, []
    line = (
        f"fit left {int(far.sum()):,} of the {role} rows out, the first of them "
        f"{reader.labels.row(int(aside.places[far].min()))}: so far from the bulk, one would outweigh all others "
        f"in the {'choice of the best epoch' if role == 'validation' else 'mean'}. Look at them, and pass rows that "
        "should count as validation=."
    )
    return aside.take(~far), [line]
